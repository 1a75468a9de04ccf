"""Trying again what may pass: exponential backoff with full jitter, within a budget of seconds."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

FIRST_DELAY = 0.1  # seconds; the bound of the random delay doubles with each try
LONGEST_DELAY = 5.0

_Result = TypeVar("_Result")


def with_retries(
    call: Callable[[], _Result],
    *,
    passing: Callable[[Exception], bool],
    budget: float,
    on_retry: Callable[[Exception], None],
) -> _Result:
    """Return what `call` returns, calling it again after each error that `passing` says may go away.

    No try begins later than `budget` seconds after the first failure; then the last error is raised, as any other is
    at once. The delay is uniform between zero and its bound, so that many clients do not come back together.
    """
    deadline: float | None = None
    bound = FIRST_DELAY
    while True:
        try:
            return call()
        except Exception as error:
            if not passing(error):
                raise
            deadline = time.monotonic() + budget if deadline is None else deadline
            delay = random.uniform(0, bound)
            if time.monotonic() + delay > deadline:
                raise
            on_retry(error)
        time.sleep(delay)
        bound = min(2 * bound, LONGEST_DELAY)
