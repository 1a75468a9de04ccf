"""Writing the progress record of a run: few writes, a heartbeat, and an end to every record."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from cat_cluster.errors import CatClusterError, StoreError, SupersededError
from cat_cluster.runs.progress import HEARTBEAT_SECONDS, RunProgress, timestamp
from cat_cluster.runs.run import Attempt, FencedStore

WRITE_SECONDS = 2.0


class ProgressWriter:
    """Keeps the record of a running attempt in the store up to date. A context manager; threads may share it.

    Changes are written every `interval` seconds, a change of any state at once, and a heartbeat when nothing changes.
    A write that fails is repeated at the next turn and never stops training. Once another driver has taken over, the
    next call raises SupersededError. On exit a run without an end gets one: done or failed by its adapters, stopped
    by KeyboardInterrupt or SystemExit (which Ray raises on SIGTERM), failed by any other error.
    """

    def __init__(self, attempt: Attempt, progress: RunProgress, *, interval: float = WRITE_SECONDS) -> None:
        self._store = FencedStore(attempt)
        self._key = attempt.run.progress_key(attempt.number)
        self._progress = progress.changed(attempt=attempt.number)
        self._interval = interval
        self._changes, self._written = 1, 0  # how many were made, and how many of them are stored
        self._written_at = time.monotonic()
        self._superseded: SupersededError | None = None
        self._changing = threading.Lock()
        self._writing = threading.Lock()  # another lock, so that a change need not wait for a slow store
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="run-progress", daemon=True)

    @property
    def progress(self) -> RunProgress:
        """The newest record, which may not be stored yet."""
        return self._progress

    def update(self, **changes: Any) -> None:
        """Change fields of the run's record."""
        self._change(lambda progress: progress.changed(**changes))

    def adapter(self, adapter_id: str, **changes: Any) -> None:
        """Change fields of one adapter; KeyError if the run has no such adapter."""
        self._change(lambda progress: progress.with_adapter(adapter_id, **changes))

    def __enter__(self) -> ProgressWriter:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        self._thread.join()
        if error is None:
            self._refuse_superseded()
            self._end(self._progress.outcome(), permanent=self._progress.is_permanent())
        elif not isinstance(error, SupersededError):
            with suppress(StoreError, SupersededError):  # the first error is the one to report
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    self._end("stopped")
                elif isinstance(error, CatClusterError):
                    self._end("failed", str(error), permanent=error.permanent)
                else:
                    self._end("failed", f"{type(error).__name__}: {error}")

    def leave(self) -> RunProgress:
        """Write no more and end nothing: the run goes on elsewhere. Return the newest record."""
        self._leaving.set()
        self._thread.join()
        return self._progress

    def _end(self, state: str, reason: str | None = None, *, permanent: bool = False) -> None:
        if not self._progress.ended:
            self._progress = self._progress.changed(state=state, reason=reason, permanent=permanent)
        self._write()

    def _change(self, change: Callable[[RunProgress], RunProgress]) -> None:
        self._refuse_superseded()
        with self._changing:
            before, self._progress = self._progress, change(self._progress)
            self._changes += 1
        if _states(before) != _states(self._progress):
            with suppress(StoreError):
                self._write()

    def _keep_writing(self) -> None:
        while self._superseded is None and not self._leaving.wait(self._interval):
            late = time.monotonic() - self._written_at >= HEARTBEAT_SECONDS - self._interval
            if late or self._changes != self._written:
                with suppress(StoreError, SupersededError):
                    self._write()

    def _write(self) -> None:
        """Write the newest record. Raises StoreError; SupersededError also at every later call."""
        with self._writing:
            with self._changing:
                changes, progress = self._changes, self._progress
            try:
                self._store.put(self._key, progress.changed(updated=timestamp()).model_dump_json().encode())
            except SupersededError as error:
                self._superseded = error
                raise
            self._written, self._written_at = changes, time.monotonic()

    def _refuse_superseded(self) -> None:
        if self._superseded is not None:
            raise SupersededError(str(self._superseded))


def _states(progress: RunProgress) -> tuple[str, ...]:
    return (progress.state, *(adapter.state for adapter in progress.adapters))
