"""The queue: what enters it, once; what a submission that is cut off leaves; what it costs."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cat_cluster.errors import ObjectNotFoundError, RunError
from cat_cluster.runs.lease import LeaseWatch
from cat_cluster.runs.queue import QueueEntry, enter, read_entry
from cat_cluster.runs.queue_reader import QueueReader
from cat_cluster.runs.run import Run
from cat_cluster.store import LocalStore
from tests.support.counted_stores import CountingStore
from tests.support.queued_runs import NOON, entry_of, fill_queue, record, small_job

RUN_ID = "run-0123456789ab"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(LocalStore(tmp_path), RUN_ID)


def test_a_run_waits_with_all_that_decides_its_turn(run: Run) -> None:
    deadline = datetime(2026, 12, 24, 18, tzinfo=UTC)
    before = datetime.now(UTC)
    entry, is_new = enter(run, small_job(), owner="ann", priority=-3, deadline=deadline)
    assert is_new
    assert (entry.run_id, entry.name, entry.owner, entry.priority) == (RUN_ID, "spring", "ann", -3)
    assert (entry.deadline, entry.adapters) == (deadline, 2)
    assert before - timedelta(milliseconds=1) <= entry.submitted <= datetime.now(UTC)
    assert run.store.list("queue/") == [f"queue/{int(entry.submitted.timestamp() * 1000):013d}-{RUN_ID}.json"]
    assert read_entry(run.store, entry.key) == entry
    assert run.read_spec() == small_job()
    assert (run.progress().state, run.progress().attempt) == ("waiting", 1)


def test_keys_are_in_the_order_of_submission() -> None:
    times = [NOON, NOON + timedelta(milliseconds=1), NOON + timedelta(seconds=9), NOON + timedelta(days=9000)]
    keys = [entry_of(9 - number, submitted=at).key for number, at in enumerate(times)]
    assert keys == sorted(keys)
    assert {len(key) for key in keys} == {len("queue/0123456789012-run-0123456789ab.json")}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("owner", ""),
        ("owner", "o" * 101),
        ("priority", 101),
        ("priority", -101),
        ("priority", 0.5),
        ("deadline", datetime(2026, 12, 24)),
    ],
)
def test_a_bad_value_is_refused_by_its_field_and_nothing_is_stored(run: Run, field: str, value: Any) -> None:
    with pytest.raises(RunError, match=f"^{field}: "):
        enter(run, small_job(), **{"owner": "ann", field: value})
    assert run.store.list("") == []


def test_a_run_that_waits_or_is_worked_on_is_not_entered_twice(run: Run) -> None:
    first, _ = enter(run, small_job(), owner="ann", priority=5)
    for state in (None, "running"):
        if state is not None:
            record(run, run.claim().number, state)
        assert enter(run, small_job(), owner="bob") == (first, False)
    assert run.store.list("queue/") == [first.key]
    assert run.progress().state == "running"


def test_a_run_that_was_asked_to_stop_goes_on_when_it_is_submitted_again(run: Run) -> None:
    enter(run, small_job(), owner="ann")
    run.request_stop(1)
    assert run.asked_to_stop() == 1
    enter(run, small_job(), owner="ann")
    assert run.asked_to_stop() == 0


@pytest.mark.parametrize("state", ["done", "failed", "stopped"])
@pytest.mark.parametrize("was_claimed", [True, False])
@pytest.mark.parametrize("is_left", [True, False])
def test_a_run_that_has_ended_is_entered_anew(run: Run, state: Any, was_claimed: bool, is_left: bool) -> None:
    first, _ = enter(run, small_job(), owner="ann")
    if was_claimed:
        run.claim()
    record(run, 1, state)
    if not is_left:
        run.store.delete(first.key)
    time.sleep(0.002)  # a key names a millisecond
    again, is_new = enter(run, small_job(), owner="ann")
    assert is_new
    assert again.key > first.key
    assert (run.progress().state, run.progress().attempt) == ("waiting", 2 if was_claimed else 1)
    run.store.delete(first.key)  # by whoever worked on it, and comes to it only now
    assert enter(run, small_job(), owner="ann") == (again, False)


def test_a_run_that_a_driver_outside_the_queue_works_on_is_refused(run: Run) -> None:
    record(run, run.claim().number, "running")
    with pytest.raises(RunError, match=r"is running: attempt 1 on .* or wait until it has ended"):
        enter(run, small_job(), owner="ann")
    assert run.store.list("queue/") == []


def test_a_damaged_entry_or_note_of_it_gives_way(run: Run) -> None:
    first, _ = enter(run, small_job(), owner="ann")
    run.store.put(first.key, b"{")
    second, is_new = enter(run, small_job(), owner="ann")
    assert is_new
    for note in (b"{", b"[]", b'{"entry": 5}', b'{"entry": "queue/notes.txt"}'):
        run.store.put(run.key("queued.json"), note)
        assert enter(run, small_job(), owner="ann")[1], note
    assert run.store.exists(second.key)


def test_what_lies_under_a_wrong_key_is_no_entry(run: Run) -> None:
    entry, _ = enter(run, small_job(), owner="ann")
    other = entry_of(7)
    run.store.put(other.key, run.store.get(entry.key))
    with pytest.raises(RunError, match=f"it belongs under {entry.key}.*submit the run again"):
        read_entry(run.store, other.key)
    with pytest.raises(ObjectNotFoundError):
        read_entry(run.store, entry_of(8).key)
    with pytest.raises(RunError, match="no entry of the queue"):
        read_entry(run.store, "queue/notes.txt")


class KilledError(BaseException):
    """The process is gone."""


class MortalStore(LocalStore):
    """A folder whose process dies at its n-th change, before or after that is stored."""

    def __init__(self, folder: Path, dies_at: int, *, after: bool) -> None:
        super().__init__(folder)
        self.left, self.after = dies_at, after

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        self.left -= 1
        if self.left < 0 or (self.left == 0 and not self.after):
            raise KilledError
        super().put(key, data, if_absent=if_absent)
        if self.left == 0:
            raise KilledError


@pytest.mark.parametrize("was_run_before", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("dies_at", [1, 2, 3, 4])
def test_a_submission_that_is_cut_off_loses_no_entry_and_holds_up_no_other(
    tmp_path: Path, dies_at: int, after: bool, was_run_before: bool
) -> None:
    run = Run(LocalStore(tmp_path), RUN_ID)
    if was_run_before:
        old, _ = enter(run, small_job(name="winter"), owner="ann")
        record(run, run.claim().number, "failed")
        run.store.delete(old.key)
    with pytest.raises(KilledError):
        enter(Run(MortalStore(tmp_path, dies_at, after=after), RUN_ID), small_job(), owner="ann")
    reader = QueueReader(run.store)
    reader.refresh()
    was_entered = after and dies_at == 4
    assert len(reader.entries()) == was_entered
    entry, is_new = enter(run, small_job(), owner="ann")
    assert is_new != was_entered
    reader.refresh()
    assert reader.entries() == (entry,)
    assert run.store.list("queue/") == [entry.key]
    assert run.progress().state == "waiting"
    assert run.read_spec().name == "spring"


def test_however_many_submit_a_run_at_once_readers_see_it_once(run: Run) -> None:
    barrier = threading.Barrier(8)

    def submit(_: int) -> QueueEntry:
        barrier.wait()
        return enter(Run(LocalStore(Path(run.store.url.removeprefix("file://"))), RUN_ID), small_job(), owner="ann")[0]

    with ThreadPoolExecutor(8) as threads:
        entries = list(threads.map(submit, range(8)))
    reader = QueueReader(run.store)
    reader.refresh()
    assert len(reader.entries()) == 1
    assert {entry.key for entry in entries} == set(run.store.list("queue/"))
    assert enter(run, small_job(), owner="ann")[1] is False


def test_a_submission_that_was_held_up_leaves_the_record_of_who_has_begun(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_spec = Run.write_spec

    def held_up(self: Run, job: Any) -> None:
        monkeypatch.setattr(Run, "write_spec", write_spec)
        enter(run, small_job(), owner="bob")  # another submission, whose run is claimed and begun at once
        record(run, run.claim().number, "running")
        write_spec(self, job)

    monkeypatch.setattr(Run, "write_spec", held_up)
    enter(run, small_job(), owner="ann")
    assert (run.progress().state, run.progress().attempt) == ("running", 1)


def test_what_submitting_claiming_and_looking_cost_does_not_depend_on_how_many_wait(tmp_path: Path) -> None:
    def costs(waiting: int) -> list[Counter[str]]:
        folder = tmp_path / str(waiting)
        fill_queue(folder, map(entry_of, range(1, waiting + 1)))
        store = CountingStore(folder)
        reader = QueueReader(store)
        reader.refresh()
        assert len(reader.entries()) == waiting
        assert store.calls == {"entries": 1, "get": waiting}

        def cost_of(work: Any) -> Counter[str]:
            store.forget()
            work()
            return Counter(store.calls)

        run = Run(store, RUN_ID)
        return [
            cost_of(lambda: enter(run, small_job(), owner="ann")),
            cost_of(reader.refresh),
            cost_of(reader.refresh),
            cost_of(lambda: enter(run, small_job(), owner="ann")),
            cost_of(lambda: LeaseWatch(store, "north").claim(RUN_ID)),
            cost_of(lambda: reader.remove(reader.entries()[-1])),
        ]

    few, many = costs(3), costs(1000)
    assert few == many
    submitted, refreshed, nothing_new, again, claimed, removed = many
    assert refreshed == {"entries": 1, "get": 1}
    assert nothing_new == {"entries": 1}
    assert removed == {"delete": 1}
    assert [call.total() for call in (submitted, again, claimed)] == [10, 6, 5]
