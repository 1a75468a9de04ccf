"""The image sizes that the engines serve, which an ingress, that knows no base model, asks them for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from cat_cluster.errors import EngineStoppedError
from serve.calls import EngineClient
from serve.denoise.sizes import Pixels, chosen_size, parse_size

_KEPT_S = 60.0  # an ingress that is replaced later than its engines learns the new ones


class ServedSizes:
    """The sizes, asked for when they are needed and remembered for a minute, and longer while no engine responds."""

    def __init__(self, engine: Callable[[], EngineClient], clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self._sizes: tuple[Pixels, ...] = ()
        self._until = float("-inf")

    async def choose(self, wanted: Pixels | None, wait_s: float) -> Pixels:
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
        return chosen_size(wanted, self._sizes)

    def _remember(self, sizes: Sequence[str]) -> None:
        if sizes:
            self._sizes = tuple(parse_size(size) for size in sizes)
            self._until = self._clock() + _KEPT_S
