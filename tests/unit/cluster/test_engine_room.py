"""What a service's engine room does with groups that fail; Ray's tasks are stood in for, as they need a Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import exceptions as ray_errors

from cat_cluster.cluster import engine_room
from cat_cluster.cluster.connection import ClusterSize
from cat_cluster.cluster.engine_room import EngineRoom
from cat_cluster.cluster.groups import Group
from cat_cluster.cluster.work import HeldRun, Work
from cat_cluster.errors import CheckpointError, LostWorkerError, OutOfMemoryError
from cat_cluster.pipeline.job import AdapterResult
from cat_cluster.runs.progress import RunProgress
from cat_cluster.runs.progress_writer import ProgressWriter
from cat_cluster.runs.run import Run
from cat_cluster.spec.sections import ClusterSpec
from cat_cluster.store import open_store
from tests.unit.cluster.test_driver import CUP, RUN, Cluster, always, job_of, prepared

LOST = LostWorkerError("training stopped: a machine was lost")


class Adapter(SimpleNamespace):
    """A prepared adapter; each is its own."""

    __hash__ = object.__hash__


class MeasuringFirst(Cluster):
    """A cluster whose evaluations end before its packs."""

    def wait(self, tasks: Sequence[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        first = [task for task in tasks if task[0] == "evaluate"] or tasks
        return list(first)[:1], []


class Service:
    """An engine room that keeps one group, with a run of cup and mug, whose tasks end as a cluster says."""

    def __init__(self, folder: Path, cluster: Cluster, groups: int) -> None:
        self.cluster = cluster
        self.results: dict[str, AdapterResult] = {}
        self.said: list[str] = []
        store = open_store(folder / "store")
        self.room = EngineRoom(
            ClusterSpec(),
            ClusterSize(2.0, 0.0),
            store.url,
            str(folder),
            groups=groups,
            keep=1,
            on_result=lambda work, result: self.results.update({work.adapter_id: result}),
            say=self.said.append,
        )
        job, attempt = job_of(["cup", "mug"]), Run(store, RUN).claim()
        progress = RunProgress.begin(RUN, job, state="running", attempt=1)
        writer = ProgressWriter(attempt, progress, interval=30)
        heard = ("message", "started", "step", "finished")
        listener: Any = SimpleNamespace(**{name: lambda *_: None for name in heard})
        self.run = HeldRun(job, attempt, writer, listener)
        self.works = [Work(self.run, Adapter(**vars(prepared(name)))) for name in ("cup", "mug")]

    def train(self) -> dict[str, str]:
        """Train cup and mug and return what became of each."""
        self.room._runs.add(self.run)
        self.room._works |= {work.name: work for work in self.works}
        self.room._groups.wait("kind", 2, self.works)
        for _ in range(20):
            if len(self.results) == 2:
                break
            self.room.turn()
        return {name: result.outcome for name, result in self.results.items()}


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Service]:
    def make(*given: Any, groups: int = 1, **behaviour: Any) -> Service:
        cluster = MeasuringFirst(*given, **behaviour)
        cluster.stand_in(monkeypatch)
        return Service(tmp_path, cluster, groups)

    return make


@pytest.mark.parametrize("failure", [LOST, OutOfMemoryError("out of memory"), CheckpointError("damaged")])
def test_the_last_one_of_a_group_that_others_have_left_is_tried_once_more_by_itself(
    service: Callable[..., Service], failure: Exception
) -> None:
    found = service(always({"train cup mug": failure}), events=[[], [("ended", 0, (CUP,))]])
    assert found.train() == {"cup": "published", "mug": "published"}
    assert "train mug" in found.cluster.started
    assert found.cluster.forgotten == [0, 1], "a service has thousands of groups"


@pytest.mark.parametrize("failure", [LOST, OutOfMemoryError("out of memory")])
def test_one_that_fails_by_itself_has_failed(service: Callable[..., Service], failure: Exception) -> None:
    found = service(always({"train cup mug": failure, "train mug": failure}), events=[[], [("ended", 0, (CUP,))]])
    assert found.train() == {"cup": "published", "mug": "failed"}
    assert found.cluster.started.count("train mug") == 1


def test_that_a_group_without_adapters_failed_is_said(service: Callable[..., Service]) -> None:
    found = service(always({"train ": LOST}))
    found.room.turn()
    assert found.said == [f"a group of workers without adapters failed: {LOST}"]


@pytest.mark.parametrize(("measured", "joins"), [(3, True), (OutOfMemoryError("no two"), False)])
def test_the_first_of_a_kind_trains_while_it_is_measured_how_many_fit(
    service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, measured: Any, joins: bool
) -> None:
    """Where no processor is free to measure with, as where groups hold them all, the queue would stand still."""
    found = service(always({}), groups=2)

    def get(task: Any) -> int:
        assert task == "measure"
        if isinstance(measured, Exception):
            raise ray_errors.RayTaskError("f", str(measured), measured, "", 1, "::1")
        return int(measured)

    monkeypatch.setattr(engine_room, "measure_on_ray", lambda *_, **__: "measure")
    monkeypatch.setattr(engine_room, "by_kind", lambda adapters, _: {"kind": adapters})
    monkeypatch.setattr(engine_room.ray, "get", get)
    monkeypatch.setattr(engine_room.ray, "wait", lambda *_, **__: ([], []))
    monkeypatch.setattr(engine_room, "pack_key", lambda _: "kind")
    cup, mug = found.works
    assert found.room.has_place(cup)
    found.room.take([cup])
    assert not found.room.has_place(mug)
    found.room.turn()
    assert found.cluster.started == ["train cup"]
    assert not found.room.has_place(mug), "it may join cup, and would now have a group start for it"
    monkeypatch.setattr(engine_room.ray, "wait", lambda tasks, **_: (["measure"] if "measure" in tasks else [], []))
    found.room.turn()
    assert found.room.has_place(mug)
    found.room.take([mug])
    found.room.turn()
    assert found.cluster.started == ["train cup", *([] if joins else ["train mug"])]


def test_a_service_outlives_workers_that_are_lost_while_they_have_nothing_to_do(
    service: Callable[..., Service],
) -> None:
    found = service(always({}), events=[[("restart", 0, "a machine was lost")]])
    found.room.turn()
    assert found.said == ["workers without adapters: a machine was lost"]


def test_the_record_says_when_an_adapter_took_its_first_step_and_when_it_ended(
    service: Callable[..., Service],
) -> None:
    run = service(always({})).run
    run.note("cup", state="training", step=2)
    assert run.writer.progress.adapter("cup").first_step is None, "a checkpoint is no step of this attempt"
    run.note_step("cup", 3, {})
    first = run.writer.progress.adapter("cup").first_step
    run.note_step("cup", 4, {})
    found = run.writer.progress.adapter("cup")
    assert (found.step, found.first_step, found.ended) == (4, first, None)
    run.note("cup", state="published")
    ended = run.writer.progress.adapter("cup").ended
    assert first is not None
    assert ended is not None
    assert ended >= first


def test_metrics_say_who_comes_and_goes_and_how_far_the_slots_are_taken(service: Callable[..., Service]) -> None:
    found = service(always({}), events=[[], [("ended", 0, (CUP,))]])
    gauges: list[tuple[str, float]] = []
    counted: dict[str, float] = {}

    def count(spec: Any, value: float = 1.0) -> None:
        counted[spec.name] = counted.get(spec.name, 0) + value

    metrics: Any = SimpleNamespace(set=lambda spec, value, **_: gauges.append((spec.name, value)), inc=count)
    found.room._metrics = metrics
    assert found.train() == {"cup": "published", "mug": "published"}
    assert counted == {"cat_pack_joins_total": 2, "cat_pack_leaves_total": 1}, "mug's group ended with it"
    assert ("cat_slots_occupied", 2) in gauges
    assert ("cat_slots_occupied", 1) in gauges


def test_a_process_that_measures_is_made_ready_once_workers_are_there(
    service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    warmed: list[str] = []
    monkeypatch.setattr(engine_room, "warm_on_ray", lambda base: warmed.append(base) or base)
    room = service(always({})).room
    room._bases = ("pocket", "other")
    room.turn()
    assert warmed == [], "it would take the processor that the workers wait for"
    for order in (1, 2):
        room._hear(Group(0), "followed", order)
    assert warmed == ["pocket"]
