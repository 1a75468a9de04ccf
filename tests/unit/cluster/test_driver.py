"""What the driver does with packs and evaluations that fail; Ray's tasks are stood in for, as they need a Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import exceptions as ray_errors

from cat_cluster.cluster import driver as driver_module
from cat_cluster.cluster import engine_room
from cat_cluster.cluster.connection import ClusterSize
from cat_cluster.cluster.engine_room import EVALUATION_RETRIES
from cat_cluster.cluster.messages import Order
from cat_cluster.cluster.work import HeldRun, Work
from cat_cluster.errors import (
    CatClusterError,
    ConceptError,
    LostWorkerError,
    OutOfMemoryError,
    StoreRefusedError,
    WorkerError,
)
from cat_cluster.pipeline.job import AdapterResult
from cat_cluster.runs.progress import RunProgress
from cat_cluster.runs.progress_writer import ProgressWriter
from cat_cluster.runs.run import Run, run_id_of
from cat_cluster.settings import Settings
from cat_cluster.spec.job import JobSpec, parse_spec
from cat_cluster.store import open_store

RUN = "run-0123456789ab"
CUP, MUG = f"{RUN}-1/cup", f"{RUN}-1/mug"
Outcome = CatClusterError | Exception | str | None  # a text: why training dropped it
SHORT = OutOfMemoryError("out of memory")


class Cluster:
    """Tasks that end at once, the oldest pack first: `fails` says with what a pack or an evaluation does.

    started: every task; threads: how many a worker of each pack may use; given: the orders of each pack; forgotten:
    packs of which nothing is kept; events: what is told at each look; measures_first: evaluations end before packs.
    """

    def __init__(
        self,
        fails: Callable[[str, tuple[str, ...]], Outcome],
        events: Sequence[Sequence[tuple[Any, ...]]] = (),
        *,
        measures_first: bool = False,
    ) -> None:
        self.fails = fails
        self.started: list[str] = []
        self.threads: list[int] = []
        self.given: dict[int, list[Order]] = {}
        self.forgotten: list[int] = []
        self.events = list(events)
        self.measures_first = measures_first

    def stand_in(self, patch: pytest.MonkeyPatch) -> None:
        """Be what the engine room starts, asks and tells."""
        for name, stand_in in {"start_pack": self.start_pack, "evaluate_on_ray": self.evaluate}.items():
            patch.setattr(engine_room, name, stand_in)
        for name, stand_in in {"get": self.get, "wait": self.wait, "cancel": lambda *_, **__: None}.items():
            patch.setattr(engine_room.ray, name, stand_in)
        patch.setattr(engine_room.Messages, "start", lambda: self)
        patch.setattr(
            engine_room.telemetry, "Metrics", lambda _: SimpleNamespace(set=lambda *_, **__: None, inc=lambda *_: None)
        )

    def give(self, pack: int, order: Order) -> None:
        self.given.setdefault(pack, []).append(order)

    def forget(self, pack: int) -> None:
        self.forgotten.append(pack)

    def take(self) -> Sequence[tuple[Any, ...]]:
        return self.events.pop(0) if self.events else ()

    def start_pack(self, spec: Any) -> Any:
        self.threads.append(spec.threads)
        return self._start("train", tuple(one.resolved.id for one in self.given[spec.number][-1].adapters))

    def evaluate(self, work: Any, **_: Any) -> Any:
        return self._start("evaluate", (work.adapter_id,))

    def get(self, task: Any) -> Any:
        kind, ids = task
        outcome = self.fails(kind, ids)
        if isinstance(outcome, ray_errors.RayError):
            raise outcome
        if kind == "evaluate" and outcome is None:
            return AdapterResult(ids[0], "r-0123456789ab", "published")
        if kind == "evaluate" and isinstance(outcome, CatClusterError):
            return AdapterResult.failed(ids[0], "r-0123456789ab", outcome)
        if kind == "evaluate" and isinstance(outcome, str):
            return AdapterResult(ids[0], "r-0123456789ab", "failed", outcome, permanent=True, dropped=True)
        return outcome

    def wait(self, tasks: Sequence[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        if self.measures_first and self.events:
            tasks = [task for task in tasks if task[0] == "evaluate"]
        return list(tasks)[:1], list(tasks)[1:]

    def _start(self, kind: str, ids: tuple[str, ...]) -> Any:
        self.started.append(f"{kind} {' '.join(ids)}")
        return kind, ids


Drive = Callable[..., tuple[dict[str, AdapterResult], list[str], RunProgress]]


@pytest.fixture
def drive(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Drive:
    def run(
        packs: Sequence[Sequence[str]],
        fails: Callable[[str, tuple[str, ...]], Outcome],
        *,
        side_by_side: int = 1,
        threads: list[int] | None = None,
        **behaviour: Any,
    ) -> tuple[dict[str, AdapterResult], list[str], RunProgress]:
        names = [name for pack in packs for name in pack]
        job = job_of(names)
        cluster = Cluster(fails, **behaviour)
        cluster.stand_in(monkeypatch)
        adapters = {name: prepared(name) for name in names}

        def take(room: Any, works: Sequence[Work]) -> None:
            of = {work.adapter_id: work for work in works}
            room._works |= {work.name: work for work in works}
            room._groups.wait_apart(*([of[name] for name in pack] for pack in packs))

        monkeypatch.setattr(engine_room.EngineRoom, "take", take)
        attempt = Run(open_store(tmp_path / "store"), RUN).claim()
        progress = RunProgress.begin(attempt.run.run_id, job, state="running", attempt=attempt.number)
        nothing = {name: lambda *_: None for name in ("message", "started", "step", "finished")}
        listener = SimpleNamespace(**nothing)
        with ProgressWriter(attempt, progress, interval=30) as writer:
            size = ClusterSize(float(side_by_side), 0.0)
            held = HeldRun(job, attempt, writer, listener)  # type: ignore[arg-type]
            results = driver_module._drive(held, list(adapters.values()), size, str(tmp_path))
        if threads is not None:
            threads += cluster.threads
        return {result.adapter_id: result for result in results}, cluster.started, attempt.run.progress()

    return run


def job_of(names: Sequence[str]) -> JobSpec:
    adapters = "".join(
        f"- id: {name}\n  concepts: [{{token: sk{number}, class_noun: cup, images: 's3://bucket/{name}'}}]\n"
        for number, name in enumerate(names)
    )
    return parse_spec(f"name: tea\nbase: pocket\nadapters:\n{adapters}".encode(), "spec.yaml")


def prepared(name: str) -> Any:
    resolved = SimpleNamespace(id=name, training=SimpleNamespace(steps=9))
    return SimpleNamespace(resolved=resolved, revision="r-0123456789ab", rows=1, warnings=())


def always(outcomes: Mapping[str, Outcome]) -> Callable[[str, tuple[str, ...]], Outcome]:
    """Say of a task by its kind and ids, as Cluster notes them, with what it ends."""
    return lambda kind, ids: outcomes.get(f"{kind} {' '.join(ids)}")


def test_a_pack_too_large_for_the_memory_is_halved_and_the_record_says_what_may_not_pass(drive: Drive) -> None:
    results, started, progress = drive([["cup", "mug"]], always({"train cup mug": SHORT, "train mug": SHORT}))
    # At its first try mug trains beside the evaluation of cup, at its second it is alone.
    assert started == ["train cup mug", "train cup", "evaluate cup", "train mug", "train mug"]
    assert (results["cup"].outcome, results["mug"].outcome) == ("published", "failed")
    assert results["mug"].permanent
    assert (progress.state, progress.permanent, progress.reason) == ("failed", True, None)
    assert (progress.adapter("mug").reason, progress.adapter("mug").permanent) == ("out of memory", True)


def test_one_that_ran_out_of_memory_beside_others_is_tried_once_more_alone(drive: Drive) -> None:
    seen: list[str] = []

    def fails(kind: str, ids: tuple[str, ...]) -> Outcome:
        seen.append(f"{kind} {ids[0]}")
        return SHORT if kind == "train" and ids == ("cup",) and seen.count("train cup") == 1 else None

    results, started, progress = drive([["cup"], ["mug"]], fails, side_by_side=2)
    assert started == ["train cup", "train mug", "evaluate mug", "train cup", "evaluate cup"]
    assert {result.outcome for result in results.values()} == {"published"}
    assert progress.state == "done"


def test_packs_side_by_side_share_the_cpus(drive: Drive) -> None:
    for packs, expected in ((1, [4]), (2, [2, 2]), (5, [1] * 5)):
        threads: list[int] = []
        drive([[f"cup-{n}"] for n in range(packs)], always({}), side_by_side=4, threads=threads)
        assert threads == expected


@pytest.mark.parametrize("failure", [None, SHORT])
def test_one_that_is_trained_before_the_rest_of_its_pack_is_evaluated_at_once(drive: Drive, failure: Outcome) -> None:
    results, started, _ = drive(
        [["cup", "mug", "jar"]],
        always({"train cup mug jar": failure}),
        events=[[("ended", 0, (CUP,)), ("ended", 0, (CUP,))]],
    )
    rest = ["train mug", "train jar"] if failure else []
    assert sorted(started) == sorted(["train cup mug jar", *rest, *(f"evaluate {name}" for name in results)])
    assert started[:2] == ["train cup mug jar", "evaluate cup"]
    assert {result.outcome for result in results.values()} == {"published"}


def test_checkpoints_stay_until_the_workers_know_that_an_adapter_has_ended(drive: Drive, tmp_path: Path) -> None:
    """Workers that start again go by the order they read, and see by the checkpoints what is trained."""
    store = open_store(tmp_path / "store")
    for name in ("cup", "mug", "jar"):
        store.put(f"checkpoints/{name}/r-0123456789ab/00000009.json", b"{}")
    left: list[list[str]] = []

    def look(kind: str, ids: tuple[str, ...]) -> Outcome:
        left.append([key.split("/")[1] for key in store.list("checkpoints/")])
        return None

    # Both are measured before the workers follow the order without cup; of mug they are told when they have ended.
    events = [[("ended", 0, (CUP,))], [("ended", 0, (MUG,))], [], [("followed", 0, 2)], []]
    drive([["cup", "mug", "jar"]], look, events=events, measures_first=True)
    everything = ["cup", "jar", "mug"]
    assert left == [everything, everything, ["jar", "mug"], ["jar"]]
    assert store.list("checkpoints/") == []


@pytest.mark.parametrize(("outcome", "left"), [("gradient not finite", 0), (StoreRefusedError("denied"), 1)])
def test_of_one_that_failed_only_what_may_be_measured_again_stays(
    drive: Drive, tmp_path: Path, outcome: Outcome, left: int
) -> None:
    store = open_store(tmp_path / "store")
    store.put("checkpoints/cup/r-0123456789ab/00000003.json", b"{}")
    results, *_ = drive([["cup", "mug"]], always({"evaluate cup": outcome}), events=[[("ended", 0, (CUP,))]])
    assert [results[name].outcome for name in ("cup", "mug")] == ["failed", "published"]
    assert len(store.list("checkpoints/cup/")) == left


def test_one_that_cannot_be_used_fails_once_and_the_others_go_on(drive: Drive) -> None:
    failure = ("failed", 0, CUP, ConceptError("no photo"))
    results, started, _ = drive([["cup", "mug"]], always({}), events=[[failure, failure]])
    assert (results["cup"].outcome, results["cup"].reason) == ("failed", "no photo")
    assert started == ["train cup mug", "evaluate mug"]


def test_what_a_pack_says_after_its_end_is_not_taken_note_of(drive: Drive) -> None:
    events = [[], [], [("ended", 0, (CUP,)), ("restart", 0, "workers failed"), ("followed", 0, 9)]]
    _, started, _ = drive([["cup"]], always({}), events=events)
    assert started == ["train cup", "evaluate cup"]


def test_one_alone_that_runs_out_of_memory_has_failed(drive: Drive) -> None:
    results, started, _ = drive([["cup"]], always({"train cup": SHORT}))
    assert started == ["train cup"]
    assert (results["cup"].outcome, results["cup"].permanent) == ("failed", True)


def test_a_pack_that_the_store_refuses_is_not_halved(drive: Drive) -> None:
    refused = StoreRefusedError("access was denied")
    results, started, progress = drive([["cup", "mug"]], always({"train cup mug": refused}))
    assert started == ["train cup mug"]
    assert [result.reason for result in results.values()] == ["access was denied"] * 2
    assert progress.permanent


def test_a_run_with_a_failure_that_may_pass_is_worth_another_try(drive: Drive) -> None:
    lost = WorkerError("training stopped: lost")
    _, _, progress = drive([["cup"], ["mug"]], always({"train cup": lost, "train mug": SHORT}))
    assert (progress.state, progress.permanent) == ("failed", False)


@pytest.mark.parametrize(
    ("error", "tries", "reason"),
    [
        (ray_errors.WorkerCrashedError(), 1 + EVALUATION_RETRIES, "evaluation stopped: a process was killed"),
        (ray_errors.OutOfMemoryError("killed"), 1 + EVALUATION_RETRIES, "out of memory: Ray ended a process"),
        (ray_errors.RayTaskError("f", "ValueError: x", ValueError("x"), "", 1, "::1"), 1, "evaluation stopped: Value"),
    ],
)
def test_an_evaluation_whose_process_is_lost_is_tried_again(
    drive: Drive, error: Exception, tries: int, reason: str
) -> None:
    results, started, _ = drive([["cup"]], always({"evaluate cup": error}))
    assert started == ["train cup", *["evaluate cup"] * tries]
    assert (results["cup"].reason or "").startswith(reason)


def test_a_ray_that_is_lost_ends_the_run_with_a_sentence(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def connection(_: object) -> Iterator[ClusterSize]:
        yield ClusterSize(1.0, 0.0)

    def lost(*_: object, **__: object) -> None:
        raise ray_errors.LocalRayletDiedError

    job, photos = job_of(["cup"]), [SimpleNamespace(image_digests=["ab"], warnings=())]
    for name, stand_in in {"prepare": lambda *_: photos, "ray_connection": connection, "EngineRoom": lost}.items():
        monkeypatch.setattr(driver_module, name, stand_in)
    monkeypatch.setattr(driver_module, "await_workers", lambda _, size, __: size)
    monkeypatch.setattr(driver_module, "check_size", lambda *_: None)
    monkeypatch.setattr(driver_module.ray, "is_initialized", lambda: True)
    store = open_store(tmp_path / "store")
    listener: Any = SimpleNamespace(message=pytest.fail)
    told = r"^the run stopped: a machine or pod of the cluster was lost"
    with pytest.raises(LostWorkerError, match=told) as raised:
        driver_module.run_on_ray(job, store.url, Settings(), listener)
    progress = Run(store, run_id_of(job, [["ab"]])).progress()
    assert (progress.state, progress.reason, progress.permanent) == ("failed", str(raised.value), False)
    monkeypatch.setattr(driver_module, "check_size", lost)
    with pytest.raises(LostWorkerError, match=told):
        driver_module.run_on_ray(job, store.url, Settings(), listener)
