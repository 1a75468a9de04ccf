"""What was read a moment ago: one read for all who ask for the same within a few seconds."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Values by key, read in a thread when asked for, and kept for `ttl_s` seconds after that; errors too.

    The keys asked for last stay, `most` of them. Used on one event loop.
    """

    def __init__(
        self, read: Callable[[K], V], threads: Executor, *, ttl_s: float, most: int, clock: Callable[[], float]
    ) -> None:
        self._read = read
        self._threads = threads
        self._ttl_s = ttl_s
        self._most = most
        self._clock = clock
        self._asked: OrderedDict[K, asyncio.Future[V]] = OrderedDict()
        self._read_at: dict[K, float] = {}

    async def get(self, key: K) -> V:
        """Return the key's value, or raise what reading it raised."""
        asked, now = self._asked.get(key), self._clock()
        if asked is None or (asked.done() and now - self._read_at.get(key, now) >= self._ttl_s):
            asked = self._start(key)
        self._asked.move_to_end(key)
        return await asyncio.shield(asked)  # cancelling one caller does not cancel the read

    def _start(self, key: K) -> asyncio.Future[V]:
        self._read_at.pop(key, None)
        asked = self._asked[key] = asyncio.get_running_loop().run_in_executor(self._threads, self._read, key)
        asked.add_done_callback(lambda done: self._finish(key, done))
        if len(self._asked) > self._most:
            oldest, _ = self._asked.popitem(last=False)
            self._read_at.pop(oldest, None)
        return asked

    def _finish(self, key: K, done: asyncio.Future[V]) -> None:
        if not done.cancelled():
            done.exception()  # every caller may have gone, and asyncio logs an error that nobody retrieved
        if self._asked.get(key) is done:
            self._read_at[key] = self._clock()
