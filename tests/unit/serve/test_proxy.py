"""Ray Serve's own responses in the API's form: before the application Ray's real proxy functions, as it calls them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from ray.serve._private.http_util import convert_object_to_asgi_messages, validate_http_proxy_callback_return
from ray.serve._private.utils import call_function_from_import_path as called

from serve.proxy import CALLBACK, ProxyGuard
from tests.support.ingress_server import scope

OURS = [(b"x-content-type-options", b"nosniff")]


def sent_by(app: Any, path: str = "/v1/models", headers: dict[bytes, bytes] | None = None) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        messages.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    request = scope("GET", path)
    request["headers"] += list((headers or {}).items())
    asyncio.run(ProxyGuard(app)(request, receive, send))
    return messages


def responding(status: int, headers: list[tuple[bytes, bytes]] | None = None) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in convert_object_to_asgi_messages("plain text", status_code=status, extra_headers=headers):
            await send(message)

    return app


def test_ray_serve_finds_it() -> None:
    (middleware,) = validate_http_proxy_callback_return(called(CALLBACK))
    assert middleware.cls is ProxyGuard


@pytest.mark.parametrize(
    ("status", "told", "code", "retry"),
    [
        (404, 503, "service_away", "10"),
        (503, 503, "overloaded", "1"),
        (500, 500, "internal_error", None),
        (408, 408, "internal_error", None),
    ],
)
def test_the_proxys_own_errors_have_the_apis_form(status: int, told: int, code: str, retry: str | None) -> None:
    start, *bodies = sent_by(responding(status))
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    assert start["status"] == told
    assert headers["content-type"] == "application/json"
    assert headers.get("retry-after") == retry
    error = json.loads(b"".join(one["body"] for one in bodies))["error"]
    assert error["code"] == code
    assert "plain text" not in error["message"]


@pytest.mark.parametrize("status", [200, 404, 500, 503])
def test_the_applications_responses_pass_as_they_are(status: int) -> None:
    start, *bodies = sent_by(responding(status, OURS))
    assert (start["status"], b"".join(one["body"] for one in bodies)) == (status, b"plain text")


def test_the_proxys_own_pages_and_successes_pass() -> None:
    assert sent_by(responding(503), "/-/healthz")[0]["status"] == 503
    assert sent_by(responding(200))[0]["status"] == 200


def test_headers_that_the_proxy_reads_are_sound() -> None:
    seen: dict[bytes, bytes] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.update(scope["headers"])

    odd = b"\xff\xfe"
    kept = {b"authorization": odd, b"x-other": odd}
    names = (b"x-request-id", b"serve_multiplexed_model_id", b"x-session-id", b"traceparent")
    sent_by(app, headers={**kept, **dict.fromkeys(names, odd)})
    assert {name: value for name, value in seen.items() if value == odd} == kept
    sent_by(app, headers={b"x-request-id": b"mine.1", b"traceparent": b"00-1-2-01"})
    assert seen[b"x-request-id"] == b"mine.1"
    assert seen[b"traceparent"] == b"00-1-2-01"
