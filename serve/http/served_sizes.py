"""The image sizes that the engines serve, which an ingress, that knows no base model, asks them for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from cat_cluster.errors import EngineStoppedError, SpecError
from serve.calls import EngineClient

_KEPT_S = 60.0  # an ingress that is replaced later than its engines learns the new ones


class ServedSizes:
    """The sizes, asked for when they are needed and remembered for a minute, and longer while no engine responds."""

    def __init__(self, engine: Callable[[], EngineClient], clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self._sizes: tuple[tuple[int, int], ...] = ()
        self._until = float("-inf")

    async def choose(self, wanted: tuple[int, int] | None, wait_s: float) -> tuple[int, int]:
        """Return (width, height) of a size that is served; None: the base model's own. SpecError for any other.

        Where no size is known yet it waits for an engine, and starts one that sleeps; EngineStoppedError when there is
        none within `wait_s`.
        """
        if not self._sizes:
            self._remember(await self._engine().sizes(wait_s))
        elif self._clock() >= self._until:
            # The last ones known are better than none: the call itself waits for an engine, which checks its size.
            with suppress(EngineStoppedError):
                self._remember((await self._engine().status()).get("sizes", ()))
        if wanted is None:
            return self._sizes[0]
        if wanted not in self._sizes:
            offered = ", ".join(f"{width}x{height}" for width, height in self._sizes)
            raise SpecError(f"size: {wanted[0]}x{wanted[1]} is not served; choose one of {offered}")
        return wanted

    def _remember(self, sizes: Sequence[str]) -> None:
        if sizes:
            self._sizes = tuple(_sides(size) for size in sizes)
            self._until = self._clock() + _KEPT_S


def _sides(size: str) -> tuple[int, int]:
    width, _, height = size.partition("x")
    return int(width), int(height)
