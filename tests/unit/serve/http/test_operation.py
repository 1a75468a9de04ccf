"""Logs, metrics, body limits, health and pages."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from ray.serve._private.http_util import RequestIdMiddleware

from cat_cluster import errors
from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore
from cat_cluster.telemetry import HTTP_REQUESTS, HTTP_SECONDS, Metrics, PrometheusBackend
from serve.calls import Event, ImageCall
from serve.http.access import Access
from serve.http.ingress import build_app
from serve.settings import ServeSettings
from tests.support.ingress_server import PATH, Live, ScriptedEngine, ask, assert_refused, listening, only, scope, until


def test_a_line_of_json_for_each_request_and_no_prompt(
    http: httpx2.Client, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(call: ImageCall) -> AsyncIterator[Event]:
        raise ValueError(call.prompt)
        yield

    caplog.set_level(logging.INFO, "cat_cluster.serve")
    http.post(PATH, json={"prompt": "my secret", "model": "cup", "n": 2}, headers={"authorization": "Bearer sesame"})
    engine.script = fail
    http.post(PATH, json={"prompt": "my secret"})
    http.post(PATH, json={"prompt": "my secret", "secret": 1})
    http.get("/nowhere/secret")
    until(lambda: len(caplog.messages) == 5)
    lines = [json.loads(message) for message in caplog.messages]
    first = lines[0]
    assert first.keys() == {"time", "request_id", "method", "route", "status", "ms", "key", "model", "images"}
    assert (first["route"], first["status"], first["model"]) == (PATH, 200, "cup@r-0123456789ab")
    assert lines[1]["error"] == "ValueError"
    assert lines[1]["trace"]
    assert [line["status"] for line in lines[2:]] == [500, 400, 404]
    assert lines[4]["route"] == "/unknown"
    assert "secret" not in caplog.text
    assert "sesame" not in caplog.text


def test_prompts_are_logged_where_that_is_asked_for(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CAT_LOG_PROMPTS", "1")
    caplog.set_level(logging.INFO, "cat_cluster.serve")
    settings = ServeSettings(base="base")
    opened, registry = only(ScriptedEngine()), Registry(LocalStore(tmp_path))
    with listening(opened, registry, settings, Access(settings)) as live, live.http() as http:
        ask(http)
    assert json.loads(caplog.messages[0])["prompt"] == "a cup"


@pytest.mark.parametrize("given", ["my-request.1", "a b", "\xff\xfe", None])
def test_behind_rays_proxy_a_request_id_comes_once(tmp_path: Path, given: str | None) -> None:
    settings, backend = ServeSettings(base="base"), PrometheusBackend()
    metrics = Metrics(backend, [HTTP_REQUESTS, HTTP_SECONDS])
    registry = Registry(LocalStore(tmp_path))
    app = build_app(
        ScriptedEngine(), registry, settings, Access(settings), metrics, backend.exposition, proxy_adds_id=True
    )
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    request = scope("GET", "/v1/models")
    request["headers"] += [] if given is None else [(b"x-request-id", given.encode("latin-1"))]
    asyncio.run(RequestIdMiddleware(app)(request, receive, send))  # what the proxy puts around every application
    ids = [value.decode("latin-1") for name, value in sent[0]["headers"] if name.lower() == b"x-request-id"]
    assert sent[0]["status"] == 200
    if given in ("my-request.1", None):
        assert len(ids) == 1
    else:  # the proxy's own cannot be taken away; ours is the one in the log
        assert ids[0].startswith("req-")


def test_http_metrics_count_routes_and_codes(http: httpx2.Client) -> None:
    ask(http)
    ask(http, n=0)
    http.get("/v1/models/nobody")
    http.get("/made/up")
    text = http.get("/metrics").text
    assert 'cat_http_requests_total{code="200",route="/v1/images/generations"} 1.0' in text
    assert 'cat_http_requests_total{code="400",route="/v1/images/generations"} 1.0' in text
    assert 'cat_http_requests_total{code="404",route="/v1/models/{model}"} 1.0' in text
    assert 'cat_http_requests_total{code="404",route="/unknown"} 1.0' in text
    assert "# an engine's metrics" in text


def test_bodies_are_counted_as_they_come(live: Live, engine: ScriptedEngine) -> None:
    def pieces() -> Iterator[bytes]:
        yield from (b" " * 1024 for _ in range(20))

    headers = {"content-type": "application/json"}
    with live.http() as http:
        assert_refused(http.post(PATH, content=pieces(), headers=headers), 413, "body_too_large")
        assert_refused(http.post(PATH, content=b" " * 9000, headers=headers), 413, "body_too_large")

    async def lying() -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b" " * 4096, "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        await live.app(scope("POST", PATH, {"content-length": "10"}), receive, send)
        return sent

    assert live.call(lying())[0]["status"] == 413
    assert not engine.calls


def test_other_content_types_are_refused(http: httpx2.Client, engine: ScriptedEngine) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""):
        response = http.post(PATH, content=b'{"prompt": "a"}', headers={"content-type": kind} if kind else {})
        assert_refused(response, 415, "not_json")
    assert http.post(PATH, data={"prompt": "a"}).status_code == 415
    good = http.post(PATH, content=b'{"prompt": "a"}', headers={"content-type": "Application/JSON; charset=utf-8"})
    assert good.status_code == 200
    assert len(engine.calls) == 1


def test_routes_and_methods_that_are_not_there(http: httpx2.Client) -> None:
    assert_refused(http.get("/v1/nothing"), 404, "not_found")
    assert_refused(http.get("/v1/models/"), 404, "model_not_found", "model")
    refused = http.get(PATH)
    assert_refused(refused, 405, "method_not_allowed")
    assert refused.headers["allow"] == "POST"
    assert http.delete("/v1/runs").headers["allow"] == "GET, POST", "of two routes"
    assert set(http.delete("/openapi.json").headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_health_ready_and_pages(http: httpx2.Client, engine: ScriptedEngine) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    for path in ("/", "/page/app.js", "/docs", "/docs/start.js", "/docs/assets/swagger-ui-bundle.js", "/openapi.json"):
        response = http.get(path)
        assert response.status_code == 200, path
        assert "default-src 'self'" in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
    assert "//" not in http.get("/docs").text.replace("</", "")
    assert_refused(http.get("/page/../serve/app.py"), 404, "not_found")
    assert_refused(http.get("/page/%2e%2e/settings.py"), 404, "not_found")
    for refusal in (errors.EngineStoppedError("starting"), ConnectionError("away")):
        engine.refusal = refusal
        assert_refused(http.get("/ready"), 503, "engine_stopped")
        assert http.get("/health").status_code == 200
        assert "cat_http_requests_total" in http.get("/metrics").text


def test_the_description_is_shown_by_a_release_that_reads_its_version(http: httpx2.Client) -> None:
    bundle, start = (http.get(f"/docs/{path}").text for path in ("assets/swagger-ui-bundle.js", "start.js"))
    version = re.search(r'PACKAGE_VERSION:"(\d+)\.', bundle)
    assert version is not None
    assert int(version[1]) >= 5  # the first to read OpenAPI 3.1
    assert http.get("/openapi.json").json()["openapi"].startswith("3.1")
    assert '"openapi.json"' in start
    assert "3.0" not in start


def test_the_description_of_a_job_spec_is_made_once(http: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    first = http.get("/openapi.json").json()
    assert {"RunRequest", "AdapterSpec", "TrainingSpec"} <= first["components"]["schemas"].keys()
    monkeypatch.setattr("serve.http.training.job_bodies.spec_json_schema", lambda: pytest.fail("made again"))
    assert http.get("/openapi.json").json() == first
