"""Single flight: one task for all callers that want the same thing at once."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, Generic, TypeVar

from cat_cluster.errors import CatClusterError, EngineStoppedError

K = TypeVar("K")
T = TypeVar("T")
R = TypeVar("R")


class SharedTask(Generic[T]):
    """A task that several callers wait for: the last one that is cancelled cancels it, unless a thread works for it."""

    def __init__(self, make: Callable[[SharedTask[T]], Coroutine[Any, Any, T]]) -> None:
        self.waiting = 0
        self._in_thread = False
        self.task = asyncio.create_task(make(self))

    async def wait(self) -> T:
        """Return the task's result or raise its error; EngineStoppedError when the task was cancelled by `close`."""
        self.waiting += 1
        try:
            await asyncio.wait({self.task})
        finally:
            self.waiting -= 1
            if not self.waiting and not self._in_thread:
                self.task.cancel()
        return outcome(self.task)

    async def in_thread(self, threads: Executor, function: Callable[..., R], *arguments: Any) -> R:
        """Call a function in a thread, for the task; until it returns no caller cancels the task."""
        self._in_thread = True
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, function, *arguments)
        finally:
            self._in_thread = False

    @property
    def ending(self) -> bool:
        """Whether it is too late to wait for it: nobody does, and the task is done or was cancelled."""
        return not self.waiting and (self.task.done() or self.task.cancelling() > 0)


class SharedTasks(Generic[K, T]):
    """Shared tasks by key; each stays until it is done and every caller that waits for it has its result."""

    def __init__(self) -> None:
        self._tasks: dict[K, SharedTask[T]] = {}

    async def wait(self, key: K, make: Callable[[SharedTask[T]], Coroutine[Any, Any, T]]) -> T:
        """Wait for the key's task, which is made unless there is one; see SharedTask.wait."""
        shared = self._tasks.get(key)
        if shared is None or shared.ending:
            shared = self._tasks[key] = SharedTask(make)
            shared.task.add_done_callback(lambda _, made=shared: self._forget(key, made))  # type: ignore[misc]
        try:
            return await shared.wait()
        finally:
            self._forget(key, shared)

    def wanted(self) -> list[K]:
        """Return the keys that callers wait for."""
        return [key for key, shared in self._tasks.items() if shared.waiting]

    def close(self) -> None:
        """Cancel every task; callers that wait get EngineStoppedError."""
        for shared in list(self._tasks.values()):
            shared.task.cancel()

    def _forget(self, key: K, shared: SharedTask[T]) -> None:
        if shared.task.done() and not shared.waiting:
            log_nothing(shared.task)
            if self._tasks.get(key) is shared:
                del self._tasks[key]


def log_nothing(done: asyncio.Task[Any]) -> None:
    """Retrieve a task's error, which asyncio logs otherwise: every caller may have been cancelled before."""
    if not done.cancelled():
        done.exception()


def outcome(done: asyncio.Task[T]) -> T:
    """Return a task's result or raise its error; EngineStoppedError when it was cancelled.

    One of our errors is raised as a copy: with its own traceback the frame of a caller, which holds the task, would
    hang from the task, a cycle that stays until a full collection.
    """
    if done.cancelled():
        raise stopping()
    error = done.exception()
    if isinstance(error, CatClusterError):
        raise copy.copy(error) from error
    return done.result()


def stopping() -> EngineStoppedError:
    """Return the error of callers that wait for an adapter when the engine stops."""
    return EngineStoppedError("the engine is stopping: try again, another replica will take the request")
