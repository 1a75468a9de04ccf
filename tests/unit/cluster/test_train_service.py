"""What a training service does with its queue: whose turn it is, what fails alone, what is given back."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

from cat_cluster.cluster import train_service
from cat_cluster.runs.services import read_services
from cat_cluster.store import LocalStore
from tests.support.train_services import Service, submit


def test_adapters_begin_as_places_come_free_and_the_run_ends_with_its_last(
    start: Callable[..., Service], store: LocalStore
) -> None:
    run = submit(store, 1, "cup", "mug", "jar")
    service = start()
    service.turns()
    assert service.room.taken == ["cup", "mug"]
    assert run.progress().state == "running"
    service.room.end("cup")
    service.turns(1)
    assert service.room.taken == ["cup", "mug", "jar"]
    service.room.end("mug")
    assert run.progress().state == "running"
    assert len(store.list("queue/")) == 1
    service.room.end("jar")
    assert run.progress().state == "done"
    assert store.list("queue/") == []
    assert service.room.released == ["cup"]


def test_what_is_read_and_has_a_place_begins_before_the_next_look_at_the_queue(
    start: Callable[..., Service], store: LocalStore
) -> None:
    submit(store, 1, "cup", "mug", "jar")
    service = start()
    service.service.turn()
    service.service._thread.submit(lambda: None).result()
    service.service._refreshed = float("inf")  # so that it is not looked at again
    service.service.turn()
    assert service.room.taken == ["cup", "mug"]
    service.room.end("cup")
    service.service.turn()
    assert service.room.taken == ["cup", "mug", "jar"]


def test_metrics_say_what_waits_and_for_how_long(start: Callable[..., Service], store: LocalStore) -> None:
    service, found = start(), dict[str, float]()
    service.service._report._metrics = SimpleNamespace(set=lambda spec, value: found.update({spec.name: value}))  # type: ignore[assignment]
    service.turns(1)
    assert found == {"cat_queue_waiting": 0, "cat_queue_oldest_wait_seconds": 0.0}
    submit(store, 1, "cup", "mug", "jar")
    service.turns()
    submit(store, 2, "pot", "pan")
    time.sleep(0.01)
    service.room.places = 0
    service.turns()
    assert found["cat_queue_waiting"] == 5, "the stand-in of the engine room notes nobody as training"
    assert found["cat_queue_oldest_wait_seconds"] >= 0.01
    service.service._held[run_id(1)].run.note("cup", state="training")
    service.turns(1)
    assert found["cat_queue_waiting"] == 4


def test_the_store_is_told_who_trains_with_whom(start: Callable[..., Service], store: LocalStore) -> None:
    service = start(name="night")
    submit(store, 1, "cup")
    submit(store, 2, "mug", "jar")
    service.turns()
    for _ in range(1000):
        [told] = read_services(store) or [None]
        if told is not None and told.groups and len(told.groups[0].adapters) == 2:
            break
        time.sleep(0.01)
    assert told is not None
    assert (told.name, told.workers, told.waiting) == ("night", 1, 3)
    [group] = told.groups
    assert (group.base, group.resolution, group.slots) == ("pocket", 64, 2)
    assert [(one.run_id, one.adapter) for one in group.adapters] == [(run_id(1), "cup"), (run_id(2), "mug")]
    service.service.__exit__(None, None, None)
    assert read_services(store) == []


def run_id(number: int) -> str:
    return f"run-{number:012d}"


def test_bases_are_loaded_before_anybody_asks(start: Callable[..., Service]) -> None:
    service = start(bases=("pocket", "nowhere"))
    service.turns(1)
    assert service.service._preparation.loaded == ["pocket"], "whoever needs the other hears why it cannot be had"


def test_owners_take_turns_and_a_limit_holds_one_back(start: Callable[..., Service], store: LocalStore) -> None:
    submit(store, 1, "a0", "a1", "a2", "a3", owner="ann")
    submit(store, 2, "b0", "b1", owner="bob")
    service = start(owner_limits={"ann": 1})
    service.room.places = 4
    service.turns(4)
    assert sorted(service.room.taken) == ["a0", "b0", "b1"], "ann holds one, and a place stays free"
    service.room.end("a0")
    service.turns(1)
    assert service.room.taken[-1] == "a1"


def test_a_higher_priority_goes_first_when_a_place_comes_free(start: Callable[..., Service], store: LocalStore) -> None:
    submit(store, 1, "a0", "a1", "a2")
    service = start()
    service.turns()
    submit(store, 2, "urgent", owner="bob", priority=5)
    service.turns()
    assert service.room.taken == ["a0", "a1"]
    service.room.end("a0")
    service.turns(1)
    assert service.room.taken == ["a0", "a1", "urgent"]


def test_what_cannot_be_used_fails_alone_with_its_reason(start: Callable[..., Service], store: LocalStore) -> None:
    run, whole = submit(store, 1, "cup", "bad-mug"), submit(store, 2, "bad-jar")
    service = start()
    service.turns()
    assert service.room.taken == ["cup"]
    service.room.end("cup")
    progress = run.progress()
    assert (progress.state, progress.adapter("cup").state) == ("failed", "published")
    assert progress.adapter("bad-mug").reason == "adapter bad-mug: no photo can be read"
    assert progress.adapter("bad-mug").permanent
    assert whole.progress().state == "failed"
    assert store.list("queue/") == []


def test_a_run_that_is_asked_to_stop_stops_whether_it_waits_or_trains(
    start: Callable[..., Service], store: LocalStore
) -> None:
    trains, waits = submit(store, 1, "cup", "mug"), submit(store, 2, "jar")
    service = start()
    service.room.places = 1
    service.turns()
    waits.request_stop(waits.progress().attempt)
    trains.request_stop(1)
    service.turns(6)
    assert [run.progress().state for run in (trains, waits)] == ["stopped", "stopped"]
    assert service.room.works == {}
    assert service.room.taken == ["cup"]
    assert store.list("queue/") == []


def test_a_run_that_another_took_over_is_let_go_and_not_written(
    start: Callable[..., Service], store: LocalStore
) -> None:
    run = submit(store, 1, "cup", "mug")
    service = start()
    service.turns()
    theirs = run.claim()
    service.turns()
    assert service.room.works == {}
    assert theirs.number == 2
    assert run.last_record() == run.progress_key(1), "the other has written nothing yet, and neither has this one"
    assert any("has taken it over" in line for line in service.said)
    assert len(store.list("queue/")) == 1


def test_a_service_that_ends_gives_its_runs_back_to_any_other(start: Callable[..., Service], store: LocalStore) -> None:
    run = submit(store, 1, "cup", "mug")
    first = start()
    first.turns()
    first.room.end("cup")
    first.service.__exit__(None, None, None)
    progress = run.progress()
    assert (progress.state, progress.adapter("cup").state, progress.adapter("mug").state) == (
        "waiting",
        "published",
        "waiting",
    )
    other = start(name="other")
    other.turns()
    assert run.last_attempt() == 2
    assert sorted(other.room.taken) == ["cup", "mug"], "the engine room finds what is published"


def test_one_that_was_killed_is_followed_at_once_by_the_next_of_its_name_and_later_by_others(
    start: Callable[..., Service], store: LocalStore
) -> None:
    run = submit(store, 1, "cup")
    start().turns()  # and is killed: it says nothing more
    other = start(name="other")
    other.turns()
    assert other.room.taken == []
    successor = start()
    successor.turns()
    assert successor.room.taken == ["cup"]
    assert run.last_attempt() == 2


def test_a_store_that_is_away_costs_nothing_but_time(start: Callable[..., Service], store: LocalStore) -> None:
    submit(store, 1, "cup", "mug")
    service = start()
    service.room.away = True
    service.turns(4)
    assert service.room.taken == []
    assert [line for line in service.said if "away" in line] == ["the store is away; trying again"]
    service.room.away = False
    service.turns(1)
    assert service.room.taken == ["cup", "mug"]
    assert service.service._fair.held("ann") == 2


def test_a_queue_of_many_runs_is_claimed_as_places_come_free(start: Callable[..., Service], store: LocalStore) -> None:
    runs = [submit(store, number, f"cup-{number}") for number in range(1, 21)]
    service = start()
    service.turns(6)
    assert service.room.taken == ["cup-1", "cup-2"]
    assert sum(run.last_attempt() for run in runs) == 2 + train_service.PREPARED_AHEAD
    for number in range(1, 21):
        service.room.end(f"cup-{number}")
        service.turns(2)
    assert service.room.taken == [f"cup-{number}" for number in range(1, 21)]
    assert store.list("queue/") == []
