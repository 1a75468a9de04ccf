"""What probes found, kept in the store: one object per revision, hour and replica, so that replicas never collide."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from cat_cluster.errors import ObjectNotFoundError, ObjectUnreadableError, StoreError
from cat_cluster.spec.choices import ProbeVerdict
from cat_cluster.store.protocol import ObjectStore

Kind = Literal["canonical", "live"]
RunInThread = Callable[..., Awaitable[Any]]

MOST_RECORDS = 500  # of one revision, hour and replica: the newest
MOST_PAGES = 64  # hours and revisions whose records wait for a store that is away
_HOUR = "%Y%m%dT%H"
_log = logging.getLogger(__name__)


class ProbeRecord(BaseModel):
    """One probe. time: Unix seconds; pair: index of a canonical pair; reason: of any verdict but ok.

    expected: a canonical pair's recorded scores; detectors: the state of the token's drift monitor after a live probe.
    The prompt of a live probe is a user's and is not kept.
    """

    model_config = ConfigDict(frozen=True)

    time: float
    replica: str
    kind: Kind
    verdict: ProbeVerdict
    token: str | None = None
    pair: int | None = None
    scores: dict[str, float] | None = None
    expected: dict[str, float] | None = None
    reason: str | None = None
    detectors: dict[str, Any] | None = None


_RECORDS = TypeAdapter(list[ProbeRecord])


def read_history(
    store: ObjectStore, adapter_id: str, revision: str, hours: float, *, now: float | None = None
) -> list[ProbeRecord]:
    """Return the records of all replicas about a revision in the last `hours`, oldest first.

    Lists the revision's days in that time and nothing else; a damaged object is left out. Raises StoreError.
    """
    end = datetime.now(UTC) if now is None else datetime.fromtimestamp(now, UTC)
    start = end - timedelta(hours=hours)
    folder = f"probes/{adapter_id}/{revision}/"
    days = {start + timedelta(days=d) for d in range((end.date() - start.date()).days + 1)}
    keys = [key for day in sorted(days) for key in store.list(f"{folder}{day:%Y%m%d}")]
    first, last = f"{start:{_HOUR}}", f"{end:{_HOUR}}"
    records = [
        record
        for key in keys
        if first <= key.removeprefix(folder).partition("/")[0] <= last
        for record in _read(store, key)
    ]
    return sorted((record for record in records if record.time >= start.timestamp()), key=lambda record: record.time)


class ProbeLog:
    """One replica's records on their way to the store; what cannot be written is kept and tried again."""

    def __init__(self, store: ObjectStore, replica: str, run_in_thread: RunInThread = asyncio.to_thread) -> None:
        """`replica` names this replica's objects; no two that run at once may share it."""
        self.replica = re.sub(r"[^A-Za-z0-9_=@+-]", "-", replica)[:120] or "replica"
        self._store = store
        self._run_in_thread = run_in_thread
        self._pages: dict[str, list[ProbeRecord]] = {}
        self._joined: set[str] = set()  # pages that begin with what the store had
        self._unsaved: set[str] = set()
        self._writing = asyncio.Lock()

    async def resume(self, adapter_id: str, revision: str, now: float) -> list[ProbeRecord]:
        """Return what a replica of this name recorded in this hour and the last, and go on from there.

        A store that is away gives nothing, and is no error.
        """
        last, this = (self._key(adapter_id, revision, time) for time in (now - 3600.0, now))
        try:
            earlier = await self._run_in_thread(_read, self._store, last)
            await self._join(this)
        except StoreError as error:
            _log.warning("probe records of %s@%s cannot be read: %s", adapter_id, revision, error)
            return []
        return [*earlier, *self._pages[this]]

    async def append(self, adapter_id: str, revision: str, record: ProbeRecord) -> None:
        """Add a record and write its hour's object; a failed write is logged, and tried again with the next."""
        key = self._key(adapter_id, revision, record.time)
        self._pages[key] = [*self._pages.get(key, []), record][-MOST_RECORDS:]
        self._unsaved.add(key)
        async with self._writing:
            for waiting in sorted(self._unsaved):
                try:
                    await self._join(waiting)
                    self._unsaved.discard(waiting)
                    await self._run_in_thread(self._store.put, waiting, _document(self._pages[waiting]))
                except StoreError as error:
                    self._unsaved.add(waiting)
                    _log.warning("probe records %s cannot be written, kept for the next try: %s", waiting, error)
                    break
            self._forget(f"{datetime.fromtimestamp(record.time, UTC):{_HOUR}}")

    async def _join(self, key: str) -> None:
        """Put what the store has of a page before what was added here, once: after a restart it is continued."""
        if key in self._joined:
            return
        stored = await self._run_in_thread(_read, self._store, key)
        if key not in self._joined:  # it may have been, and written, meanwhile
            self._pages[key] = [*stored, *self._pages.get(key, [])][-MOST_RECORDS:]
            self._joined.add(key)

    def _forget(self, hour: str) -> None:
        """Let go of hours that are over and saved, and of the oldest where too many are not."""
        for key in [key for key in self._pages if f"/{hour}/" not in key and key not in self._unsaved]:
            del self._pages[key]
        for key in sorted(self._unsaved, key=lambda key: key.split("/")[3])[:-MOST_PAGES]:
            self._unsaved.discard(key)
            del self._pages[key]
        self._joined &= self._pages.keys()

    def _key(self, adapter_id: str, revision: str, time: float) -> str:
        return f"probes/{adapter_id}/{revision}/{datetime.fromtimestamp(time, UTC):{_HOUR}}/{self.replica}.json"


def _document(records: Sequence[ProbeRecord]) -> bytes:
    return json.dumps([record.model_dump(exclude_none=True) for record in records], separators=(",", ":")).encode()


def _read(store: ObjectStore, key: str) -> list[ProbeRecord]:
    try:
        return _RECORDS.validate_json(store.get(key))
    except ObjectNotFoundError:
        return []
    except (ValidationError, ObjectUnreadableError) as error:
        _log.warning("probe records %s are damaged: %s", key, error)
        return []
