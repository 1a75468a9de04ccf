"""Records that were read before: they are kept in memory, within a bound, until their object is replaced."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

from cat_cluster.store.protocol import Entry

MOST_BYTES = 32 * 2**20  # as JSON: 6,000 adapters or so, which take five times as much in memory

Record = TypeVar("Record")


class KeptRecords(Generic[Record]):
    """Records by the entry they were read from; beyond `most` bytes the ones used longest ago go. Safe with threads.

    What is published never changes, but a revision that was deleted may be published again: an entry's version tells.
    """

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most = most
        self._size = 0
        self._kept: OrderedDict[str, tuple[str, Record, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, entry: Entry) -> Record | None:
        """Return what was kept of this entry, None if nothing was."""
        with self._lock:
            version, record, _ = self._kept.get(entry.key, (None, None, 0))
            if version != entry.version:
                return None
            self._kept.move_to_end(entry.key)
            return record

    def keep(self, entry: Entry, record: Record, size: int) -> None:
        """Keep a record of `size` bytes in the place of what was kept of its key."""
        with self._lock:
            self._size += size - self._kept.pop(entry.key, (None, None, 0))[2]
            self._kept[entry.key] = (entry.version, record, size)
            while self._size > self._most:
                self._size -= self._kept.popitem(last=False)[1][2]
