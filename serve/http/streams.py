"""Long responses: cancelled when the client disconnects or the time is up, and streamed as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Generic, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cat_cluster.errors import CancelledRequestError, DeadlineError

GRACE_S = 10.0  # the engine keeps deadlines itself; this much later it is assumed to be dead

Item = TypeVar("Item")


@asynccontextmanager
async def cancelled_on_disconnect(receive: Receive, limit_s: float) -> AsyncIterator[None]:
    """Cancel the block when the client disconnects (CancelledRequestError) or the time is up (DeadlineError).

    The body must have been read. A server that cancels the whole task instead, as Ray Serve does, is left to do so.
    """
    task = asyncio.current_task()
    assert task is not None  # a coroutine always runs in one

    async def cancel_on_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.create_task(cancel_on_disconnect())
    try:
        async with asyncio.timeout(limit_s):
            yield
    except TimeoutError:
        raise DeadlineError(f"not done within {limit_s:g} s; ask for less, or try again later") from None
    except asyncio.CancelledError:
        if not watcher.done() or task.uncancel() > 0:
            raise  # the task was cancelled by somebody else too
        raise CancelledRequestError("the client has disconnected") from None
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher


class EventStream(Response, Generic[Item]):
    """Items as server-sent events; closes them, however the stream ends.

    encode: an item's event, made in a thread. failed: the last event of a stream that breaks.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        items: AsyncGenerator[Item, None],
        encode: Callable[[Item], bytes],
        failed: Callable[[Exception], bytes],
        *,
        limit_s: float,
        headers: dict[str, str],
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._items = items
        self._encode = encode
        self._failed = failed
        self._limit_s = limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end, fail, or the client disconnects."""

        async def push(chunk: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": chunk, "more_body": more})

        async with aclosing(self._items):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async with cancelled_on_disconnect(receive, self._limit_s), aclosing(self._items):
                    async for item in self._items:
                        await push(await asyncio.to_thread(self._encode, item))
            except Exception as error:
                await push(self._failed(error))
            await push(b"", more=False)
