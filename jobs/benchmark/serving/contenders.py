"""Contenders in processes of their own: threads of one, even idle, slow the others in one process down.

OpenMP counts the threads of a process: with more of them than cores it lets them sleep between operations, and many
small operations, such as PEFT's, then take twice as long. One at a time is asked, so that turns are side by side.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Protocol

import torch

from cat_cluster.errors import CatClusterError


class Contender(Protocol):
    """An object whose methods are called by name, in its own process or here."""

    def __enter__(self) -> Contender:
        """Open it."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close it."""

    def get(self, method: str, *arguments: Any) -> Any:
        """Return what a method returns."""

    def seconds(self, method: str, *arguments: Any) -> float:
        """Return how long a method takes; what it returns is dropped."""


class Here:
    """A contender in this process, for tests."""

    def __init__(self, make: Callable[..., AbstractContextManager[Any]], *arguments: Any) -> None:
        self._opened = make(*arguments)

    def __enter__(self) -> Here:
        self._thing = self._opened.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._opened.__exit__(kind, error, at)

    def get(self, method: str, *arguments: Any) -> Any:
        """Return what a method returns."""
        return getattr(self._thing, method)(*arguments)

    def seconds(self, method: str, *arguments: Any) -> float:
        """Return how long a method takes."""
        started = time.perf_counter()
        self.get(method, *arguments)
        return time.perf_counter() - started


class Apart:
    """A contender in a process of its own, with as many torch threads as this one; it idles between calls."""

    def __init__(self, make: Callable[..., AbstractContextManager[Any]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        given = (other, torch.get_num_threads(), make, arguments)
        self._process = context.Process(target=_answer, args=given, daemon=True)
        self._process.start()
        other.close()

    def __enter__(self) -> Apart:
        self._reply()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process.is_alive():
            with suppress(OSError):
                self._pipe.send(None)
        self._process.join(60.0)
        self._process.kill()

    def get(self, method: str, *arguments: Any) -> Any:
        """Return what a method returns; CatClusterError with its traceback when it fails."""
        return self._ask("get", method, arguments)

    def seconds(self, method: str, *arguments: Any) -> float:
        """Return how long a method takes there."""
        return float(self._ask("seconds", method, arguments))

    def _ask(self, *question: Any) -> Any:
        with suppress(OSError):  # of a process that has ended: the reply says so
            self._pipe.send(question)
        return self._reply()

    def _reply(self) -> Any:
        try:
            worked, value = self._pipe.recv()
        except (EOFError, OSError):
            raise CatClusterError("a contender's process has ended: see what it printed above") from None
        if not worked:
            raise CatClusterError(f"a contender failed:\n{value}")
        return value


def _answer(
    pipe: Connection, threads: int, make: Callable[..., AbstractContextManager[Any]], arguments: tuple[Any, ...]
) -> None:
    """Run in the other process: open the contender and answer until told to end."""
    torch.set_num_threads(threads)
    try:
        with Here(make, *arguments) as contender:
            pipe.send((True, None))
            while (asked := pipe.recv()) is not None:
                kind, method, given = asked
                pipe.send((True, getattr(contender, kind)(method, *given)))
    except Exception:
        pipe.send((False, traceback.format_exc()))
