"""What a training service loses, repeats or waits for when stores, runs and other processes do their worst: nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from cat_cluster.cluster import train_service
from cat_cluster.errors import ClusterError, StoreError, SupersededError
from cat_cluster.runs.run import Run
from cat_cluster.store import LocalStore
from tests.support.train_services import Service, photos_are_read, submit


class Away:
    """Stands in for a method that fails so often, as where the store is away, and then works."""

    def __init__(self, method: Callable[..., Any], times: int = 1) -> None:
        self.method, self.times = method, times

    def __get__(self, owner: object, _: object) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            if self.times:
                self.times -= 1
                raise StoreError("the store is away")
            return self.method(owner, *given, **named)

        return call


@pytest.mark.parametrize("asked", ["read_spec", "asked_to_stop", "last_attempt", "claim_after"])
def test_a_store_that_is_away_while_a_run_is_claimed_loses_nothing(
    start: Callable[..., Service], store: LocalStore, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    run = submit(store, 1, "cup")
    monkeypatch.setattr(train_service, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(Run, asked, Away(getattr(Run, asked)))
    service = start()
    service.turns(5)
    assert service.room.taken == ["cup"]
    service.room.end("cup")
    assert run.progress().state == "done"


def test_a_store_that_is_away_once_does_not_end_the_looks_at_a_run(
    start: Callable[..., Service], store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = submit(store, 1, "cup")
    service = start()
    service.turns()
    monkeypatch.setattr(Run, "is_claimed", Away(Run.is_claimed))
    service.turns(1)
    run.request_stop(1)
    service.turns(2)
    assert run.progress().state == "stopped"


def test_how_a_run_ended_is_said_when_the_store_is_back(
    start: Callable[..., Service], store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = submit(store, 1, "cup")
    service = start()
    service.turns()
    run.request_stop(1)
    monkeypatch.setattr(Run, "write_progress", Away(Run.write_progress, 3))
    service.turns(2)
    assert run.progress().state == "running"
    service.turns(3)
    assert run.progress().state == "stopped"
    assert run.last_attempt() == 1, "nobody began it anew"
    assert service.room.taken == ["cup"]
    assert store.list("queue/") == []


def test_a_run_that_is_taken_over_as_it_is_claimed_stays_in_the_queue(
    start: Callable[..., Service], store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def superseded(*_: object) -> None:
        raise SupersededError("another driver has taken over")

    submit(store, 1, "cup")
    monkeypatch.setattr(train_service.ProgressWriter, "__enter__", superseded)
    service = start()
    service.turns()
    assert len(store.list("queue/")) == 1


def test_whoever_waits_for_a_run_whose_spec_cannot_be_read_hears_why(
    start: Callable[..., Service], store: LocalStore
) -> None:
    damaged, whole = submit(store, 1, "cup"), submit(store, 2, "mug")
    store.put(damaged.key("spec.json"), b'{"of": "another version"}')
    service = start()
    service.turns()
    progress = damaged.progress()
    assert (progress.state, progress.permanent) == ("failed", True)
    assert "is damaged or of another version" in (progress.reason or "")
    assert whole.progress().state == "running"
    assert len(store.list("queue/")) == 1


def test_an_error_that_nobody_had_thought_of_fails_its_adapter_alone(
    start: Callable[..., Service], store: LocalStore
) -> None:
    run = submit(store, 1, "odd-cup", "mug")
    service = start()
    service.turns()
    assert service.room.taken == ["mug"]
    assert "what nobody had thought of" in (run.progress().adapter("odd-cup").reason or "")


def test_runs_of_an_owner_at_their_limit_keep_nobody_else_waiting(
    start: Callable[..., Service], store: LocalStore
) -> None:
    for number in range(1, 9):
        submit(store, number, f"a{number}", f"also-{number}", owner="ann")
    service = start(owner_limits={"ann": 1})
    service.room.places = 4
    photos_are_slow = threading.Event()
    service.service._thread.submit(photos_are_slow.wait)
    for _ in range(6):
        service.service._refreshed = float("-inf")
        service.service.turn()
    photos_are_slow.set()
    service.turns(8)
    assert service.room.taken == ["a1"]
    submit(store, 9, "b1", owner="bob")
    service.turns()
    assert service.room.taken == ["a1", "b1"]


def test_many_that_wait_do_not_go_before_one_of_higher_priority(
    start: Callable[..., Service], store: LocalStore
) -> None:
    for number in range(1, 9):
        submit(store, number, f"a{number}", f"b{number}")
    service = start()
    service.room.places = 1
    service.turns(4)
    submit(store, 9, "urgent", owner="bob", priority=5)
    service.turns()
    service.room.end("a1")
    service.turns(1)
    assert service.room.taken == ["a1", "urgent"]


def test_an_adapter_of_two_runs_is_at_work_for_one_of_them_at_a_time(
    start: Callable[..., Service], store: LocalStore
) -> None:
    """They have its checkpoints in common: the first to end would remove those of the other."""
    first, second = submit(store, 1, "cup"), submit(store, 2, "cup", "mug", owner="bob")
    service = start()
    service.room.places = 3
    service.turns(4)
    assert service.room.taken == ["cup", "mug"]
    service.room.end("cup")
    service.turns(1)
    assert first.progress().state == "done"
    assert service.room.taken == ["cup", "mug", "cup"], "the engine room finds that it is published"
    service.room.end("cup")
    service.room.end("mug")
    assert second.progress().state == "done"


def test_a_run_that_is_back_after_a_stop_is_not_taken_for_what_workers_train_yet(
    start: Callable[..., Service], store: LocalStore
) -> None:
    run = submit(store, 1, "cup")
    service = start()
    service.turns()
    before = service.room.works["cup"].name
    run.request_stop(1)
    service.turns(2)
    submit(store, 1, "cup")
    service.turns()
    assert service.room.works["cup"].name != before


def test_a_stop_that_was_asked_of_a_killed_service_holds_for_its_successor(
    start: Callable[..., Service], store: LocalStore
) -> None:
    run = submit(store, 1, "cup")
    start().turns()  # and is killed
    run.request_stop(1)
    successor = start()
    successor.turns()
    assert successor.room.taken == []
    assert run.progress().state == "stopped"
    assert store.list("queue/") == []


def test_of_two_processes_of_a_name_the_older_one_ends(start: Callable[..., Service], store: LocalStore) -> None:
    run, other = submit(store, 1, "cup"), submit(store, 2, "mug")
    older, newer = start(), start()
    older.turns()
    newer.turns()
    with pytest.raises(ClusterError, match="another process of the training service default"):
        older.turns()
    older.service.__exit__(None, None, None)
    newer.turns()
    assert [one.last_attempt() for one in (run, other)] == [2, 2]
    assert [one.progress().state for one in (run, other)] == ["running", "running"]


def test_runs_are_given_back_also_where_ray_is_lost(start: Callable[..., Service], store: LocalStore) -> None:
    run = submit(store, 1, "cup")
    service = start()
    service.turns()
    service.room.is_lost = True
    with pytest.raises(ConnectionError):
        service.service.__exit__(None, None, None)
    assert run.progress().state == "waiting"
    service.room.is_lost = False


def test_nothing_is_kept_of_runs_that_others_have_ended(start: Callable[..., Service], store: LocalStore) -> None:
    run = submit(store, 1, "cup")
    Run(store, run.run_id).claim()
    service = start()
    service.turns()
    assert service.service._not_before
    store.delete(store.list("queue/")[0])
    service.service._reader._listed_all_at = float("-inf")
    service.turns(1)
    assert not service.service._not_before
    assert not service.service._lease._seen


def test_what_is_read_trains_while_the_rest_of_a_run_is_read(start: Callable[..., Service], store: LocalStore) -> None:
    run = submit(store, 1, "cup", "slow-mug")
    service = start()
    photos_are_read.clear()
    try:
        end = time.monotonic() + 20
        while not service.room.taken and time.monotonic() < end:
            service.service._refreshed = float("-inf")
            service.service.turn()
        assert service.room.taken == ["cup"]
        service.room.end("cup")
        assert run.progress().state == "running"
    finally:
        photos_are_read.set()
    service.turns()
    service.room.end("slow-mug")
    assert run.progress().state == "done"
