"""The images route before a scripted engine: shapes, headers, events and every error."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from cat_cluster import errors
from serve.calls import Accepted, Event, Failed, Finished, ImageCall, Refused, Verdict
from tests.support.ingress_server import PATH, ScriptedEngine, ask, assert_refused, events_of, picture
from tests.support.services import stack


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
    assert (call.adapters, call.count, call.seed, call.size) == (stack("cup@latest"), 3, 7, (16, 16))


def test_seed_zero_is_a_seed_and_not_a_wish_for_any(http: httpx2.Client, engine: ScriptedEngine) -> None:
    assert ask(http, seed=0).json()["data"][0]["seed"] == 0
    assert engine.calls[0].seed == 0


@pytest.mark.parametrize("fields", [{}, {"model": None}, {"model": "base"}])
def test_the_base_is_what_no_model_names(http: httpx2.Client, engine: ScriptedEngine, fields: dict[str, Any]) -> None:
    assert ask(http, **fields).json()["model"] == "base"
    assert engine.calls[0].adapters == ()


def test_defaults_nulls_and_openais_other_parameters(http: httpx2.Client, engine: ScriptedEngine) -> None:
    ignored = {"quality": "hd", "style": "vivid", "background": "auto", "moderation": "low", "user": "someone"}
    optional = dict.fromkeys(["n", "size", "seed", "sampler", "strength", "stream", "output_format", "negative_prompt"])
    first = ask(http, **ignored, **optional, output_compression=50).json()
    second = ask(http).json()
    assert first["data"][0]["seed"] != second["data"][0]["seed"]  # drawn at random, and told
    call = engine.calls[0]
    assert (call.steps, call.guidance, call.sampler, call.adapters, call.previews) == (25, 4.0, "ddim", (), 0)
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
    ("NotFiniteError", 422, "image_not_finite"),
    ("CancelledRequestError", 499, "request_cancelled"),
    ("BaseModelError", 500, "internal_error"),
    ("KeyError", 500, "internal_error"),
    ("StoreError", 503, "store_unavailable"),
    ("ObjectNotFoundError", 422, "model_damaged"),
    ("ObjectUnreadableError", 422, "model_damaged"),
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
    hidden = code in ("internal_error", "store_unavailable") or kind.startswith("Object")  # it names the store
    assert ("what to do" in error["message"]) != hidden
    assert ("retry-after" in response.headers) == (status in (503, 504))
    if kind in ("OverloadedError", "DeadlineError"):
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


@pytest.mark.parametrize(
    ("drawn", "kept_back", "worst"),
    [
        ([False], [], "passed"),
        ([None, False], [], "unchecked"),
        ([None, True], [], "flagged"),
        ([False], [errors.UncheckedImageError], "unchecked"),
        ([None], [errors.FlaggedImageError], "flagged"),
        ([False], [errors.UncheckedImageError, errors.FlaggedImageError], "flagged"),
    ],
)
def test_the_safety_header_is_the_worst_of_all_images(
    http: httpx2.Client,
    engine: ScriptedEngine,
    drawn: list[bool | None],
    kept_back: list[type[errors.CatClusterError]],
    worst: str,
) -> None:
    async def checked(call: ImageCall) -> AsyncIterator[Event]:
        yield Accepted("base")
        for index, error in enumerate(kept_back):
            yield Refused(index, index, Failed.of(error("kept back")))
        for index, flagged in enumerate(drawn, len(kept_back)):
            yield Finished(index, index, picture(), safety=Verdict(flagged))

    engine.script = checked
    response = ask(http, n=len(drawn) + len(kept_back))
    assert response.status_code == 200, response.text
    assert response.headers["x-cat-safety"] == worst
