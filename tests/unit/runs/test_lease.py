"""Leases: one holder at a time by no clock but the claimant's own; a dead holder is followed once, and fenced."""

from __future__ import annotations

import heapq
import os
import random
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_cluster.errors import StoreError, SupersededError
from cat_cluster.runs.lease import LeaseWatch
from cat_cluster.runs.progress import HEARTBEAT_SECONDS, MISSED_HEARTBEATS, RunProgress, RunState
from cat_cluster.runs.queue import enter
from cat_cluster.runs.run import Attempt, FencedStore, Run
from cat_cluster.store import LocalStore
from tests.support.counted_stores import CountingStore
from tests.support.queued_runs import record, small_job

RUN_ID = "run-0123456789ab"
LIMIT = HEARTBEAT_SECONDS * MISSED_HEARTBEATS


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(LocalStore(tmp_path), RUN_ID)
    enter(run, small_job(), owner="ann")
    return run


def claimed(watch: LeaseWatch) -> Attempt:
    attempt = watch.claim(RUN_ID)
    assert attempt is not None
    return attempt


def begin(attempt: Attempt, state: RunState = "running") -> None:
    """Write a record as the holder of an attempt does."""
    first = RunProgress.begin(RUN_ID, small_job(), state=state, attempt=attempt.number)
    FencedStore(attempt).put(attempt.run.progress_key(attempt.number), first.model_dump_json().encode())


def wait_in_silence(watch: LeaseWatch, clock: Clock, seconds: float = LIMIT) -> None:
    """Look at the run every second and see that it is held all the time but at the end."""
    for _ in range(int(seconds)):
        assert watch.look(RUN_ID) == "held"
        clock.seconds += 1


def test_a_run_that_waits_is_claimed_by_one_and_held_until_it_has_ended(run: Run) -> None:
    first, second = LeaseWatch(run.store), LeaseWatch(run.store)
    assert first.look(RUN_ID) == second.look(RUN_ID) == "free"
    attempt = claimed(first)
    assert attempt.number == 1
    assert first.look(RUN_ID) == second.look(RUN_ID) == "held", "its record still says that it waits"
    begin(attempt)
    assert first.claim(RUN_ID) is None
    assert second.claim(RUN_ID) is None
    begin(attempt, "failed")
    assert first.look(RUN_ID) == second.look(RUN_ID) == "ended"
    assert second.claim(RUN_ID) is None
    assert run.last_attempt() == 1
    enter(run, small_job(), owner="ann")
    assert claimed(second).number == 2
    assert first.look(RUN_ID) == "held"


def test_a_run_that_is_stopped_while_it_waits_has_ended(run: Run) -> None:
    record(run, 1, "stopped")
    assert LeaseWatch(run.store).look(RUN_ID) == "ended"


@pytest.mark.parametrize("has_begun", [True, False])
def test_a_holder_that_is_silent_for_a_minute_is_followed_once_and_writes_nothing_more(
    run: Run, has_begun: bool
) -> None:
    old = claimed(LeaseWatch(run.store))
    if has_begun:
        begin(old)
    clocks = [Clock(), Clock()]
    clocks[1].seconds = 1e9
    watches = [LeaseWatch(run.store, clock=clock) for clock in clocks]
    for watch, clock in zip(watches, clocks, strict=True):
        wait_in_silence(watch, clock)
        assert watch.look(RUN_ID) == "free"
    with ThreadPoolExecutor(2) as threads:
        attempts = list(threads.map(lambda watch: watch.claim(RUN_ID), watches))
    (new,) = [attempt for attempt in attempts if attempt is not None]
    assert new.number == run.last_attempt() == 2
    assert [watch.look(RUN_ID) for watch in watches] == ["held", "held"]
    for _ in range(2):
        with pytest.raises(SupersededError, match="another driver has taken over"):
            begin(old)
    begin(new)
    assert run.progress().attempt == 2


def test_one_that_was_slower_claims_nothing_later(run: Run) -> None:
    """Both have found the run free, and claim it."""
    watches = [LeaseWatch(run.store), LeaseWatch(run.store)]
    for watch in watches:
        assert watch.look(RUN_ID) == "free"
        watch.look = lambda run_id: "free"
    assert [watch.claim(RUN_ID) is not None for watch in watches] == [True, False]
    assert run.last_attempt() == 1


def test_no_clock_but_the_claimants_own_counts(run: Run) -> None:
    attempt = claimed(LeaseWatch(run.store))
    begin(attempt)
    key = run.progress_key(1)
    clock = Clock()
    stopped, watch = LeaseWatch(run.store, clock=Clock()), LeaseWatch(run.store, clock=clock)
    long_ago = run.progress().changed(updated="1970-01-01T00:00:00.000+00:00")
    for step in range(20):  # its machine's clock has stopped, long ago
        run.store.put(key, long_ago.with_adapter("cup", step=step).model_dump_json().encode())
        clock.seconds += HEARTBEAT_SECONDS - 1
        assert watch.look(RUN_ID) == stopped.look(RUN_ID) == "held"
    begin(attempt)
    for _ in range(200):
        assert stopped.look(RUN_ID) == "held"  # seconds do not pass
    run.store.put(key, run.progress().changed(updated="2999-01-01T00:00:00.000+00:00").model_dump_json().encode())
    wait_in_silence(watch, clock)
    assert watch.look(RUN_ID) == "free"


def test_an_outage_is_no_silence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = claimed(LeaseWatch(run.store))
    begin(attempt)
    clock = Clock()
    watch = LeaseWatch(run.store, clock=clock)
    wait_in_silence(watch, clock, HEARTBEAT_SECONDS)
    with monkeypatch.context() as outage:
        outage.setattr(LocalStore, "entries", lambda *_, **__: (_ for _ in ()).throw(StoreError("unreachable")))
        for _ in range(100):
            with pytest.raises(StoreError):
                watch.look(RUN_ID)
            clock.seconds += HEARTBEAT_SECONDS
    assert watch.claim(RUN_ID) is None, "nobody could write"
    clock.seconds += 5
    begin(attempt)
    wait_in_silence(watch, clock)
    assert watch.claim(RUN_ID) is not None


def test_a_service_goes_on_at_once_with_what_its_last_process_held_and_keeps_its_own(run: Run) -> None:
    clock = Clock()
    before = claimed(LeaseWatch(run.store, "north"))
    begin(before)
    assert LeaseWatch(run.store, "south").look(RUN_ID) == "held"
    assert LeaseWatch(run.store).look(RUN_ID) == "held"
    watch = LeaseWatch(run.store, "north", clock=clock)
    again = claimed(watch)
    assert again.number == 2
    claim = run.claim_of(2)
    assert claim is not None
    assert claim.service == "north"
    wait_in_silence(watch, clock, 3 * LIMIT)  # whatever keeps it, nobody else has claimed it
    run.claim()  # a driver outside the queue, by force
    assert watch.look(RUN_ID) == "held"
    begin(Attempt(run, 3))
    wait_in_silence(watch, clock)
    assert claimed(watch).number == 4


def test_the_claim_of_a_driver_without_a_service_is_nobodys(run: Run) -> None:
    begin(run.claim())
    assert LeaseWatch(run.store).look(RUN_ID) == "held"
    assert LeaseWatch(run.store, "north").look(RUN_ID) == "held"


def test_a_damaged_record_is_written_anew_by_the_next_holder(run: Run) -> None:
    run.store.put(run.progress_key(1), b"{")
    clock = Clock()
    watch = LeaseWatch(run.store, clock=clock)
    assert watch.look(RUN_ID) == "free"
    attempt = claimed(LeaseWatch(run.store))
    wait_in_silence(watch, clock)
    begin(claimed(watch))
    assert not attempt.is_current()
    assert run.progress().attempt == 2


def test_what_is_forgotten_begins_anew(run: Run) -> None:
    clock = Clock()
    watch = LeaseWatch(run.store, "north", clock=clock)
    begin(claimed(watch))
    watch.forget(RUN_ID)
    assert watch.look(RUN_ID) == "free", "of another process, as far as it knows"


def test_a_look_costs_two_listings_and_reads_only_what_has_changed(run: Run, tmp_path: Path) -> None:
    begin(claimed(LeaseWatch(run.store, "south")))
    store = CountingStore(tmp_path)
    watch = LeaseWatch(store, "north")
    for expected in ({"entries": 2, "get": 2}, {"entries": 2}, {"entries": 2}):
        store.forget()
        watch.look(RUN_ID)
        assert store.calls == expected
    begin(Attempt(run, 1))
    store.forget()
    watch.look(RUN_ID)
    assert store.calls == {"entries": 2, "get": 1}


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_whatever_lives_dies_and_looks_when_it_does_there_is_one_holder_and_every_death_is_noticed(seed: int) -> None:
    """Holders write every ten seconds for as long as they live, three claimants look when they happen to."""
    draw = random.Random(seed)
    sync, os.fsync = os.fsync, lambda _: None  # hundreds of writes
    try:
        with tempfile.TemporaryDirectory() as folder:
            _simulate(LocalStore(folder), draw)
    finally:
        os.fsync = sync


def _simulate(store: LocalStore, draw: random.Random) -> None:
    run = Run(store, RUN_ID)
    enter(run, small_job(), owner="ann")
    time = Clock()
    offsets = [draw.uniform(0, 1e6) for _ in range(3)]

    def started(index: int) -> LeaseWatch:
        return LeaseWatch(store, clock=lambda: time() + offsets[index])

    watches = [started(index) for index in range(3)]
    events: list[tuple[float, int, Attempt | None]] = [(draw.random(), index, None) for index in range(3)]
    heapq.heapify(events)
    holder: int | None = None  # which claimant
    died, dies, wrote = 0, 0.0, 0.0
    while died < 3:
        time.seconds, index, attempt = heapq.heappop(events)
        now = time.seconds
        assert not run.last_attempt() or now < dies + 3 * LIMIT, "nobody has noticed"
        if attempt is not None:  # the holder's turn to write
            if now < dies:
                begin(attempt)
                wrote = now
                heapq.heappush(events, (now + draw.uniform(0.5, HEARTBEAT_SECONDS), index, attempt))
            continue
        heapq.heappush(events, (now + draw.uniform(0.1, 2 * HEARTBEAT_SECONDS), index, None))
        if index == holder and now < dies:
            continue
        if index == holder:  # it starts again, as another process
            watches[index], holder = started(index), None
        attempt = watches[index].claim(RUN_ID)
        if attempt is not None:
            assert attempt.number == 1 or (now >= dies and now - wrote >= LIMIT), "two at once"
            died = attempt.number - 1
            holder, wrote, dies = index, now, now + draw.choice([1.0, 30.0, 200.0])
            heapq.heappush(events, (now + draw.uniform(0, HEARTBEAT_SECONDS), index, attempt))
