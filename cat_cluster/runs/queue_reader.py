"""Reading the queue: a mirror of its entries, which costs one listing when nothing is new."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from cat_cluster.errors import ObjectNotFoundError, ObjectUnreadableError, RunError
from cat_cluster.runs.queue import QUEUE, QueueEntry, read_entry, submitted_at
from cat_cluster.store import ObjectStore
from cat_cluster.store.protocol import Entry

WINDOW_SECONDS = 600.0  # entries of submitters whose clocks are up to this much behind are seen at once
WHOLE_SECONDS = 300.0  # between two looks at the whole queue

_log = logging.getLogger(__name__)


class QueueReader:
    """The entries of a store's queue as they were at the last `refresh`; for one thread.

    A refresh lists the last WINDOW_SECONDS before the newest entry, or before the reader's own time if a submitter's
    clock is ahead of it, and reads what is new there. Every WHOLE_SECONDS it lists all: so entries from a clock that is
    further behind are found, and those go that others have removed. An entry that cannot be read is skipped, with one
    warning. clock: seconds that never go back; now: the seconds of Unix time.
    """

    def __init__(
        self, store: ObjectStore, *, clock: Callable[[], float] = time.monotonic, now: Callable[[], float] = time.time
    ) -> None:
        self.store = store
        self._clock, self._now = clock, now
        self._known: dict[str, tuple[str, QueueEntry | None]] = {}  # key -> version and, where it can be read, entry
        self._newest = 0.0  # Unix time
        self._listed_all_at = float("-inf")

    def refresh(self) -> None:
        """Bring the mirror up to date: one listing, and one read for each new entry.

        Raises StoreError when the store cannot be asked; what was read until then is kept.
        """
        started = self._clock()
        is_whole = started - self._listed_all_at >= WHOLE_SECONDS
        start = 0.0 if is_whole else max(0.0, min(self._newest, self._now()) - WINDOW_SECONDS)
        after = f"{QUEUE}{int(start * 1000):013d}"
        listed = set()
        for found in self.store.entries(QUEUE, after=after):
            listed.add(found.key)
            if self._known.get(found.key, ("",))[0] != found.version:
                self._read(found)
        for key in [key for key in self._known if key > after and key not in listed]:
            del self._known[key]
        if is_whole:
            self._listed_all_at = started

    def entries(self) -> tuple[QueueEntry, ...]:
        """Return one entry of each run, its first, in the order of submission."""
        entries: dict[str, QueueEntry] = {}
        for _, (_, entry) in sorted(self._known.items()):
            if entry is not None:
                entries.setdefault(entry.run_id, entry)
        return tuple(entries.values())

    def remove(self, entry: QueueEntry) -> None:
        """Remove the entry of a run that has ended from the queue; one that is not there is no error."""
        self.store.delete(entry.key)
        self._known.pop(entry.key, None)

    def _read(self, found: Entry) -> None:
        entry = None
        try:
            self._newest = max(self._newest, submitted_at(found.key).timestamp())
            entry = read_entry(self.store, found.key)
        except ObjectNotFoundError:
            return  # removed after it was listed
        except (RunError, ObjectUnreadableError) as error:
            _log.warning("%s", error)
        self._known[found.key] = (found.version, entry)
