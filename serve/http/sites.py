"""Which hosts a request may name, and whose pages may send one: a browser reaches a loopback service for every site."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.http.http_errors import HttpError
from serve.http.request_log import RequestEntry
from serve.settings import split_origin

_SHOWN = 80  # characters of a header in a message


class SiteGuard:
    """ASGI middleware that refuses what another site's page sends through somebody's browser.

    loopback_only: refuse every Host that is not this machine. A page whose own host name is made to resolve to
    127.0.0.1 (DNS rebinding) is of the same origin as the service, and without keys only its Host tells.
    origins: those, besides the service's own, whose pages may send requests.
    """

    def __init__(self, app: ASGIApp, *, loopback_only: bool, origins: Sequence[str] = ()) -> None:
        self._app = app
        self._loopback_only = loopback_only
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or respond with 403."""
        error = None if scope["type"] != "http" else self._refusal(Headers(scope=scope))
        if error is None:
            await self._app(scope, receive, send)
            return
        entry: RequestEntry = scope["state"]["entry"]
        entry.code = error.code
        await error.response()(scope, receive, send)

    def _refusal(self, headers: Headers) -> HttpError | None:
        if self._loopback_only:
            foreign = next((host for host in headers.getlist("host") if not is_loopback(_name_of(host))), None)
            if foreign is not None:
                return HttpError(
                    403,
                    f"Host: {foreign[:_SHOWN]!r} is not this machine, and without API keys the service answers as "
                    "localhost alone: open it as http://localhost or http://127.0.0.1, have a proxy send that Host, "
                    "or set CAT_API_KEYS",
                    "foreign_host",
                )
        origin = next((item for item in headers.getlist("origin") if item not in self._origins), None)
        if origin is None or _is_own(headers):
            return None
        return HttpError(
            403,
            f"Origin: {origin[:_SHOWN]!r} is another site than this service's Host, and its pages may not use it: add "
            "it to cors_origins where the service runs, or have a proxy pass the Host on as it came",
            "foreign_origin",
        )


def is_own_page(request: Request) -> bool:
    """Say whether a request comes from this service's own page, or from no page at all."""
    return request.headers.get("sec-fetch-site", "none") in ("none", "same-origin") and _is_own(request.headers)


def is_loopback(host: str) -> bool:
    """Say whether a host name or address, an IPv6 address with or without its brackets, is this machine's loopback."""
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _is_own(headers: Headers) -> bool:
    """Say whether each Origin names the host and the port of Host; the scheme may be that of a proxy in front."""
    host = headers.get("host", "")
    for origin in headers.getlist("origin"):
        parts = split_origin(origin)
        if parts is None or parts != split_origin(f"{parts[0]}://{host}"):
            return False
    return True


def _name_of(host: str) -> str:
    """Return the name or the address in a Host header; "" for text that cannot be one."""
    try:
        parts = urlsplit(f"//{host}")
        return (parts.hostname or "") if parts.netloc == host and parts.username is None else ""
    except ValueError:
        return ""
