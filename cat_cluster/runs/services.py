"""What a training service tells of itself in the store: its groups of workers, who trains with whom, what waits.

`services/<name>.json` is written when somebody comes or goes, and as a heartbeat; a service that ends removes it.
"""

from __future__ import annotations

import re
import threading
import time
from contextlib import suppress
from datetime import datetime

from pydantic import BaseModel, ConfigDict, ValidationError

from cat_cluster.errors import ObjectNotFoundError, ObjectUnreadableError, SpecError, StoreError
from cat_cluster.runs.progress import HEARTBEAT_SECONDS, is_lost, silent_seconds, timestamp
from cat_cluster.store import ObjectStore

SERVICES = "services/"
WRITE_SECONDS = 2.0  # between two looks at what has changed

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class PlacedAdapter(_Record):
    """An adapter that trains or is measured, and the run that it is for. steps: that it takes in all."""

    run_id: str
    adapter: str
    steps: int


class GroupRecord(_Record):
    """A group of workers, whose adapters share each call of the U-Net.

    slots: adapters that it trains at once; base, resolution: of all of them, in pixels; None as long as it has none.
    """

    number: int
    slots: int
    base: str | None = None
    resolution: int | None = None
    adapters: tuple[PlacedAdapter, ...] = ()


class ServiceRecord(_Record):
    """A training service. started, updated: ISO 8601 in UTC, by its own clock; workers: of each group.

    measuring: adapters that are trained; waiting: adapters without a slot, in all runs of the queue.
    """

    name: str
    host: str
    started: str
    updated: str
    workers: int
    groups: tuple[GroupRecord, ...] = ()
    measuring: tuple[PlacedAdapter, ...] = ()
    waiting: int = 0

    def silent_seconds(self, now: datetime | None = None) -> float:
        """Return the seconds since it was last heard of; the clocks of two machines may differ."""
        return silent_seconds(self.updated, now)

    def is_alive(self, now: datetime | None = None) -> bool:
        """Say whether it was heard of within the last minute."""
        return not is_lost(self.silent_seconds(now))


def check_service_name(name: str) -> str:
    """Return the name if a service can have it, else raise SpecError."""
    if not _NAME.fullmatch(name):
        raise SpecError(f"--name {name[:80]!r}: give it 1 to 63 letters, digits, '.', '_' and '-', no sign first")
    return name


def read_services(store: ObjectStore) -> list[ServiceRecord]:
    """Return the services of a store by name, those too that ended without a word; damaged records are left out."""
    found = []
    for key in store.list(SERVICES):
        with suppress(ObjectNotFoundError, ObjectUnreadableError, ValidationError):  # it has ended, or is damaged
            found.append(ServiceRecord.model_validate_json(store.get(key)))
    return found


class ServiceWriter:
    """Keeps the record of a service in the store up to date, in a thread of its own. A context manager.

    A write that fails is repeated at the next turn and never stops training.
    """

    def __init__(self, store: ObjectStore, record: ServiceRecord, *, interval: float = WRITE_SECONDS) -> None:
        self._store, self._key = store, f"{SERVICES}{record.name}.json"
        self._record, self._interval = record, interval
        self._written: ServiceRecord | None = None
        self._written_at = 0.0
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="service-record", daemon=True)

    def show(self, groups: tuple[GroupRecord, ...], measuring: tuple[PlacedAdapter, ...], waiting: int) -> None:
        """Say who trains with whom now; costs no request here."""
        self._record = self._record.model_copy(update={"groups": groups, "measuring": measuring, "waiting": waiting})

    def __enter__(self) -> ServiceWriter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop writing, and remove the record where the store can be reached."""
        self._leaving.set()
        self._thread.join()
        with suppress(StoreError):
            self._store.delete(self._key)

    def _keep_writing(self) -> None:
        while True:
            record = self._record
            late = time.monotonic() - self._written_at >= HEARTBEAT_SECONDS - self._interval
            if late or record != self._written:
                with suppress(StoreError):
                    told = record.model_copy(update={"updated": timestamp()})
                    self._store.put(self._key, told.model_dump_json().encode())
                    self._written, self._written_at = record, time.monotonic()
            if self._leaving.wait(self._interval):
                return
