"""What all routes share: the parts of the ingress, keys before anything else, and bodies read strictly."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import Depends
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from cat_cluster.errors import CancelledRequestError
from serve.calls import EngineClient
from serve.http.access import Access, Caller
from serve.http.http_errors import HttpError, http_error_of
from serve.http.registry_listing import RegistryListing
from serve.http.request_log import RequestEntry
from serve.http.served_sizes import ServedSizes
from serve.http.training.parts import TrainingParts
from serve.settings import ServeSettings

# It only describes the scheme; KeyedRoute checks the key, before a body is read.
bearer = HTTPBearer(auto_error=False, description="A key of CAT_API_KEYS; any, or none, where no keys are set.")


@dataclass(frozen=True)
class RouteParts:
    """The parts that routes use. engine: returns the client, which may be known only once the process runs."""

    engine: Callable[[], EngineClient]
    registry_listing: RegistryListing
    served_sizes: ServedSizes
    settings: ServeSettings
    access: Access
    exposition: Callable[[], bytes]
    training: TrainingParts


def ingress_of(request: Request) -> RouteParts:
    """Return the ingress that the app was built with."""
    return cast(RouteParts, request.app.state.ingress)


def request_entry(request: Request) -> RequestEntry:
    """Return the request's entry in the request log."""
    return cast(RequestEntry, request.state.entry)


def caller_of(request: Request) -> Caller:
    """Return who sent the request; only where the route is a KeyedRoute."""
    return cast(Caller, request.state.caller)


IngressDep = Annotated[RouteParts, Depends(ingress_of)]


class StrictRequest(Request):
    """A request whose body has a size limit and must be JSON, also by its content type; or is uploaded as it is."""

    _whole: bytes | None = None

    async def body(self) -> bytes:
        """Return the body, which has a time and a size: 408 and 413 beyond them, 415 when it is not JSON by its type.

        429 and 503 when too many are being read.
        """
        if self._whole is None:
            ingress = ingress_of(self)
            with ingress.access.body(caller_of(self)):
                limits = ingress.settings
                self._whole = await self._read(limits.max_body_bytes, limits.body_timeout_s, self._remedy())
            if self._whole and not _is_json(self.headers.get("content-type", "")):
                raise HttpError(415, "send the body as JSON, with Content-Type: application/json", "not_json")
        return self._whole

    def _remedy(self) -> str:
        return "shorten the prompt" if "/images/" in self.url.path else "ask for less at once"

    async def upload(self) -> bytes:
        """Return the body of an upload, of any content type; 408 and 413 beyond the limits of uploads."""
        limits = ingress_of(self).settings
        return await self._read(limits.max_upload_bytes, limits.upload_timeout_s, "send a smaller image")

    async def upload_into(self, take: Callable[[bytes], object], most: int) -> int:
        """Give `take` the body of an upload as it arrives, and return its bytes; 408 and 413 beyond the limits."""
        limit_s = ingress_of(self).settings.photos_timeout_s
        return await self._stream_into(take, most, limit_s, "send fewer or smaller photos")

    async def _read(self, most: int, limit_s: float, remedy: str) -> bytes:
        """Return the body as it is sent; remedy: for one that is too large."""
        chunks: list[bytes] = []
        await self._stream_into(chunks.append, most, limit_s, remedy)
        return b"".join(chunks)

    async def _stream_into(self, take: Callable[[bytes], object], most: int, limit_s: float, remedy: str) -> int:
        size = 0
        if _announced(self.headers.get("content-length", "")) > most:
            raise _too_large(most, remedy)
        try:
            async with asyncio.timeout(limit_s):
                async for chunk in self.stream():
                    size += len(chunk)
                    if size > most:
                        raise _too_large(most, remedy)
                    take(chunk)
        except TimeoutError:
            raise HttpError(
                408,
                f"the body did not arrive within {limit_s:g} s; send the request again",
                "body_timeout",
                headers={"Connection": "close"},  # nobody waits for the rest
            ) from None
        except ClientDisconnect:
            raise http_error_of(CancelledRequestError("the client has disconnected")) from None
        return size

    async def json(self) -> Any:
        """Return the body's value; 400 for NaN, a name twice, nesting without end, or anything that is not JSON."""
        try:
            return strict_json((await self.body()).decode())
        except RecursionError:
            raise HttpError(400, "the body is nested too deeply", "invalid_json") from None
        except ValueError as error:
            raise HttpError(400, f"the body is not JSON: {error}", "invalid_json") from None


class KeyedRoute(APIRoute):
    """A route that checks the key, and counts the request, before it reads anything else."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of a request."""
        handle = super().get_route_handler()

        async def keyed(request: Request) -> Response:
            access = ingress_of(request).access
            caller = access.authenticate(request.headers.get("authorization"))
            request.state.caller = caller
            request_entry(request).facts["key"] = caller.name
            access.admit(caller)
            if not request.url.path.isprintable() or "\n" in request.scope["path"]:
                raise HttpError(404, "no path has control characters in it", "not_found")  # Starlette drops a last one
            return await handle(StrictRequest(request.scope, request.receive))

        return keyed


def strict_json(text: str) -> Any:
    """Return the value of a JSON text; ValueError for NaN and for a name twice too, RecursionError when too deep."""
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_once_each)


def _announced(length: str) -> int:
    return int(length) if length.isascii() and length.isdecimal() and len(length) < 20 else 0


def _is_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "application/json"


def _too_large(most: int, remedy: str) -> HttpError:
    return HttpError(413, f"the body is larger than {most} bytes; {remedy}", "body_too_large")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(pairs)
    if len(named) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"it has {twice[:80]!r} twice")
    return named
