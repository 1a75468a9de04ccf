"""The queue of a training service: a run that is to be worked on has an entry in the store, the oldest first.

An entry is `queue/<13-digit ms>-<run id>.json`, and `runs/<run id>/queued.json` names the last one of a run. It stays
until the run has ended: then whoever worked on the run, or finds that it has ended, removes it. A later submission has
another key, so none is removed with it.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from cat_cluster.errors import ObjectExistsError, ObjectNotFoundError, RunError
from cat_cluster.runs.progress import RunProgress
from cat_cluster.runs.run import Run
from cat_cluster.spec.job import JobSpec
from cat_cluster.store import ObjectStore

QUEUE = "queue/"
LOWEST_PRIORITY, HIGHEST_PRIORITY = -100, 100

_KEY = re.compile(r"queue/([0-9]{13})-(run-[0-9a-f]{12})\.json")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


class QueueEntry(BaseModel):
    """A run in the queue, and what decides its turn.

    owner: whose share of the slots it takes; priority: -100 to 100, higher first; deadline: when its owner needs it;
    submitted: to the millisecond, by the clock of whoever submitted it; adapters: how many the run has.
    """

    model_config = ConfigDict(frozen=True)

    run_id: Annotated[str, Field(pattern=r"^run-[0-9a-f]{12}$")]
    name: str
    owner: Annotated[str, Field(min_length=1, max_length=100)]
    priority: Annotated[int, Field(ge=LOWEST_PRIORITY, le=HIGHEST_PRIORITY)] = 0
    deadline: AwareDatetime | None = None
    submitted: AwareDatetime
    adapters: PositiveInt

    @property
    def key(self) -> str:
        """The storage key of the entry; keys sort by the time of submission."""
        return f"{QUEUE}{(self.submitted - _EPOCH) // _MILLISECOND:013d}-{self.run_id}.json"


def enter(
    run: Run, job: JobSpec, *, owner: str, priority: int = 0, deadline: datetime | None = None
) -> tuple[QueueEntry, bool]:
    """Enter a run into the queue; return its entry, and False if that was there and stays as it is, True if it is new.

    job: the spec to store, with photos and storage where the service finds them. Costs a constant number of requests,
    however many runs wait. A run that has ended is entered anew, and work that is stored is not repeated. Raises
    RunError, which names the field, for a value out of bounds, and when a driver outside the queue is at work;
    StoreError.

    Spec and record are written first, then `queued.json`, the entry last. A submission that is cut off before its entry
    has entered nothing and holds up nothing, even if the run is said to wait: to submit again enters it, also where
    `queued.json` names an entry that is not there. Two submissions at the same moment may write an entry each; readers
    take the first of a run, and the other goes when the run is found to have ended.
    """
    entry = _checked_entry(run, job, owner, priority, deadline)
    attempt = run.last_attempt() + 1  # before looking: what is claimed from now on keeps its record
    previous = run.progress_or_none(damaged_ok=True)
    has_ended = previous is not None and previous.ended
    named = None if has_ended else _named_key(run)
    if named is not None:
        with suppress(ObjectNotFoundError, RunError):  # it is gone or damaged: the run is entered anew
            entry_there = read_entry(run.store, named)
            run.withdraw_stop()  # whoever submits it wants it to go on
            return entry_there, False
    if previous is not None:
        run.refuse_alive(previous, "wait until it has ended")
    run.write_spec(job)
    run.withdraw_stop()
    waiting = RunProgress.begin(run.run_id, job, state="waiting", attempt=attempt).model_dump_json().encode()
    with suppress(ObjectExistsError):
        # Nobody claimed the attempt of a run that was stopped while it waited.
        was_stopped = previous is not None and has_ended and previous.attempt == attempt
        run.store.put(run.progress_key(attempt), waiting, if_absent=not was_stopped)
    run.store.put(run.key("queued.json"), json.dumps({"entry": entry.key}).encode())
    run.store.put(entry.key, entry.model_dump_json().encode())
    return entry, True


def read_entry(store: ObjectStore, key: str) -> QueueEntry:
    """Return the entry under the key; ObjectNotFoundError if there is none, RunError if it is damaged, StoreError."""
    submitted_at(key)
    data = store.get(key)
    try:
        entry = QueueEntry.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(store, key, f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}") from None
    if entry.key != key:
        raise _damaged(store, key, f"it belongs under {entry.key}")
    return entry


def submitted_at(key: str) -> datetime:
    """Return when the run of a key was entered; RunError if the key is none of an entry."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise RunError(f"{key[:120]!r} is no entry of the queue, which are queue/<13 digits>-<run>.json; remove it")
    return _EPOCH + int(match[1]) * _MILLISECOND


def _checked_entry(run: Run, job: JobSpec, owner: str, priority: int, deadline: datetime | None) -> QueueEntry:
    now = (datetime.now(UTC) - _EPOCH) // _MILLISECOND * _MILLISECOND + _EPOCH
    try:
        return QueueEntry(
            run_id=run.run_id,
            name=job.name,
            owner=owner,
            priority=priority,
            deadline=deadline,
            submitted=now,
            adapters=len(job.adapters),
        )
    except ValidationError as error:
        lines = [f"{detail['loc'][0]}: {detail['input']!r}: {detail['msg']}" for detail in error.errors()]
        raise RunError("\n".join(lines)) from None


def _named_key(run: Run) -> str | None:
    """Return the key that `queued.json` names; None when there is none that can be read."""
    try:
        key = json.loads(run.store.get(run.key("queued.json")))["entry"]
        submitted_at(key)
        return str(key)
    except (ObjectNotFoundError, RunError, ValueError, KeyError, TypeError):
        return None


def _damaged(store: ObjectStore, key: str, reason: str) -> RunError:
    return RunError(
        f"{key} in storage {store.url} is no entry of the queue that this version can read ({reason}): remove it and "
        "submit the run again"
    )
