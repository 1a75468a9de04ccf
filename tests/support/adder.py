"""A backend for the serving benchmarks, in a file that a process of its own soon has loaded."""

from __future__ import annotations


class Adder:
    """A backend that sums."""

    def __init__(self, start: int) -> None:
        self._sum = start

    def __enter__(self) -> Adder:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def add(self, value: int) -> int:
        self._sum += value
        return self._sum
