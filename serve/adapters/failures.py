"""Errors remembered for a while, so that what failed is not tried again at once."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from cat_cluster.errors import CatClusterError

MOST_KEPT = 1024  # a flood of names must not fill the memory

K = TypeVar("K")


class Failures(Generic[K]):
    """The last MOST_KEPT errors by key, each until its time is over."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._errors: OrderedDict[K, tuple[CatClusterError, float]] = OrderedDict()

    def add(self, key: K, error: CatClusterError, seconds: float) -> None:
        """Remember an error. Kept and raised are copies: a traceback would keep alive all that its frames hold."""
        self._errors[key] = copy.copy(error), self._clock() + seconds
        self._errors.move_to_end(key)
        while len(self._errors) > MOST_KEPT:
            self._errors.popitem(last=False)

    def check(self, key: K) -> None:
        """Raise the error that is remembered of a key, if any."""
        error, until = self._errors.get(key, (None, 0.0))
        if error is not None and self._clock() < until:
            raise copy.copy(error)

    def forget(self, key: K) -> None:
        """Forget a key's error, if any."""
        self._errors.pop(key, None)

    def __len__(self) -> int:
        return len(self._errors)
