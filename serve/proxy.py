"""What stands before Ray Serve's own HTTP proxy: its errors take the API's form, and no client's header steers it.

Ray Serve's proxies call `middlewares` where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it (CALLBACK).
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.http.http_errors import INTERNAL, SERVER, HttpError
from serve.http.request_log import ADDED_HEADERS, is_request_id

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "serve.proxy.middlewares"

_OWN_PATHS = "/-/"  # Ray Serve's health and routes
# With `_` for `-`, as the proxy compares them: which replica, which deadline, and to go on without a client.
_STEERING = frozenset(
    {
        b"serve_multiplexed_model_id",
        b"x_session_id",
        b"x_request_timeout_seconds",
        b"x_request_disconnect_disabled",
    }
)
_MARK = next(iter(ADDED_HEADERS))
_RESTART_S = 10.0  # about what an application takes to start


def middlewares() -> list[Middleware]:
    """Return what Ray Serve's proxy puts around its requests."""
    return [Middleware(ProxyGuard)]


class ProxyGuard:
    """ASGI middleware: headers that the proxy obeys, or stumbles over, do not reach it; its own errors are replaced.

    The proxy responds by itself, in plain text, while the application starts or has ended (404), is full or has no
    replica (503), and when something breaks (500). Clients retry a 503 with Retry-After, and nobody retries a 404.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; a WebSocket is closed, for no route has one, and the proxy would obey its headers."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http" or scope["path"].startswith(_OWN_PATHS):
            await self._app(scope, receive, send)
            return
        scope = {**scope, "headers": [header for header in scope["headers"] if _may_pass(*header)]}
        is_replaced = False

        async def sent(message: Message) -> None:
            nonlocal is_replaced
            if message["type"] == "http.response.start":
                is_replaced = message["status"] >= 400 and _MARK not in Headers(raw=message["headers"])
                if is_replaced:
                    await _error_of(message["status"]).response()(scope, receive, send)
            if not is_replaced:
                await send(message)

        await self._app(scope, receive, sent)


def _may_pass(name: bytes, value: bytes) -> bool:
    """Say whether a request's header goes on to the proxy, which decodes some and responds to odd bytes with a 500."""
    name = name.lower()
    if name == b"x-request-id":
        return is_request_id(value.decode("latin-1"))  # which decodes all
    if name == b"traceparent":
        return value.isascii()
    return name.isascii() and name.replace(b"-", b"_") not in _STEERING


def _error_of(status: int) -> HttpError:
    """Return the error for a status of the proxy's own."""
    if status == 404:
        message = "the service is starting or stopping: try again in a moment"
        return HttpError(503, message, "service_away", type=SERVER, retry_after=_RESTART_S)
    if status == 503:
        return HttpError(503, "the service is full: try again", "overloaded", type=SERVER, retry_after=1.0)
    return HttpError(status, str(INTERNAL.message), INTERNAL.code, type=SERVER)
