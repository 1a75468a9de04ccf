"""Reading the queue: what is new, whatever the clocks of submitters say, what has gone, what cannot be read."""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path

import pytest

from cat_cluster.errors import ObjectUnreadableError, StoreError
from cat_cluster.runs.queue import QueueEntry
from cat_cluster.runs.queue_reader import WHOLE_SECONDS, WINDOW_SECONDS, QueueReader
from tests.support.counted_stores import CountingStore
from tests.support.queued_runs import NOON, entry_of, fill_queue


class Times:
    """The reader's two clocks, which stand still."""

    def __init__(self) -> None:
        self.clock, self.now = 1000.0, NOON.timestamp()

    def pass_by(self, seconds: float) -> None:
        self.clock += seconds
        self.now += seconds


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(tmp_path)


@pytest.fixture
def times() -> Times:
    return Times()


@pytest.fixture
def reader(store: CountingStore, times: Times) -> QueueReader:
    return QueueReader(store, clock=lambda: times.clock, now=lambda: times.now)


def submit(store: CountingStore, number: int, at_seconds: float) -> QueueEntry:
    """Write an entry whose submitter's clock says so many seconds after NOON."""
    entry = entry_of(number, submitted=NOON + timedelta(seconds=at_seconds))
    fill_queue(store.folder, [entry])
    return entry


def test_entries_come_in_the_order_of_submission_and_are_read_once(store: CountingStore, reader: QueueReader) -> None:
    reader.refresh()
    assert reader.entries() == ()
    entries = [submit(store, 9 - number, number) for number in range(5)]
    reader.refresh()
    assert reader.entries() == tuple(entries)
    late = submit(store, 10, 2.5)
    reader.refresh()
    assert reader.entries() == (*entries[:3], late, *entries[3:])
    assert sorted(store.read) == sorted(entry.key for entry in (*entries, late))


@pytest.mark.parametrize("ahead", [0.0, 86400.0])
def test_an_entry_of_a_clock_that_is_behind_is_seen(
    store: CountingStore, reader: QueueReader, times: Times, ahead: float
) -> None:
    """One submitter's clock may be a day ahead of the reader's and of all others'."""
    first = submit(store, 1, ahead)
    reader.refresh()
    times.pass_by(1)
    near = submit(store, 2, 2 - WINDOW_SECONDS)
    far = submit(store, 3, -1 - WINDOW_SECONDS)
    reader.refresh()
    assert reader.entries() == (near, first)
    times.pass_by(WHOLE_SECONDS - 2)
    reader.refresh()
    assert reader.entries() == (near, first)
    times.pass_by(1)
    reader.refresh()
    assert reader.entries() == (far, near, first)
    assert len(store.read) == 3


def test_what_others_remove_goes(store: CountingStore, reader: QueueReader, times: Times) -> None:
    old, new, newest = submit(store, 1, -WINDOW_SECONDS - 9), submit(store, 2, -9), submit(store, 3, 0)
    reader.refresh()
    for entry in (old, new):
        store.delete(entry.key)
    times.pass_by(1)
    reader.refresh()
    assert reader.entries() == (old, newest)
    times.pass_by(WHOLE_SECONDS)
    reader.refresh()
    assert reader.entries() == (newest,)


def test_what_is_removed_here_goes_at_once(store: CountingStore, reader: QueueReader) -> None:
    first, second = submit(store, 1, 0), submit(store, 2, 1)
    reader.refresh()
    reader.remove(first)
    reader.remove(first)
    assert reader.entries() == (second,)
    assert store.list("queue/") == [second.key]


def test_of_two_entries_of_a_run_the_first_counts(store: CountingStore, reader: QueueReader) -> None:
    first, other, second = submit(store, 1, 0), submit(store, 2, 1), submit(store, 1, 2)
    reader.refresh()
    assert reader.entries() == (first, other)
    reader.remove(first)
    assert reader.entries() == (other, second)


def test_what_cannot_be_read_is_named_once_and_holds_up_no_other(
    store: CountingStore,
    reader: QueueReader,
    times: Times,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = [submit(store, number, number) for number in (1, 5)]
    damaged, strange, refused = entry_of(2), entry_of(3), submit(store, 4, 4)
    store.put(damaged.key, b'{"run_id": 2')
    store.put(strange.key, damaged.model_copy(update={"priority": 1000}).model_dump_json().encode())
    store.put("queue/notes.txt", b"")
    get = CountingStore.get

    def get_or_refuse(self: CountingStore, key: str) -> bytes:
        if key == refused.key:
            raise ObjectUnreadableError(f"{key} is not what was stored")
        return get(self, key)

    monkeypatch.setattr(CountingStore, "get", get_or_refuse)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            reader.refresh()
            times.pass_by(WHOLE_SECONDS)
    assert reader.entries() == tuple(good)
    named = [damaged.key, strange.key, refused.key, "queue/notes.txt"]
    assert sorted(named) == sorted(next(key for key in named if key in line) for line in caplog.messages)
    store.put(damaged.key, damaged.model_dump_json().encode())
    reader.refresh()
    assert reader.entries() == (damaged, *good)


def test_an_outage_loses_nothing(store: CountingStore, reader: QueueReader, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [submit(store, number, number) for number in range(1, 6)]
    get = CountingStore.get

    def fail(self: CountingStore, key: str) -> bytes:
        if key == entries[3].key:
            raise StoreError("unreachable")
        return get(self, key)

    with monkeypatch.context() as outage:
        outage.setattr(CountingStore, "get", fail)
        with pytest.raises(StoreError, match="unreachable"):
            reader.refresh()
    assert reader.entries() == tuple(entries[:3])
    reader.refresh()
    assert reader.entries() == tuple(entries)
    assert len(store.read) == 5


def test_an_entry_that_goes_while_it_is_read_is_none(
    store: CountingStore, reader: QueueReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = submit(store, 1, 0), submit(store, 2, 1)
    get = CountingStore.get

    def gone(self: CountingStore, key: str) -> bytes:
        store.delete(first.key)
        return get(self, key)

    monkeypatch.setattr(CountingStore, "get", gone)
    reader.refresh()
    assert reader.entries() == (second,)
