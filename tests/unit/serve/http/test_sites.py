"""What reaches a service through somebody's browser: foreign hosts, foreign pages, and the pages that are listed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from pydantic import ValidationError

from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore
from serve.http.access import Access
from serve.settings import ServeSettings
from tests.support.ingress_server import PATH, ScriptedEngine, assert_refused, listening, only

FOREIGN = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.7", ""]
LISTED = "http://localhost:3000"


@contextmanager
def served(tmp_path: Path, *, keys: tuple[str, ...] = (), **options: Any) -> Iterator[tuple[httpx2.Client, Any]]:
    settings, engine = ServeSettings(base="base", **options), ScriptedEngine()
    access = Access(settings, api_keys=keys, admin_keys=keys)
    with listening(only(engine), Registry(LocalStore(tmp_path)), settings, access) as live, live.http() as http:
        yield http, engine


@pytest.mark.parametrize("host", FOREIGN)
def test_without_keys_another_hosts_name_reaches_nothing(tmp_path: Path, host: str) -> None:
    # A page at evil.example whose name now resolves to 127.0.0.1: of one origin for the browser.
    rebound = {"host": host, "origin": f"http://{host}"}
    with served(tmp_path) as (http, engine):
        for method, path in (("GET", "/"), ("GET", "/v1/adapters"), ("POST", "/v1/adapters/cup/unload")):
            assert_refused(http.request(method, path, headers=rebound), 403, "foreign_host")
        assert_refused(http.post(PATH, json={"prompt": "a"}, headers=rebound), 403, "foreign_host")
        assert_refused(http.get("/v1/models", headers={"host": host}), 403, "foreign_host")
        assert not engine.calls
        assert not engine.actions


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:8000"])
def test_without_keys_this_machines_own_names_work(tmp_path: Path, host: str) -> None:
    with served(tmp_path) as (http, engine):
        assert http.get("/v1/models", headers={"host": host}).status_code == 200
        own = {"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}
        assert http.post(PATH, json={"prompt": "a"}, headers=own).status_code == 200
        assert http.post("/v1/adapters/cup/pin", headers=own).status_code == 200
        assert len(engine.actions) == 1


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:1", "https://service.example:444", "file://", "x", ""]
)
@pytest.mark.parametrize("keys", [(), ("master",)])
def test_another_sites_page_is_refused_with_and_without_keys(
    tmp_path: Path, keys: tuple[str, ...], origin: str
) -> None:
    headers = {"host": "service.example" if keys else "localhost:8000", "origin": origin}
    headers |= {"authorization": "Bearer master"} if keys else {}
    with served(tmp_path, keys=keys) as (http, engine):
        assert_refused(http.post("/v1/adapters/cup/pin", headers=headers), 403, "foreign_origin")
        assert_refused(http.get("/v1/adapters", headers=headers), 403, "foreign_origin")
        assert not engine.actions


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("service.example", "https://service.example"),  # TLS ends at a proxy
        ("service.example:443", "https://service.example"),
        ("Service.Example:8000", "http://service.example:8000"),
    ],
)
def test_with_keys_any_host_works_and_its_own_page_too(tmp_path: Path, host: str, origin: str) -> None:
    headers = {"authorization": "Bearer master", "host": host, "origin": origin}
    with served(tmp_path, keys=("master",)) as (http, engine):
        assert http.post("/v1/adapters/cup/pin", headers=headers).status_code == 200
        assert engine.actions == [("pin", "cup")]


def test_a_listed_sites_page_draws_and_reads_and_does_not_administer(tmp_path: Path) -> None:
    page = {"origin": LISTED, "sec-fetch-site": "same-site"}
    with served(tmp_path, cors_origins=(LISTED,)) as (http, engine):
        asked = {**page, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        preflight = http.request("OPTIONS", PATH, headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == LISTED
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        drawn = http.post(PATH, json={"prompt": "a"}, headers=page)
        assert drawn.status_code == 200
        assert drawn.headers["access-control-allow-origin"] == LISTED
        refused = http.post(PATH, json={"prompt": 1}, headers=page)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (400, LISTED)
        for headers in (page, {"origin": LISTED}):
            assert http.post("/v1/adapters/cup/pin", headers=headers).status_code == 403
        assert http.get("/v1/models", headers={"origin": "http://localhost:3001"}).status_code == 403
        assert not engine.actions


def test_no_other_sites_are_allowed_unless_listed(tmp_path: Path) -> None:
    with served(tmp_path) as (http, _):
        assert "access-control-allow-origin" not in http.get("/v1/models").headers
        asked = {"origin": LISTED, "access-control-request-method": "POST"}
        assert_refused(http.request("OPTIONS", PATH, headers=asked), 403, "foreign_origin")


@pytest.mark.parametrize(
    "origin",
    ["*", "https://*.example.com", "example.com", "https://a.example/", "HTTPS://A.example", "null", "ftp://a"],
)
def test_what_is_no_origin_is_refused_in_the_settings(origin: str) -> None:
    with pytest.raises(ValidationError, match=r"cors_origins\n.*is not the origin of a page"):
        ServeSettings(cors_origins=(origin,))
