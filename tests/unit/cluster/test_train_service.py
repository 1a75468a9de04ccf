"""What a training service does with its queue: whose turn it is, what fails alone, what is given back.

The engine room is stood in for, as it needs a Ray: adapters end when a test says so. Store, queue and claims are real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cat_cluster.cluster import train_service
from cat_cluster.cluster.connection import ClusterSize
from cat_cluster.cluster.train_service import ServiceOptions, TrainService
from cat_cluster.cluster.work import HeldRun, Work
from cat_cluster.errors import ConceptError, StoreError
from cat_cluster.pipeline.job import AdapterResult
from cat_cluster.runs.queue import enter
from cat_cluster.runs.run import Run
from cat_cluster.settings import Settings
from cat_cluster.spec.job import JobSpec, parse_spec
from cat_cluster.spec.sections import ClusterSpec
from cat_cluster.store import LocalStore


class Room:
    """Stands in for the engine room: it has `places`, and its works end by `end`."""

    def __init__(self, *_: Any, on_result: Callable[[Work, AdapterResult], None], **__: Any) -> None:
        self.places, self.on_result = 2, on_result
        self.works: dict[str, Work] = {}
        self.taken: list[str] = []
        self.released: list[str] = []
        self.away = False

    def has_place(self, work: Work) -> bool:
        return len(self.works) < self.places

    def take(self, works: Sequence[Work]) -> None:
        if self.away:
            raise StoreError("the store is away")
        for work in works:
            self.works[work.adapter_id] = work
            self.taken.append(work.adapter_id)

    def release(self, run: HeldRun) -> None:
        self.works = {name: work for name, work in self.works.items() if work.run is not run}
        self.released.append(run.job.name)

    def turn(self) -> None:
        """Nothing ends by itself."""

    def end(self, adapter_id: str) -> None:
        work = self.works.pop(adapter_id)
        work.run.note(adapter_id, state="published")
        self.on_result(work, AdapterResult(adapter_id, "r-0123456789ab", "published"))

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""


class Preparation:
    """Stands in for reading photos and a base; an adapter whose id begins with "bad" cannot be used."""

    def __init__(self, *_: object) -> None: ...

    def adapter(self, resolved: Any, registry: object) -> Any:
        if resolved.id.startswith("bad"):
            raise ConceptError(f"adapter {resolved.id}: no photo can be read")
        return SimpleNamespace(resolved=resolved, revision="r-0123456789ab", warnings=())


class Service:
    """A service of a store, and what it said."""

    def __init__(self, store: LocalStore, **options: Any) -> None:
        self.said: list[str] = []
        cluster, size = ClusterSpec(), ClusterSize(2.0, 0.0)
        given = ServiceOptions(**{"name": "default", "groups": (1, 1), "cluster": cluster, **options})
        self.service = TrainService(store, Settings(), given, size, self.said.append)
        self.room: Any = self.service._room

    def turns(self, count: int = 3) -> None:
        """Let it look at its queue so often, each time with all photos read that it was to read."""
        for _ in range(count):
            self.service._thread.submit(lambda: None).result()
            self.service._refreshed = self.service._checked = float("-inf")
            self.service.turn()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def start(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Service]]:
    monkeypatch.setattr(train_service, "EngineRoom", Room)
    monkeypatch.setattr(train_service, "Preparation", Preparation)
    started: list[Service] = []

    def make(**options: Any) -> Service:
        started.append(Service(store, **options))
        return started[-1]

    yield make
    for one in started:
        one.service.__exit__(None, None, None)


def job_of(*names: str) -> JobSpec:
    adapters = "".join(
        f"- id: {name}\n  concepts: [{{token: sk{number}, class_noun: cup, images: 's3://bucket/{name}'}}]\n"
        for number, name in enumerate(names)
    )
    return parse_spec(f"name: {names[0]}\nbase: pocket\nadapters:\n{adapters}".encode(), "spec.yaml")


def submit(store: LocalStore, number: int, *names: str, owner: str = "ann", priority: int = 0) -> Run:
    run = Run(store, f"run-{number:012d}")
    enter(run, job_of(*names), owner=owner, priority=priority)
    return run


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
    assert sum(run.last_attempt() for run in runs) == train_service.PREPARED_AHEAD
    for number in range(1, 21):
        service.room.end(f"cup-{number}")
        service.turns(2)
    assert service.room.taken == [f"cup-{number}" for number in range(1, 21)]
    assert store.list("queue/") == []
