"""The image sizes that the engines serve, which an ingress, that knows no base model, asks them for."""

from __future__ import annotations

import time
from collections.abc import Callable

from cat_cluster.errors import SpecError
from serve.calls import EngineClient

_KEPT_S = 60.0  # an ingress that is replaced later than its engines learns the new ones


class ServedSizes:
    """The sizes, asked for when they are needed and remembered for a minute."""

    def __init__(self, engine: Callable[[], EngineClient], clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self._sizes: tuple[tuple[int, int], ...] = ()
        self._until = float("-inf")

    async def choose(self, wanted: tuple[int, int] | None) -> tuple[int, int]:
        """Return (width, height) of a size that is served; None: the base model's own. SpecError for any other."""
        now = self._clock()
        if now >= self._until:
            status = await self._engine().status()
            self._sizes = tuple(_sides(size) for size in status["sizes"])
            self._until = now + _KEPT_S
        if wanted is None:
            return self._sizes[0]
        if wanted not in self._sizes:
            offered = ", ".join(f"{width}x{height}" for width, height in self._sizes)
            raise SpecError(f"size: {wanted[0]}x{wanted[1]} is not served; choose one of {offered}")
        return wanted


def _sides(size: str) -> tuple[int, int]:
    width, _, height = size.partition("x")
    return int(width), int(height)
