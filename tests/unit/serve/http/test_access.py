"""Keys and limits: who may ask, how often, and where a service without keys may listen."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cat_cluster.errors import SpecError
from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore
from serve.calls import Accepted, Event, Finished, ImageCall
from serve.http.access import Access, Caller, check_bind
from serve.http.http_errors import HttpError
from serve.settings import ServeSettings
from tests.support.ingress_server import Live, ScriptedEngine, listening, only, picture

PATH = "/v1/images/generations"
BODY = {"prompt": "a cup"}


@contextmanager
def served(tmp_path: Path, engine: ScriptedEngine, environment: dict[str, str], **options: Any) -> Iterator[Live]:
    settings = ServeSettings(base="base", **options)
    access = Access.from_environment(settings, environment)
    with listening(only(engine), Registry(LocalStore(tmp_path)), settings, access) as live:
        yield live


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_a_key_is_needed_where_keys_are_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cat_cluster.serve")
    engine = ScriptedEngine()
    keys = {"CAT_API_KEYS": "sesame, other-key", "CAT_ADMIN_KEYS": "master"}
    with served(tmp_path, engine, keys) as live, live.http() as http:
        for headers in ({}, bearer("wrong"), {"authorization": "Bearer"}, {"authorization": "Basic sesame"}):
            response = http.post(PATH, content=b"\xff", headers=headers)  # the body is not even looked at
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        for key in ("sesame", "other-key", "master"):
            assert http.post(PATH, json=BODY, headers=bearer(key)).status_code == 200
        for path in ("/health", "/ready", "/", "/page/app.js", "/docs", "/openapi.json", "/metrics"):
            assert http.get(path).status_code == 200, path
        for path in ("/v1/models", "/v1/adapters", "/v1/status", "/v1/adapters/cup/drift"):
            assert http.get(path).status_code == 401, path
        assert http.post("/v1/adapters/cup/pin", headers=bearer("sesame")).status_code == 403
        assert http.post("/v1/adapters/cup/pin", headers=bearer("master")).json()["result"] == {"engines": 1}
        assert engine.actions == [("pin", "cup")]
    assert not any(key in caplog.text for key in ("sesame", "other-key", "master", "wrong"))
    named = [json.loads(message).get("key") for message in caplog.messages]
    assert len({name for name in named if name}) == 3


@pytest.mark.parametrize(
    ("environment", "key", "status"),
    [
        ({}, None, 200),
        ({}, "any", 200),
        ({"CAT_API_KEYS": "a-key"}, "a-key", 403),
        ({"CAT_ADMIN_KEYS": "master"}, None, 403),
        ({"CAT_ADMIN_KEYS": "master"}, "any", 403),
        ({"CAT_ADMIN_KEYS": "master"}, "master", 200),
    ],
)
def test_who_may_act_on_adapters(tmp_path: Path, environment: dict[str, str], key: str | None, status: int) -> None:
    engine = ScriptedEngine()
    with served(tmp_path, engine, environment) as live, live.http() as http:
        response = http.post("/v1/adapters/cup@latest/load", headers={} if key is None else bearer(key))
        assert response.status_code == status
        assert len(engine.actions) == (status == 200)


def test_pages_of_other_sites_may_not_act(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    with served(tmp_path, engine, {}) as live, live.http() as http:
        for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200)):
            response = http.post("/v1/adapters/cup/unload", headers={"sec-fetch-site": site})
            assert response.status_code == status
    assert len(engine.actions) == 1


def test_images_in_flight_are_limited_by_key(tmp_path: Path) -> None:
    go, started = threading.Event(), threading.Event()

    async def wait(call: ImageCall) -> AsyncIterator[Event]:
        import asyncio

        yield Accepted("base")
        started.set()
        await asyncio.to_thread(go.wait, 30)
        for index in range(call.count):
            yield Finished(index, index, picture())

    engine, answers = ScriptedEngine(wait), []
    with served(tmp_path, engine, {"CAT_API_KEYS": "one,two"}, images_per_key=4) as live, live.http() as http:

        def hold() -> None:
            with live.http() as other:
                answers.append(other.post(PATH, json={**BODY, "n": 3}, headers=bearer("one")).status_code)

        thread = threading.Thread(target=hold)
        thread.start()
        assert started.wait(10)
        refused = http.post(PATH, json={**BODY, "n": 2}, headers=bearer("one"))
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
        assert refused.headers["retry-after"] == "1"
        refused = http.post(PATH, json={**BODY, "n": 2, "stream": True}, headers=bearer("one"))
        assert refused.status_code == 429
        go.set()
        assert http.post(PATH, json={**BODY, "n": 2}, headers=bearer("two")).status_code == 200
        thread.join()
        assert answers == [200]
        assert http.post(PATH, json={**BODY, "n": 4}, headers=bearer("one")).status_code == 200
        refused = http.post(PATH, json={**BODY, "n": 5}, headers=bearer("one"))
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")


def test_requests_a_minute_are_limited_by_key(tmp_path: Path) -> None:
    keys = {"CAT_API_KEYS": "one,two"}
    with served(tmp_path, ScriptedEngine(), keys, requests_per_minute=3) as live, live.http() as http:
        for _ in range(3):
            assert http.get("/v1/models", headers=bearer("one")).status_code == 200
        refused = http.get("/v1/models", headers=bearer("one"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        assert http.get("/v1/models", headers=bearer("two")).status_code == 200


def test_a_bucket_fills_again() -> None:
    now = [1000.0]
    access = Access(ServeSettings(requests_per_minute=60), clock=lambda: now[0])
    caller = Caller("anonymous", False)
    for _ in range(60):
        access.admit(caller)
    with pytest.raises(HttpError) as refused:
        access.admit(caller)
    assert refused.value.headers == {"Retry-After": "1"}
    now[0] += 2.0
    access.admit(caller)
    access.admit(caller)
    with pytest.raises(HttpError):
        access.admit(caller)
    now[0] += 3600.0  # a quiet hour saves up a minute's requests and no more
    for _ in range(60):
        access.admit(caller)
    with pytest.raises(HttpError):
        access.admit(caller)


@pytest.mark.parametrize(("most", "of_one"), [(4, 2), (5, 2), (1, 1)])
def test_one_key_uploads_at_most_half_of_what_is_read_at_once(most: int, of_one: int) -> None:
    access = Access(ServeSettings(max_uploads=most), api_keys=["one", "two"], admin_keys=["master"])
    one, two, admin = (access.authenticate(f"Bearer {key}") for key in ("one", "two", "master"))
    with ExitStack() as held:
        for _ in range(of_one):
            held.enter_context(access.upload(one))
        if most > 1:
            with pytest.raises(HttpError, match=f"this key has {of_one} of at most {of_one} uploads") as refused:
                access.upload(one).__enter__()
            assert (refused.value.status_code, refused.value.headers) == (429, {"Retry-After": "1"})
            for caller in [two] * of_one + [admin] * (most - 2 * of_one):
                held.enter_context(access.upload(caller))
        with pytest.raises(HttpError) as refused:
            access.upload(admin).__enter__()
        assert refused.value.status_code == 503, "all have too many"
    with access.upload(one):
        pass


def test_without_keys_everybody_shares_all_uploads() -> None:
    for admin_keys in ([], ["master"]):
        access = Access(ServeSettings(max_uploads=2), admin_keys=admin_keys)
        with access.upload(Caller("anonymous", False)), access.upload(Caller("anonymous", False)):
            with pytest.raises(HttpError) as refused:
                access.upload(Caller("anonymous", False)).__enter__()
            assert refused.value.status_code == 503


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.1.2.3", "example.com"])
def test_a_service_without_keys_listens_here_alone(host: str) -> None:
    settings = ServeSettings()
    with pytest.raises(SpecError, match="CAT_API_KEYS"):
        check_bind(host, Access(settings, admin_keys=["master"]))
    check_bind(host, Access(settings, api_keys=["sesame"]))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    check_bind(host, Access(ServeSettings()))


@pytest.mark.parametrize("value", [",", " , ", "two words", "cl\u00e9", "tab\tkey"])
def test_keys_that_cannot_be_sent_are_refused(value: str) -> None:
    with pytest.raises(SpecError, match="CAT_API_KEYS") as refused:
        Access.from_environment(ServeSettings(), {"CAT_API_KEYS": value})
    assert value.strip(" ,") in ("",) or value not in str(refused.value)
