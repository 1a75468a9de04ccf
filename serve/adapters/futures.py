"""Futures that threads hand each other, settled so that a cancelled one, or a shared error, does no harm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from cat_cluster.errors import CatClusterError

A = TypeVar("A")
B = TypeVar("B")
E = TypeVar("E", bound=BaseException)


def finished(value: A) -> Future[A]:
    """Return a future that has its value already."""
    future: Future[A] = Future()
    future.set_result(value)
    return future


def failed(error: BaseException) -> Future[Any]:
    """Return a future that has failed already."""
    future: Future[Any] = Future()
    fail(future, error)
    return future


def claim(future: Future[Any]) -> bool:
    """Say whether a future still wants its value; from then on it cannot be cancelled. Ask once."""
    return future.set_running_or_notify_cancel()


def bare(error: E) -> E:
    """Return one of our errors without its traceback, which keeps alive all that its frames held."""
    return copy.copy(error) if isinstance(error, CatClusterError) else error


def fail(future: Future[Any], error: BaseException) -> None:
    """Fail a claimed future with an error of its own: one that many threads raise grows with each."""
    future.set_exception(bare(error))


def then(source: Future[A], step: Callable[[A], Future[B]]) -> Future[B]:
    """Return the future of what `step` makes of the source's value; cancelling it cancels whichever of the two runs.

    `step` is called on the thread that settles the source, also when the result is not wanted any more.
    """
    result: Future[B] = Future()
    parts: list[Future[Any]] = [source]

    def cancel_parts(_: Future[B]) -> None:
        if result.cancelled():
            for part in parts:
                part.cancel()

    def settle(done: Future[B]) -> None:
        if done.cancelled():
            result.cancel()
        elif claim(result):
            error = done.exception()
            if error is None:
                result.set_result(done.result())
            else:
                fail(result, error)

    def go_on(done: Future[A]) -> None:
        try:
            second = step(done.result())
        except Exception as error:  # a cancelled source raises CancelledError, which `settle` passes on
            second = done if done.cancelled() else failed(error)  # type: ignore[assignment]
        parts.append(second)
        if result.cancelled():
            second.cancel()
        second.add_done_callback(settle)

    result.add_done_callback(cancel_parts)
    source.add_done_callback(go_on)
    return result
