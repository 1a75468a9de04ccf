"""Ray tasks that are given up: interrupted at once, and ended by force where that takes too long."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import ray

CANCEL_SECONDS = 10.0  # that tasks have to end in when they are given up


class GivenUp:
    """Ends tasks by an interrupt, on which Ray Train stops its workers, and after CANCEL_SECONDS by force.

    Nobody waits for that: call `look` now and then, or `wait` at the end.
    """

    def __init__(self) -> None:
        self._until: dict[Any, float] = {}  # by the references of the tasks

    def add(self, tasks: Iterable[Any]) -> None:
        """Interrupt tasks."""
        for task in tasks:
            ray.cancel(task, recursive=False)
            self._until[task] = time.monotonic() + CANCEL_SECONDS

    def look(self, seconds: float = 0.0) -> None:
        """End by force those that have had their time; seconds: to wait until all have ended."""
        if not self._until:
            return
        ended, left = ray.wait(list(self._until), num_returns=len(self._until), timeout=seconds)
        late = [task for task in left if time.monotonic() >= self._until[task]]
        for task in late:
            ray.cancel(task, force=True)
        for task in [*ended, *late]:
            del self._until[task]

    def wait(self) -> None:
        """Return when all have ended, some of them by force."""
        if self._until:
            self.look(max(0.0, max(self._until.values()) - time.monotonic()))
