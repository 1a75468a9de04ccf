"""The request log: one line of JSON and two metrics for every request, and the handler of unexpected errors."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import traceback
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cat_cluster.errors import CancelledRequestError
from cat_cluster.telemetry import HTTP_REQUESTS, HTTP_SECONDS, Metrics
from serve.http.http_errors import KINDS, http_error_of
from serve.tracing import NO_SPAN, NO_TRACER, Span, Tracer

logger = logging.getLogger("cat_cluster.serve")

CLIENT_CLOSED = 499  # the client disconnected before its response
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TRACED = "/v1/"  # the start of paths that are traced: not probes of health, and not the page's files
_UNKNOWN_ROUTE = "/unknown"  # paths that a client makes up never become label values
ADDED_HEADERS = {  # to every response of the application
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",  # no other site's page embeds a picture
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; object-src 'none'",
}


@dataclass
class RequestEntry:
    """What is logged of one request. code: of the error, if any; facts: what its route adds (key, model, images).

    may_quote: prompts, and the messages of unexpected errors, which may hold one, may be logged.
    """

    request_id: str
    may_quote: bool = False
    status: int = CLIENT_CLOSED
    code: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    span: Span = NO_SPAN


class RequestLog:
    """ASGI middleware: request ids, security headers, the log, HTTP's metrics and the request's span.

    Errors that no handler knows end here, as 500 where the response has not started. proxy_adds_id: the server in front
    adds the request's own x-request-id to every response, as Ray Serve's proxy does, so it must not come twice.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        may_quote: bool,
        proxy_adds_id: bool = False,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self._app, self._tracer = app, tracer
        self._proxy_adds_id = proxy_adds_id
        self._metrics = metrics
        self._may_quote = may_quote

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, and log it when it has ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        entry = RequestEntry(_request_id(scope), self._may_quote)
        if scope["path"].startswith(_TRACED):
            entry.span = self._tracer.request(scope["method"], Headers(scope=scope))
        scope.setdefault("state", {})["entry"] = entry
        has_begun = False

        async def received() -> Message:
            try:
                return await receive()
            except Exception:  # Ray Serve's raises an error of its own where the client has gone
                return {"type": "http.disconnect"}

        async def sent(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                entry.status = message["status"]
                headers = MutableHeaders(scope=message)
                if not (self._proxy_adds_id and entry.request_id == _given_id(scope)):
                    headers["x-request-id"] = entry.request_id
                for name, value in ADDED_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, received, sent)
        except asyncio.CancelledError:
            entry.status, entry.code = CLIENT_CLOSED, KINDS[CancelledRequestError].code
            raise
        except Exception as error:
            log_unexpected(entry, error)
            # After its start a response can only be cut off, which the server does when it is left unfinished.
            if not has_begun:
                await http_error_of(error).response()(scope, receive, sent)
        finally:
            self._log(entry, scope, time.perf_counter() - began)

    def _log(self, entry: RequestEntry, scope: Scope, seconds: float) -> None:
        route = getattr(scope.get("route"), "path_format", _UNKNOWN_ROUTE)
        self._metrics.inc(HTTP_REQUESTS, route=route, code=str(entry.status))
        self._metrics.observe(HTTP_SECONDS, seconds, route=route)
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": entry.request_id,
            "method": scope["method"],
            "route": route,
            "status": entry.status,
            "ms": round(seconds * 1000, 1),
            **({} if entry.code is None else {"code": entry.code}),
            **entry.facts,
        }
        logger.info(json.dumps(line))
        _end_span(entry, scope["method"], route)


def _end_span(entry: RequestEntry, method: str, route: str) -> None:
    """End a request's span, which has what the log has of it, by OpenTelemetry's conventions for HTTP servers."""
    if entry.span is NO_SPAN:
        return
    entry.span.rename(f"{method} {route}")
    entry.span.set({"http.request.method": method, "http.route": route, "http.response.status_code": entry.status})
    entry.span.set({"cat.request_id": entry.request_id, **{f"cat.{name}": fact for name, fact in entry.facts.items()}})
    if entry.code is not None:
        entry.span.set({"error.type": entry.code})
        if not 400 <= entry.status < 500:  # those are the client's, and no failure of a server; a stream began as 200
            entry.span.fail(entry.code)
    entry.span.end()


def is_request_id(given: str) -> bool:
    """Say whether a client's x-request-id is taken over."""
    return _REQUEST_ID.fullmatch(given) is not None


def log_unexpected(entry: RequestEntry, error: BaseException) -> None:
    """Log an unexpected error, with the lines of code of its traceback."""
    entry.code = type(error).__name__
    trace = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    line = {"request_id": entry.request_id, "error": entry.code, "trace": trace}
    logger.error(json.dumps({**line, "message": str(error)} if entry.may_quote else line))


def _request_id(scope: Scope) -> str:
    given = _given_id(scope)
    return given if is_request_id(given) else f"req-{uuid.uuid4().hex}"


def _given_id(scope: Scope) -> str:
    return Headers(scope=scope).get("x-request-id", "")
