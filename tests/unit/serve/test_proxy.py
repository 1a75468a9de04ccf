"""Ray Serve's own responses in the API's form: before the application Ray's real proxy functions, as it calls them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.http_util import convert_object_to_asgi_messages, validate_http_proxy_callback_return
from ray.serve._private.utils import call_function_from_import_path as called

from serve.proxy import CALLBACK, CALLBACK_VARIABLE, ProxyGuard
from tests.support.ingress_server import scope

OURS = [(b"x-content-type-options", b"nosniff")]


def sent_by(app: Any, path: str = "/v1/models") -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        messages.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    asyncio.run(ProxyGuard(app)(scope("GET", path), receive, send))
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


def passed_on(*headers: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """The headers that reach the proxy."""
    seen: list[tuple[bytes, bytes]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(scope["headers"])

    given = {**scope("GET", "/health"), "headers": list(headers)}
    asyncio.run(ProxyGuard(app)(given, None, None))  # type: ignore[arg-type]
    assert given["headers"] == list(headers)
    return seen


@pytest.mark.parametrize("value", [b"\xff\xfe", b"0.0001", b"?1", b""])
@pytest.mark.parametrize(
    "name",
    [
        b"serve_multiplexed_model_id",
        b"serve-multiplexed-model-id",
        b"X-Session-Id",
        b"x_session_id",
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
    ],
)
def test_no_client_steers_the_proxy(name: bytes, value: bytes) -> None:
    kept = [(b"host", b"127.0.0.1"), (b"authorization", b"Bearer key")]
    assert passed_on(kept[0], (name, value), kept[1]) == kept


@pytest.mark.parametrize("value", [b"\xff", b"a b", b"", b"a" * 65, b"<b>", b"caf\xc3\xa9", b"a\tb"])
def test_an_odd_request_id_is_as_none(value: bytes) -> None:
    assert passed_on((b"x-request-id", value), (b"X-Request-ID", value)) == []


def test_all_else_is_passed_on_unchanged() -> None:
    headers = [(b"x-request-id", b"my-request.1"), (b"x-other", b"\xff"), (b"traceparent", b"00-1-2-01")]
    assert passed_on(*headers) == headers
    assert passed_on((b"traceparent", b"\xff")) == []


def test_a_websocket_is_closed_before_it_reaches_the_proxy() -> None:
    reached, sent = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope)

    async def send(message: Any) -> None:
        sent.append(message)

    given = {**scope("GET", "/v1/models"), "type": "websocket"}
    asyncio.run(ProxyGuard(app)(given, None, send))  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["websocket.close"]
    assert reached == []


@pytest.mark.parametrize("path", ["k8s/base/service.yaml", "serve/config.yaml", "docs/serving.md"])
def test_whoever_starts_ray_is_told_of_it(path: str) -> None:
    text = (Path(__file__).parents[3] / path).read_text()
    assert CALLBACK in text
    assert CALLBACK_VARIABLE in text
