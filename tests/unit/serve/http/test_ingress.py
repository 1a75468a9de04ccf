"""The images route before a scripted engine: shapes, headers, every error, limits, disconnects, logs."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx2
import pytest

from cat_cluster import errors
from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore
from serve.calls import Accepted, Event, Failed, Finished, ImageCall
from serve.http.access import Access
from serve.settings import ServeSettings
from tests.support.ingress_server import (
    PATH,
    Live,
    ScriptedEngine,
    ask,
    assert_refused,
    draw,
    events_of,
    listening,
    only,
    picture,
    scope,
    until,
)


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def live(engine: ScriptedEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    settings = ServeSettings(base="base", images_per_key=12, max_body_bytes=8192)
    registry = Registry(LocalStore(tmp_path_factory.mktemp("storage")))
    with listening(only(engine), registry, settings, Access(settings)) as live:
        yield live


@pytest.fixture
def http(live: Live) -> Iterator[httpx2.Client]:
    with live.http() as client:
        yield client


def test_images_come_in_openais_shape_and_in_order(http: httpx2.Client, engine: ScriptedEngine) -> None:
    response = ask(http, model="cup@latest", n=3, seed=7, size="16x16", response_format="b64_json")
    assert response.status_code == 200
    body = response.json()
    assert [item["seed"] for item in body["data"]] == [7, 8, 9]
    assert [base64.b64decode(item["b64_json"]) for item in body["data"]] == [picture(shade=i) for i in range(3)]
    assert body["data"][0]["revised_prompt"] is None
    assert body["data"][0]["facts"] == {"rows": 2}
    assert body["model"] == response.headers["x-cat-model"] == "cup@r-0123456789ab"
    assert body["size"] == "16x16"
    assert body["output_format"] == "png"
    assert body["cat"] == {"request_id": response.headers["x-request-id"], "drift": "ok", "note": None}
    assert response.headers["x-cat-drift"] == "ok"
    assert abs(body["created"] - time.time()) < 60
    call = engine.calls[0]
    assert (call.model, call.count, call.seed, call.size) == ("cup@latest", 3, 7, (16, 16))


@pytest.mark.parametrize("fields", [{}, {"model": None}, {"model": "base"}])
def test_the_base_is_what_no_model_names(http: httpx2.Client, engine: ScriptedEngine, fields: dict[str, Any]) -> None:
    assert ask(http, **fields).json()["model"] == "base"
    assert engine.calls[0].model is None


def test_defaults_nulls_and_openais_other_parameters(http: httpx2.Client, engine: ScriptedEngine) -> None:
    ignored = {"quality": "hd", "style": "vivid", "background": "auto", "moderation": "low", "user": "someone"}
    optional = dict.fromkeys(["n", "size", "seed", "sampler", "strength", "stream", "output_format", "negative_prompt"])
    first = ask(http, **ignored, **optional, output_compression=50).json()
    second = ask(http).json()
    assert first["data"][0]["seed"] != second["data"][0]["seed"]  # drawn at random, and told
    call = engine.calls[0]
    assert (call.steps, call.guidance, call.sampler, call.strength, call.previews) == (25, 4.0, "ddim", 1.0, 0)
    assert call.deadline_s == 120.0


def test_the_clients_request_id_is_kept_if_it_is_sane(http: httpx2.Client, engine: ScriptedEngine) -> None:
    given = http.post(PATH, json={"prompt": "a"}, headers={"x-request-id": "my-request.1"})
    assert given.headers["x-request-id"] == engine.calls[0].request_id == "my-request.1"
    odd = http.post(PATH, json={"prompt": "a"}, headers={"x-request-id": "a b" * 40})
    assert odd.headers["x-request-id"].startswith("req-")


def test_events_are_openais(http: httpx2.Client) -> None:
    response = ask(http, n=2, stream=True, partial_images=2, progress=True, seed=3, model="cup")
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-cat-model"] == "cup@r-0123456789ab"
    events = events_of(response)
    kinds = [kind.removeprefix("image_generation.") for kind, _ in events]
    assert kinds == ["partial_image", "partial_image", "progress"] * 2 + ["completed"] * 2
    assert all(kind == data["type"] for kind, data in events)
    partial, completed = events[1][1], events[-1][1]
    assert (partial["partial_image_index"], partial["index"], partial["size"]) == (1, 0, "8x8")
    assert base64.b64decode(completed["b64_json"]) == picture(shade=0)
    assert (completed["index"], completed["seed"], completed["model"]) == (0, 3, "cup@r-0123456789ab")
    assert completed["usage"]["total_tokens"] == 0


def test_previews_and_progress_are_for_streams(http: httpx2.Client, engine: ScriptedEngine) -> None:
    ask(http, partial_images=3, progress=True)
    assert (engine.calls[0].previews, engine.calls[0].progress) == (0, False)


FAILURES = [
    ("SpecError", 400, "invalid_value"),
    ("RegistryError", 400, "invalid_reference"),
    ("AdapterNotFoundError", 404, "model_not_found"),
    ("QuarantinedError", 409, "model_quarantined"),
    ("AdapterMismatchError", 422, "model_mismatch"),
    ("AdapterFormatError", 422, "model_damaged"),
    ("CancelledRequestError", 499, "request_cancelled"),
    ("BaseModelError", 500, "internal_error"),
    ("KeyError", 500, "internal_error"),
    ("StoreError", 503, "store_unavailable"),
    ("ObjectNotFoundError", 503, "store_unavailable"),
    ("OverloadedError", 503, "overloaded"),
    ("EngineStoppedError", 503, "engine_stopped"),
    ("DeadlineError", 504, "deadline_exceeded"),
]


@pytest.mark.parametrize(("kind", "status", "code"), FAILURES)
@pytest.mark.parametrize("stream", [False, True])
def test_every_kind_of_failure_has_its_answer(
    http: httpx2.Client, engine: ScriptedEngine, kind: str, status: int, code: str, stream: bool
) -> None:
    async def fail(call: ImageCall) -> AsyncIterator[Event]:
        yield Failed(kind, "what to do", 7.5)

    engine.script = fail
    response = ask(http, stream=stream)
    error = assert_refused(response, status, code, "model" if code.startswith("model_") else None)
    hidden = code in ("internal_error", "store_unavailable")
    assert ("what to do" in error["message"]) != hidden
    assert ("retry-after" in response.headers) == (status == 503)
    if kind == "OverloadedError":
        assert response.headers["retry-after"] == "8"


@pytest.mark.parametrize(("kind", "status", "code"), FAILURES)
def test_an_error_after_the_start_is_the_last_event(
    http: httpx2.Client, engine: ScriptedEngine, kind: str, status: int, code: str
) -> None:
    async def fail(call: ImageCall) -> AsyncIterator[Event]:
        yield Accepted("base")
        yield Finished(0, 0, picture())
        yield Failed(kind, "what to do")

    engine.script = fail
    name, data = events_of(ask(http, stream=True, n=2))[-1]
    assert (name, data["error"]["code"]) == ("error", code)
    assert ask(http, n=2).status_code == status


def test_errors_raised_by_a_client_are_answered_alike(http: httpx2.Client, engine: ScriptedEngine) -> None:
    async def fail(call: ImageCall) -> AsyncIterator[Event]:
        raise errors.OverloadedError("full", 2.0) if call.count == 1 else ZeroDivisionError("secret")
        yield

    engine.script = fail
    assert_refused(ask(http), 503, "overloaded")
    response = ask(http, n=2)
    assert_refused(response, 500, "internal_error")
    assert "secret" not in response.text


def test_an_engine_that_stops_short_is_an_error(http: httpx2.Client, engine: ScriptedEngine) -> None:
    async def stop(call: ImageCall) -> AsyncIterator[Event]:
        yield Accepted("base")
        yield Finished(0, 0, picture())

    engine.script = stop
    assert_refused(ask(http, n=2), 503, "engine_stopped")


def waiting(seconds: float = 60.0) -> Callable[[ImageCall], AsyncIterator[Event]]:
    async def wait(call: ImageCall) -> AsyncIterator[Event]:
        yield Accepted("base")
        await asyncio.sleep(seconds)
        yield Finished(0, 0, picture())

    return wait


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_the_work(live: Live, engine: ScriptedEngine, stream: bool) -> None:
    engine.script = waiting()
    with live.http() as http, pytest.raises(httpx2.TimeoutException):  # noqa: PT012
        http.timeout = httpx2.Timeout(0.5)
        with http.stream("POST", PATH, json={"prompt": "a", "stream": stream}) as response:
            response.read()
    until(lambda: len(engine.closed) == 1)
    engine.script = draw
    with live.http() as http:
        assert ask(http, n=10).status_code == 200  # and its images no longer count


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_cancels_the_task_ends_the_work(live: Live, engine: ScriptedEngine, stream: bool) -> None:
    """As Ray Serve does: no http.disconnect is ever received."""
    engine.script = waiting()

    async def call() -> None:
        body = json.dumps({"prompt": "a", "stream": stream}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            return messages.pop() if messages else await asyncio.Event().wait()

        async def send(message: Any) -> None: ...

        task = asyncio.create_task(live.app(scope("POST", PATH), receive, send))
        while not engine.calls:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(engine.closed) == 1

    live.call(call())


def test_an_engine_that_hangs_is_given_up(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.http.image_routes.GRACE_S", 0.2)
    engine, settings = ScriptedEngine(waiting()), ServeSettings(base="base", deadline_s=0.3)
    with (
        listening(only(engine), Registry(LocalStore(tmp_path)), settings, Access(settings)) as live,
        live.http() as http,
    ):
        assert_refused(ask(http), 504, "deadline_exceeded")
        assert events_of(ask(http, stream=True))[-1][1]["error"]["code"] == "deadline_exceeded"
    assert len(engine.closed) == 2


def test_big_pictures_do_not_hold_up_the_loop(live: Live, engine: ScriptedEngine) -> None:
    big = picture() + bytes(1_500_000)  # as a viewer sees it: bytes after the end of a PNG are not looked at

    async def paint(call: ImageCall) -> AsyncIterator[Event]:
        yield Accepted("base")
        for index in range(call.count):
            yield Finished(index, index, big)

    engine.script = paint
    waits: list[float] = []

    async def beat(stop: threading.Event) -> None:
        while not stop.is_set():
            before = time.perf_counter()
            await asyncio.sleep(0.005)
            waits.append(time.perf_counter() - before)

    stop = threading.Event()
    beating = asyncio.run_coroutine_threadsafe(beat(stop), live.loop)
    with live.http() as http:
        assert len(ask(http, n=10).json()["data"]) == 10
    stop.set()
    beating.result(10)
    assert sorted(waits)[-2] < 0.25  # tens of ms where this machine is idle; JSON of it all at once takes many more


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


def test_a_client_that_goes_while_it_sends(live: Live, engine: ScriptedEngine) -> None:
    async def call() -> int:
        messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": b'{"pro', "more_body": True}]
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return messages.pop()

        async def send(message: Any) -> None:
            sent.append(message)

        await live.app(scope("POST", PATH), receive, send)
        return int(sent[0]["status"])

    assert live.call(call()) == 499
    assert not engine.calls
