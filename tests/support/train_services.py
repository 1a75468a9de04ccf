"""A training service whose engine room is stood in for, as that needs a Ray: adapters end when a test says so.

Store, queue and claims are real.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from cat_cluster.cluster.connection import ClusterSize
from cat_cluster.cluster.groups import Group
from cat_cluster.cluster.train_service import ServiceOptions, TrainService
from cat_cluster.cluster.work import HeldRun, Work
from cat_cluster.errors import BaseModelError, ConceptError, StoreError
from cat_cluster.pipeline.job import AdapterResult
from cat_cluster.runs.queue import enter
from cat_cluster.runs.run import Run
from cat_cluster.settings import Settings
from cat_cluster.spec.job import JobSpec, parse_spec
from cat_cluster.spec.sections import ClusterSpec
from cat_cluster.store import LocalStore

photos_are_read = threading.Event()


class Room:
    """Stands in for the engine room: it has `places`, and its works end by `end`."""

    def __init__(self, *_: Any, on_result: Callable[[Work, AdapterResult], None], **__: Any) -> None:
        self.places, self.on_result = 2, on_result
        self.works: dict[str, Work] = {}
        self.taken: list[str] = []
        self.released: list[str] = []
        self.away = self.is_lost = False

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

    @property
    def at_work(self) -> tuple[list[Group], list[Work]]:
        group = Group(0, "kind", self.places)
        for work in self.works.values():
            group.take(work)
        return [group], []

    def turn(self) -> None:
        """Nothing ends by itself."""

    def end(self, adapter_id: str) -> None:
        work = self.works.pop(adapter_id)
        work.run.note(adapter_id, state="published")
        self.on_result(work, AdapterResult(adapter_id, "r-0123456789ab", "published"))

    def __exit__(self, *_: object) -> None:
        if self.is_lost:
            raise ConnectionError("Ray is gone")


class Preparation:
    """Stands in for reading photos and a base; an adapter whose id begins with "bad" cannot be used."""

    def __init__(self, *_: object, **__: object) -> None:
        self.loaded: list[str] = []

    def load(self, base: str) -> None:
        if base == "nowhere":
            raise BaseModelError(f"base {base}: no such folder")
        self.loaded.append(base)

    def adapter(self, resolved: Any, registry: object) -> Any:
        if resolved.id.startswith("bad"):
            raise ConceptError(f"adapter {resolved.id}: no photo can be read")
        if resolved.id.startswith("odd"):
            raise ValueError("what nobody had thought of")
        if resolved.id.startswith("slow"):
            assert photos_are_read.wait(30)
        return SimpleNamespace(resolved=resolved, revision="r-0123456789ab", resolution=64, warnings=())


class Service:
    """A service of a store, and what it said."""

    def __init__(self, store: LocalStore, **options: Any) -> None:
        self.said: list[str] = []
        cluster, size = ClusterSpec(), ClusterSize(2.0, 0.0)
        given = ServiceOptions(**{"name": "default", "groups": (1, 1), "cluster": cluster, **options})
        self.service = TrainService(store, Settings(), given, size, self.said.append).__enter__()
        self.room: Any = self.service._room

    def turns(self, count: int = 3) -> None:
        """Let it look at its queue so often, each time with all photos read that it was to read."""
        for _ in range(count):
            self.service._thread.submit(lambda: None).result()
            self.service._refreshed = self.service._checked = float("-inf")
            self.service.turn()


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
