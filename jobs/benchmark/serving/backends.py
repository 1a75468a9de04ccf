"""The backends that are compared, each in a process of its own: idle threads of one would slow the others down.

OpenMP counts the threads of a process: with more of them than cores it lets them sleep between operations, and many
small operations, such as PEFT's, then take twice as long. One at a time is called, so that turns are side by side.
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


class Backend(Protocol):
    """An object whose methods are called by name, in its own process or here."""

    def __enter__(self) -> Backend:
        """Open it."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close it."""

    def get(self, method: str, *arguments: Any) -> Any:
        """Return what a method returns."""

    def seconds(self, method: str, *arguments: Any) -> float:
        """Return how long a method takes; what it returns is dropped."""


class InThisProcess:
    """A backend in this process, for tests."""

    def __init__(self, make: Callable[..., AbstractContextManager[Any]], *arguments: Any) -> None:
        self._opened = make(*arguments)

    def __enter__(self) -> InThisProcess:
        self._backend = self._opened.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._opened.__exit__(kind, error, at)

    def get(self, method: str, *arguments: Any) -> Any:
        """Return what a method returns."""
        return getattr(self._backend, method)(*arguments)

    def seconds(self, method: str, *arguments: Any) -> float:
        """Return how long a method takes."""
        started = time.perf_counter()
        self.get(method, *arguments)
        return time.perf_counter() - started


class InOwnProcess:
    """A backend in a process of its own, with as many torch threads as this one; it idles between calls."""

    def __init__(self, make: Callable[..., AbstractContextManager[Any]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        given = (other, torch.get_num_threads(), make, arguments)
        self._process = context.Process(target=_run_backend, args=given, daemon=True)
        self._process.start()
        other.close()

    def __enter__(self) -> InOwnProcess:
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
        return self._call("get", method, arguments)

    def seconds(self, method: str, *arguments: Any) -> float:
        """Return how long a method takes there."""
        return float(self._call("seconds", method, arguments))

    def _call(self, *call: Any) -> Any:
        with suppress(OSError):  # of a process that has ended: the reply says so
            self._pipe.send(call)
        return self._reply()

    def _reply(self) -> Any:
        try:
            worked, value = self._pipe.recv()
        except (EOFError, OSError):
            raise CatClusterError("a backend's process has ended: see what it printed above") from None
        if not worked:
            raise CatClusterError(f"a backend failed:\n{value}")
        return value


def _run_backend(
    pipe: Connection, threads: int, make: Callable[..., AbstractContextManager[Any]], arguments: tuple[Any, ...]
) -> None:
    """Run in the other process: open the backend and call its methods until the pipe says to end."""
    torch.set_num_threads(threads)
    try:
        with InThisProcess(make, *arguments) as backend:
            pipe.send((True, None))
            while (call := pipe.recv()) is not None:
                kind, method, given = call
                pipe.send((True, getattr(backend, kind)(method, *given)))
    except Exception:
        pipe.send((False, traceback.format_exc()))
