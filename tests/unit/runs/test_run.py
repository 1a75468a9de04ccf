"""A run in the store: its identity, races for its attempts, superseded drivers, its record, requests to stop."""

from __future__ import annotations

import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cat_cluster.errors import CheckpointError, RunError, StoreError, SupersededError
from cat_cluster.runs import progress_writer
from cat_cluster.runs.listing import list_runs
from cat_cluster.runs.progress import HEARTBEAT_SECONDS, MISSED_HEARTBEATS, RunProgress, is_alive
from cat_cluster.runs.progress_writer import ProgressWriter
from cat_cluster.runs.run import Attempt, FencedStore, Run, open_fenced_store, run_id_of
from cat_cluster.spec.job import JobSpec
from cat_cluster.store import LocalStore
from cat_cluster.training.loss_curves import ConceptLoss
from tests.support.queued_runs import small_job

RUN_ID = "run-0123456789ab"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(LocalStore(tmp_path), RUN_ID)


def begun(attempt: Attempt) -> RunProgress:
    return RunProgress.begin(RUN_ID, small_job(), state="running", attempt=attempt.number)


def test_a_run_is_what_it_makes() -> None:
    digests = [["a", "b"], ["c"]]
    run_id = run_id_of(small_job(), digests)
    assert Run(LocalStore("unused"), run_id).run_id == run_id
    same: list[dict[str, Any]] = [
        {"name": "autumn"},
        {"storage": "s3://elsewhere"},
        {"cluster": {"workers": 4, "zero_stage": 3}},
        {"monitoring": {"samples_every": 5}},
    ]
    assert {run_id_of(small_job(**changes), digests) for changes in same} == {run_id}
    moved = JobSpec.model_validate_json(small_job().model_dump_json().replace("photos", "s3://b/inputs/1.zip"))
    assert run_id_of(moved, digests) == run_id
    turned = small_job().model_copy(update={"adapters": small_job().adapters[::-1]})
    assert run_id_of(turned, digests[::-1]) == run_id
    others = [
        run_id_of(small_job(training={"steps": 10}), digests),
        run_id_of(small_job(), [["a", "b"], ["d"]]),
        run_id_of(small_job(), [["b", "a"], ["c"]]),
        run_id_of(turned, digests),
    ]
    assert len({run_id, *others}) == 5


@pytest.mark.parametrize("run_id", ["run-1", "run-0123456789AB", "../run-0123456789ab", ""])
def test_an_id_that_is_none_never_becomes_a_key(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(RunError, match="is not a run"):
        Run(LocalStore(tmp_path), run_id)


def test_the_spec_comes_back_and_gives_way_to_an_equal_run(run: Run) -> None:
    with pytest.raises(RunError, match="has no run"):
        run.read_spec()
    run.write_spec(small_job())
    run.write_spec(small_job())
    assert run.read_spec() == small_job()
    assert run.read_spec().resolved()[1].digest() == small_job().resolved()[1].digest()
    run.write_spec(small_job(cluster={"workers": 2}))
    assert run.read_spec().cluster.workers == 2
    run.store.put(run.key("spec.json"), b'{"name": "spring"}')
    with pytest.raises(RunError, match=r"damaged or of another version .*submit the job again"):
        run.read_spec()


def test_each_attempt_has_one_driver_however_many_race(run: Run) -> None:
    barrier = threading.Barrier(8)

    def claim(worker: int) -> list[tuple[int, str]]:
        barrier.wait()
        mine = [Run(run.store, RUN_ID).claim(job=f"job-{worker}-{turn}") for turn in range(5)]
        return [(attempt.number, f"job-{worker}-{turn}") for turn, attempt in enumerate(mine)]

    with ThreadPoolExecutor(8) as threads:
        claims = dict(pair for pairs in threads.map(claim, range(8)) for pair in pairs)
    assert sorted(claims) == list(range(1, 41))
    assert run.last_attempt() == 40
    for number, job in claims.items():
        found = run.claim_of(number)
        assert found is not None
        assert found.job == job


def test_a_damaged_claim_is_somebody_elses(run: Run) -> None:
    run.store.put(run.key("attempts/00000001.json"), b"{")
    run.store.put(run.key("attempts/notes.txt"), b"")
    assert run.claim().number == 2
    assert run.claim_of(1) is None


def test_a_superseded_driver_writes_nothing_more(run: Run, tmp_path: Path) -> None:
    old = run.claim()
    store = FencedStore(old)
    store.put("checkpoint", b"old")
    store.check_access()
    workers = [pickle.loads(pickle.dumps(store)), open_fenced_store(run.store.url, RUN_ID, old.number)]
    assert all(worker.url == run.store.url and worker.get("checkpoint") == b"old" for worker in workers)
    new = run.claim()
    assert not old.is_current()
    assert new.is_current()
    for stale in (store, *workers):
        for write in (
            partial(stale.put, "checkpoint", b"stale"),
            partial(stale.put, "manifest", b"stale", if_absent=True),
            partial(stale.delete, "checkpoint"),
            stale.check_access,
        ):
            with pytest.raises(SupersededError, match=f"another driver has taken over run {RUN_ID}.*attempt 1"):
                write()
        assert stale.get("checkpoint") == b"old"
        assert stale.exists("checkpoint")
        assert stale.size("checkpoint") == 3
        assert stale.list("check") == ["checkpoint"]
    FencedStore(new).put("checkpoint", b"new")
    assert run.store.get("checkpoint") == b"new"
    assert not run.store.exists("manifest")


@pytest.mark.parametrize("state", ["stopped", "failed", "done"])
def test_what_is_to_be_published_is_refused_once_the_run_is_said_to_have_ended(run: Run, state: Any) -> None:
    attempt = run.claim()
    store = pickle.loads(pickle.dumps(open_fenced_store(run.store.url, RUN_ID, 1, until_ended=True)))
    run.write_progress(begun(attempt))
    store.put("manifest", b"1")
    run.write_progress(begun(attempt).changed(state=state))
    for write in (partial(store.put, "manifest", b"2"), partial(store.delete, "manifest"), store.check_access):
        with pytest.raises(SupersededError, match=f"attempt 1 of {RUN_ID} is {state}"):
            write()
    assert store.get("manifest") == b"1"
    FencedStore(attempt).put("checkpoint", b"1")
    run.store.put(run.progress_key(1), b"{")
    store.put("manifest", b"2")
    run.claim()
    with pytest.raises(SupersededError, match="taken over"):
        store.put("manifest", b"3")


def test_the_fence_costs_one_look_at_one_key(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = run.claim()
    looked: list[str] = []
    exists = LocalStore.exists

    def noted(self: LocalStore, key: str) -> bool:
        looked.append(key)
        return exists(self, key)

    monkeypatch.setattr(LocalStore, "exists", noted)
    monkeypatch.setattr(LocalStore, "entries", lambda self, prefix, **_: pytest.fail("no listing"))
    FencedStore(attempt).put("checkpoint", b"1")
    assert looked == [run.key("attempts/00000002.json")]


def test_a_request_to_stop_names_its_attempt(run: Run) -> None:
    first = run.claim()
    assert not first.stop_requested()
    run.request_stop(first.number)
    assert first.stop_requested()
    second = run.claim()
    assert not second.stop_requested()
    run.request_stop(second.number)
    assert first.stop_requested(), "an earlier attempt whose driver has not noticed yet stops too"
    run.withdraw_stop()
    assert not first.stop_requested()
    run.store.put(run.key("stop.json"), b"[]")
    assert not first.stop_requested()


def test_a_run_that_is_asked_to_stop_while_it_waits_is_over_at_once(run: Run) -> None:
    waiting = RunProgress.begin(RUN_ID, small_job(), state="waiting", attempt=2)
    run.request_stop(1)
    assert not run.is_stopping(waiting), "an attempt before this one was asked"
    run.request_stop(2)
    assert run.is_stopping(waiting)
    running, done = (waiting.changed(state=state) for state in ("running", "done"))
    assert run.is_stopping(running)
    assert not run.is_stopping(done)
    found = [(record.is_over(is_stopping=False), record.is_over(is_stopping=True)) for record in (waiting, running)]
    assert found == [(False, True), (False, False)]
    assert done.is_over(is_stopping=False)


def test_progress_comes_back_as_it_was_and_losses_need_not_be_finite(run: Run) -> None:
    with ProgressWriter(run.claim(), begun(Attempt(run, 1)), interval=30) as writer:
        assert run.progress().state == "running"
        writer.adapter("cup", state="training", step=3, losses={"sks": ConceptLoss(0.25, float("nan"))})
        cup = run.progress().adapter("cup")
        assert (cup.state, cup.step, cup.steps) == ("training", 3, 9)
        assert cup.losses["sks"].model_dump() == {"identity": 0.25, "cat": None}
        writer.adapter("cup", step=4)
        assert run.progress().adapter("cup").step == 3  # not yet: no state has changed
        writer.adapter("cup", state="published", revision="r-0123456789ab", metrics={"kps": 0.2, "odd": float("inf")})
        writer.adapter("tea", state="rejected", reason="kps 0.01 is not >=0.1")
    record = run.progress()
    assert record.state == "done"
    assert record.ended
    assert record == writer.progress.changed(updated=record.updated)
    assert record.adapter("cup").metrics == {"kps": 0.2, "odd": None}
    with pytest.raises(KeyError):
        writer.progress.adapter("mug")


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (KeyboardInterrupt(), "stopped", None),
        (SystemExit(15), "stopped", None),
        (StoreError("the disk is full"), "failed", "the disk is full"),
        (CheckpointError("of an earlier version"), "failed", "of an earlier version"),
        (ValueError("a mistake"), "failed", "ValueError: a mistake"),
        (None, "failed", None),  # an adapter has no end
    ],
)
def test_every_run_gets_an_end(run: Run, error: BaseException | None, state: str, reason: str | None) -> None:
    def drive() -> None:
        with ProgressWriter(run.claim(), begun(Attempt(run, 1))) as writer:
            writer.adapter("cup", state="published")
            if error is not None:
                raise error

    if error is None:
        drive()
    else:
        with pytest.raises(type(error)):
            drive()
    assert (run.progress().state, run.progress().reason) == (state, reason)
    assert run.progress().permanent == isinstance(error, CheckpointError)


def test_changes_are_written_seldom_and_a_heartbeat_without_any(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_writer, "HEARTBEAT_SECONDS", 0.4)
    puts: list[float] = []
    put = LocalStore.put

    def counted(self: LocalStore, key: str, data: bytes, *, if_absent: bool = False) -> None:
        puts.append(time.monotonic())
        put(self, key, data, if_absent=if_absent)

    attempt = run.claim()
    monkeypatch.setattr(LocalStore, "put", counted)
    began = time.monotonic()
    with ProgressWriter(attempt, begun(attempt), interval=0.2) as writer:
        for step in range(200):
            writer.adapter("cup", step=step)
            time.sleep(0.005)
        # 200 changes: at most one write per interval passed, however slow the machine is.
        assert 2 <= len(puts) <= (time.monotonic() - began) / 0.2 + 3
        while run.progress().adapter("cup").step != 199:
            time.sleep(0.02)
        puts.clear()
        began, before = time.monotonic(), run.progress().updated
        while run.progress().updated == before:
            time.sleep(0.02)
        assert 1 <= len(puts) <= (time.monotonic() - began) / 0.4 + 2
        assert run.progress().adapter("cup").step == 199


def test_a_store_that_fails_for_a_while_loses_no_record(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = run.claim()
    put = LocalStore.put
    with ProgressWriter(attempt, begun(attempt), interval=0.02) as writer:
        with monkeypatch.context() as outage:
            outage.setattr(LocalStore, "put", lambda *_, **__: (_ for _ in ()).throw(StoreError("unreachable")))
            writer.adapter("cup", state="training", step=2)
            time.sleep(0.1)
        assert LocalStore.put is put
        deadline = time.monotonic() + 5
        while run.progress().adapter("cup").step != 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert run.progress().adapter("cup").state == "training"


def test_a_superseded_writer_says_so_and_leaves_the_new_drivers_record(run: Run) -> None:
    def drive(old: Attempt) -> None:
        with ProgressWriter(old, begun(old), interval=0.05) as writer:
            run.write_progress(begun(run.claim()))
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                writer.adapter("cup", step=writer.progress.adapter("cup").step + 1)
                time.sleep(0.02)

    def leave_at_once(old: Attempt) -> None:
        with ProgressWriter(old, begun(old), interval=30):
            run.write_progress(begun(run.claim()))

    for attempt, work in ((1, drive), (3, leave_at_once)):
        with pytest.raises(SupersededError, match=f"attempt {attempt}"):
            work(run.claim())
        assert (run.progress().attempt, run.progress().state) == (attempt + 1, "running")


def test_a_write_that_arrives_after_another_driver_took_over_changes_no_record_but_its_own(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run.claim()
    put = LocalStore.put

    def held_up(self: LocalStore, key: str, data: bytes, *, if_absent: bool = False) -> None:
        """The other driver does all its work between this one's check and its write."""
        monkeypatch.setattr(LocalStore, "put", put)
        second = run.claim()
        with ProgressWriter(second, begun(second)) as writer:
            for one in ("cup", "tea"):
                writer.adapter(one, state="published")
        put(self, key, data, if_absent=if_absent)

    monkeypatch.setattr(LocalStore, "put", held_up)
    FencedStore(first).put(run.progress_key(1), begun(first).model_dump_json().encode())
    assert run.store.exists(run.progress_key(1))
    assert (run.progress().attempt, run.progress().state) == (2, "done")
    assert [one.state for one in list_runs(run.store)[0]] == ["done"]


def test_a_run_of_an_older_version_is_read_until_its_next_attempt(run: Run) -> None:
    old = RunProgress.begin(run.run_id, small_job(), state="failed", attempt=3)
    run.store.put(run.key("progress.json"), old.model_dump_json().encode())
    assert run.progress() == old
    run.write_progress(old.changed(attempt=4, state="waiting"))
    assert run.progress().state == "waiting"
    assert [one.attempt for one in list_runs(run.store)[0]] == [4]


def test_a_silent_driver_counts_as_lost_after_a_minute(run: Run) -> None:
    progress = begun(run.claim())
    now = datetime.fromisoformat(progress.updated)
    limit = timedelta(seconds=HEARTBEAT_SECONDS * MISSED_HEARTBEATS)
    assert is_alive(progress)
    assert is_alive(progress, now + limit - timedelta(seconds=1))
    assert not is_alive(progress, now + limit)
    assert not is_alive(progress.changed(state="done"), now)
    assert not is_alive(progress.changed(state="waiting"), now)
    assert progress.silent_seconds(now + limit) == limit.total_seconds()
    assert now.tzinfo == UTC


def test_runs_are_listed_newest_first_and_a_damaged_record_hides_none(run: Run) -> None:
    store = run.store
    for number in (1, 2, 3):
        one = Run(store, f"run-00000000000{number}")
        begin = RunProgress.begin(one.run_id, small_job(), state="waiting", attempt=1)
        one.write_progress(begin.changed(started=f"2026-11-0{number}T00:00:00+00:00"))
    store.put("runs/run-000000000004/progress/00000001.json", b'{"run_id": 4}')
    store.put("runs/run-a-cup/r-0123456789ab/checkpoints/00000001.json", b"{}")  # of an earlier cat-cluster
    Run(store, "run-000000000005").write_spec(small_job())
    runs, damaged = list_runs(store)
    assert [one.run_id[-1] for one in runs] == ["3", "2", "1"]
    assert damaged == ["run-000000000004"]
    with pytest.raises(RunError, match=r"damaged.*--force"):
        Run(store, "run-000000000004").progress()
    with pytest.raises(RunError, match="no run run-000000000005"):
        Run(store, "run-000000000005").progress()
