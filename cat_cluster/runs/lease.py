"""Who may work on a run of the queue: its last attempt is the lease, which its holder renews with each record."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import ValidationError

from cat_cluster.errors import ObjectNotFoundError
from cat_cluster.runs.progress import HEARTBEAT_SECONDS, RunProgress, is_lost
from cat_cluster.runs.run import Attempt, Run
from cat_cluster.store import ObjectStore

Holding = Literal["free", "held", "ended"]

_RECORD = re.compile(r".*/progress/([0-9]{8})\.json")


@dataclass(frozen=True)
class _Seen:
    """A run as it was found, and for how many seconds neither its last attempt nor its record have changed since.

    record: its key and version; is_of_predecessor: this service's process before this one made the last attempt.
    """

    attempt: int
    record: tuple[str, str] | None
    has_ended: bool
    is_of_predecessor: bool
    looked: float
    silent: float = 0.0


class LeaseWatch:
    """Claims runs for one process of a training service, each for one holder at a time.

    A run that waits is free. One that was claimed is held until its record says that it has ended, or until neither its
    last attempt nor its record have changed for MISSED_HEARTBEATS * HEARTBEAT_SECONDS: a holder writes its first record
    and each later one in less. Those seconds are counted by this process's own clock, whatever other machines' clocks
    say. Between two looks at a run at most HEARTBEAT_SECONDS count, so look more often than that: after an outage of
    the store, or of this process, every holder has time to be heard of.

    service: the name of the service, of which one process runs at a time. What its predecessor had claimed is free at
    once; what this process has claimed stays its own until somebody else claims it. clock: seconds that never go back.
    For one thread.
    """

    def __init__(
        self, store: ObjectStore, service: str | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.store, self.service = store, service
        self._clock = clock
        self._seen: dict[str, _Seen] = {}
        self._own: dict[str, int] = {}  # the last attempt of each run that was claimed here

    def look(self, run_id: str) -> Holding:
        """Say whether the run is free, held, or has ended, so that its entry can go. Raises RunError, StoreError."""
        seen = self._seen[run_id] = self._look(run_id)
        # A record that is older than the last attempt says nothing of it; one that is younger waits for the next.
        match = None if seen.record is None else _RECORD.fullmatch(seen.record[0])
        record_of = 0 if match is None else int(match[1])
        if seen.has_ended and record_of >= seen.attempt:
            return "ended"
        if record_of > seen.attempt or seen.attempt == 0:
            return "free"
        if self._own.get(run_id) == seen.attempt:
            return "held"
        return "free" if is_lost(seen.silent) or seen.is_of_predecessor else "held"

    def claim(self, run_id: str) -> Attempt | None:
        """Claim the run's next attempt if it is free; None when it is not, or somebody else was faster.

        Raises RunError, StoreError.
        """
        if self.look(run_id) != "free":
            return None
        attempt = Run(self.store, run_id).claim_after(self._seen[run_id].attempt, self.service)
        if attempt is not None:
            self._own[run_id] = attempt.number
        return attempt

    def forget(self, run_id: str) -> None:
        """Keep nothing of a run that has left the queue."""
        self._seen.pop(run_id, None)
        self._own.pop(run_id, None)

    def _look(self, run_id: str) -> _Seen:
        run, before = Run(self.store, run_id), self._seen.get(run_id)
        attempt, listed = run.last_attempt(), run.listed_record()
        record = None if listed is None else (listed.key, listed.version)
        now = self._clock()
        if before is not None and (before.attempt, before.record) == (attempt, record):
            return replace(before, looked=now, silent=before.silent + min(now - before.looked, HEARTBEAT_SECONDS))
        if before is not None and before.attempt == attempt:
            is_of_predecessor = before.is_of_predecessor
        else:
            is_of_predecessor = self._is_of_predecessor(run, attempt)
        return _Seen(attempt, record, record is not None and self._has_ended(record[0]), is_of_predecessor, now)

    def _is_of_predecessor(self, run: Run, attempt: int) -> bool:
        if self.service is None or attempt == 0:
            return False
        claim = run.claim_of(attempt)
        return claim is not None and claim.service == self.service

    def _has_ended(self, record: str) -> bool:
        with suppress(ObjectNotFoundError, ValidationError):  # a damaged one is written anew by the next holder
            return RunProgress.model_validate_json(self.store.get(record)).ended
        return False
