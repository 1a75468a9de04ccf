"""Where adapters of one or more runs are trained on Ray, measured and published.

Groups of workers train them side by side, and a task measures and publishes each that is trained. What training has
reached is in the store at every moment, so whoever takes a run over goes on from there.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from types import TracebackType
from typing import Any, Self

import ray

from cat_cluster import telemetry
from cat_cluster.cluster.connection import ClusterSize
from cat_cluster.cluster.failures import failure_of
from cat_cluster.cluster.given_up import GivenUp
from cat_cluster.cluster.groups import Group, Groups
from cat_cluster.cluster.messages import Messages
from cat_cluster.cluster.tasks import evaluate_on_ray, measure_on_ray, pack_size_on_ray, warm_on_ray
from cat_cluster.cluster.trainer import PackSpec, most_workers, start_pack, workers_of
from cat_cluster.cluster.work import HeldRun, Work, by_run, names_of
from cat_cluster.errors import (
    CatClusterError,
    ClusterError,
    LostWorkerError,
    OutOfMemoryError,
    StoreRefusedError,
    SupersededError,
)
from cat_cluster.pipeline.job import AdapterResult, already_published, by_kind, clear_checkpoints, pack_key
from cat_cluster.pipeline.prepare import PreparedAdapter, checkpoints_of
from cat_cluster.spec.sections import ClusterSpec
from cat_cluster.telemetry.ray_backend import RayBackend
from cat_cluster.training.step_report import StepReport

POLL_SECONDS = 0.1
EMPTY_SECONDS = 60.0  # that a group without adapters stays open, beyond those that are kept
EVALUATION_RETRIES = 3  # of one whose process or machine is lost


class EngineRoom:
    """Brings works to their end: call `turn` until nothing is left to do. A context manager.

    cluster: how packs are made; groups: how many train at once; keep: how many of them stay when there is nothing to
    do, None: none, and a batch is all there will be; bases: that workers load at once. storage: where all of it is
    kept; folder: for Ray Train's own files. on_result is told the result of each work.
    """

    def __init__(
        self,
        cluster: ClusterSpec,
        size: ClusterSize,
        storage: str,
        folder: str,
        *,
        groups: int,
        keep: int | None = None,
        bases: Sequence[str] = (),
        on_result: Callable[[Work, AdapterResult], None],
        say: Callable[[str], None],
    ) -> None:
        self._cluster, self._size, self._storage, self._folder = cluster, size, storage, folder
        self._on_result, self._say = on_result, say
        self._groups = Groups(groups, keep)
        self._is_service, self._bases = keep is not None, tuple(bases)
        self._places: dict[Hashable, int] = {}
        self._runs: set[HeldRun] = set()
        self._works: dict[str, Work] = {}  # that are not at their end, by name
        self._settled: dict[str, tuple[Work, AdapterResult]] = {}  # whose checkpoints workers may look for yet
        self._training: dict[Any, Group] = {}  # by the references of their tasks, as are the evaluations
        self._evaluating: dict[Any, tuple[Work, float]] = {}
        self._measuring: dict[Any, Hashable] = {}  # the kinds of which it is not known yet how many train together
        self._given_up = GivenUp()
        self._retries: Counter[str] = Counter()  # of evaluations, by name
        self._metrics = telemetry.Metrics(RayBackend())
        self._messages = Messages.start()
        self._warming: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._given_up.add([*self._training, *self._evaluating, *self._measuring, *self._warming])  # if stopped early
        self._given_up.wait()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._evaluating and self._groups.idle

    @property
    def at_work(self) -> tuple[list[Group], list[Work]]:
        """The groups that run, and the adapters that are being measured."""
        return list(self._groups.running.values()), [work for work, _ in self._evaluating.values()]

    def take(self, works: Sequence[Work]) -> None:
        """Take works in: what is published is done, what is trained is measured, and the rest waits for a place.

        Raises CheckpointError as by_kind does, and StoreError, before anything is begun.
        """
        if not works:
            return
        found = []  # with the store asked for all before anything is begun
        for work in works:
            store = work.run.registry.store
            stored = checkpoints_of(work.adapter, store).steps()
            found.append((already_published(work.adapter, work.run.registry), stored))
        of = {
            work.adapter: work
            for work, (done, stored) in zip(works, found, strict=True)
            if done is None and work.steps not in stored
        }
        kinds = by_kind(list(of), works[0].run.registry.store)
        for work, (done, stored) in zip(works, found, strict=True):
            self._runs.add(work.run)
            self._works[work.name] = work
            work.run.note(work.adapter_id, revision=work.adapter.revision, step=max(stored, default=0))
            if done is not None:
                self._keep(work, done)
            elif work.steps in stored:
                self._evaluate(work, 0.0)
        for kind, adapters in kinds.items():
            if kind not in self._places:
                places = self._first_places(kind, adapters) if self._is_service else self._pack_size(adapters)
                self._places[kind] = places
            self._groups.wait(kind, self._places[kind], [of[adapter] for adapter in adapters])
        if not self._is_service and (packs := self._groups.to_come) > 1:
            self._say(
                f"{len(of)} adapters in {packs} packs, {min(packs, self._groups.most)} at a time, "
                f"on {self._size.workers} {self._size.kind}"
            )

    def has_place(self, work: Work) -> bool:
        """Whether a work would begin at once; as long as a kind is measured, for one of it: others may join that."""
        kind = pack_key(work.adapter)
        is_measured = kind not in self._measuring.values()
        return (is_measured or not self._groups.has(kind)) and self._groups.has_place(kind)

    def release(self, run: HeldRun) -> None:
        """Give up what is left of a run."""
        names = {work.name for work in self._works.values() if work.run is run}
        self._groups.drop(names)
        self._given_up.add([task for task, (work, _) in self._evaluating.items() if work.run is run])
        self._evaluating = {task: own for task, own in self._evaluating.items() if own[0].run is not run}
        for name in names:
            del self._works[name]
            self._retries.pop(name, None)
        self._runs.discard(run)
        self._update_metrics()

    def turn(self) -> None:
        """Start and fill groups, and take note of what they and the evaluations have done; at most POLL_SECONDS long.

        Raises ClusterError when the process that controls a group was killed.
        """
        for group, newcomers in self._groups.fill():
            self._began(newcomers, len(group.works))
        while (started := self._groups.next(busy=bool(self._evaluating))) is not None:
            self._start(started)
        self._groups.close_empty(EMPTY_SECONDS)
        self._given_up.look()
        self._give_orders()
        ready = self._ended_tasks()
        self._take_events()
        for task in ready:
            if task in self._training:
                self._end_group(task)
            elif task in self._measuring:
                self._end_measuring(task)
            else:
                self._end_evaluation(task)

    def _ended_tasks(self) -> list[Any]:
        """Wait for POLL_SECONDS, or until a task has ended."""
        if tasks := [*self._training, *self._evaluating, *self._measuring]:
            return list(ray.wait(tasks, timeout=POLL_SECONDS)[0])
        time.sleep(POLL_SECONDS)
        return []

    def _pack_size(self, adapters: Sequence[PreparedAdapter]) -> int:
        on_gpus, most = self._size.on_gpus, self._groups.most
        try:
            return pack_size_on_ray(adapters, self._cluster.max_pack, on_gpus=on_gpus, side_by_side=most)
        except ray.exceptions.RayError as error:
            self._say(f"packs of one: {failure_of(error, 'measuring the memory of a step')}")
            return 1

    def _first_places(self, kind: Hashable, adapters: Sequence[PreparedAdapter]) -> int:
        """Return how many adapters of a new kind train together until that is measured: nobody waits for it."""
        if self._cluster.max_pack != "auto":
            return self._cluster.max_pack
        twice = [*adapters, *adapters]  # others of the kind will come
        self._measuring[measure_on_ray(twice, on_gpus=self._size.on_gpus, side_by_side=self._groups.most)] = kind
        return 1

    def _end_measuring(self, task: Any) -> None:
        kind = self._measuring.pop(task)
        try:
            self._places[kind] = ray.get(task)
        except ray.exceptions.RayError as error:
            self._say(f"packs of one: {failure_of(error, 'measuring the memory of a step')}")
        self._groups.set_places(kind, self._places[kind])

    def _threads(self, workers: int | tuple[int, int]) -> int:
        """Share the cluster's CPUs among the workers of a group that starts and of those that train beside it."""
        groups = min(self._groups.most, len(self._groups.running) + self._groups.to_come)
        return max(1, int(self._size.cpus) // (groups * most_workers(workers)))

    def _start(self, group: Group) -> None:
        works = list(group.works.values())
        workers = self._cluster.workers
        if not self._is_service:
            workers = workers_of(self._cluster, sum(work.adapter.rows for work in works))
        if workers != self._cluster.workers:
            self._say(f"{names_of(works)}: {workers} workers, as many as rows in a step")
        spec = PackSpec(
            number=group.number,
            cluster=self._cluster,
            storage=self._storage,
            messages=self._messages,
            workers=workers,
            threads=self._threads(workers),
            on_gpus=self._size.on_gpus,
            folder=self._folder,
            bases=self._bases,
        )
        self._give_orders()  # before its workers ask for one
        self._began(works, len(works))
        self._training[start_pack(spec)] = group

    def _began(self, works: Sequence[Work], together: int) -> None:
        self._metrics.inc(telemetry.PACK_JOINS, len(works))
        for run, own in by_run(works).items():
            run.listener.started({work.adapter_id: work.steps for work in own}, together)
            for work in own:
                run.note(work.adapter_id, state="training")
        self._update_metrics()

    def _give_orders(self) -> None:
        for group, order in self._groups.orders():
            self._messages.give(group.number, order)

    def _take_events(self) -> None:
        for kind, *event in self._messages.take():
            if kind == "step":
                self._note_step(*event)
            elif kind == "images":
                name, done, total = event
                if name in self._works:
                    self._works[name].run.listener.images(self._works[name].adapter_id, done, total)
            elif event[0] in self._groups.running:  # else its task has ended, and more is known than this event says
                number, *said = event
                self._hear(self._groups.running[number], kind, *said)

    def _note_step(self, report: StepReport) -> None:
        for run, works in by_run(self._works[name] for name in report.done if name in self._works).items():
            own = report.of({work.name: work.adapter_id for work in works})
            run.listener.step(own)
            for adapter_id, losses in own.losses.items():
                tokens = {token: {"identity": one.identity, "cat": one.cat} for token, one in losses.items()}
                run.note_step(adapter_id, own.done[adapter_id], tokens)

    def _hear(self, group: Group, kind: str, *said: Any) -> None:
        """Take note of what the workers of a group say; after a restart they may say it again."""
        before = len(group.works)
        if kind == "ended":
            for name in [name for name in said[0] if name in group.works]:
                self._evaluate(group.end(name), group.seconds(name))
        elif kind == "failed":
            name, error = said
            # Of a run that was taken over its holder hears from the store.
            if name in group.works and not isinstance(error, SupersededError):
                self._fail(group.end(name), error)
        elif kind == "followed":
            for name in group.forget(*said):
                self._clear(name)
            # Once workers are there, as a task would take the processor that they wait for. On a GPU each task has a
            # process of its own, which is how Ray frees the memory.
            if self._bases and not (self._warming or self._size.on_gpus):
                self._warming.append(warm_on_ray(self._bases[0]))
        elif kind == "restart":
            self._say(f"{names_of(group.works.values())}: {said[0]}")
        if left := before - len(group.works):
            self._metrics.inc(telemetry.PACK_LEAVES, left)
            self._update_metrics()

    def _end_group(self, task: Any) -> None:
        """Start evaluating what a group has left, or split it where it failed."""
        group = self._training.pop(task)
        names = ", ".join(work.adapter_id for work in group.works.values())
        try:
            failure: CatClusterError | None = ray.get(task)
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            # The workers have ended too, but Ray may keep their resources reserved until this driver ends.
            raise ClusterError(
                f"the process that controls the training of {names} was killed, as happens when the driver's machine "
                "or pod runs out of memory: submit or train again to go on from the last checkpoint"
            ) from error
        except ray.exceptions.RayError as error:
            failure = failure_of(error, adapters=len(group.works))
        self._take_events()  # what ended before the failure needs no second try
        del self._groups.running[group.number]
        self._messages.forget(group.number)
        for name in group.leaving:
            self._clear(name)
        if failure is None:
            for work in group.works.values():
                self._evaluate(work, group.seconds(work.name))
        else:
            self._try_again(group, failure)
        self._update_metrics()

    def _try_again(self, group: Group, failure: CatClusterError) -> None:
        """Have what a failed group has left wait for groups of their own, or fail where one was by itself."""
        left = list(group.works.values())
        if not left:
            self._say(f"a group of workers without adapters failed: {failure}")
        elif isinstance(failure, StoreRefusedError):
            for work in left:
                self._fail(work, failure)
        elif len(left) > 1:
            # Whatever it was, one adapter may be the cause: halves find it, and the others get through.
            self._say(f"a pack of {len(left)} failed and is trained in two halves: {failure}")
            middle = len(left) // 2
            self._groups.wait_apart(left[:middle], left[middle:])
        elif self._is_service and group.is_open:
            # Others have come and gone: what failed may have been theirs, as were the restarts. In a service nobody
            # ever has the cluster to itself.
            self._say(f"{left[0].adapter_id} is tried once more in a group of its own: {failure}")
            self._groups.wait_apart(left)
        elif not self._is_service and isinstance(failure, OutOfMemoryError) and (self._training or self._evaluating):
            self._say(f"{left[0].adapter_id} waits until it has the cluster to itself: {failure}")
            self._groups.wait_alone(left[0])
        else:
            self._fail(left[0], failure)

    def _evaluate(self, work: Work, seconds: float) -> None:
        """Start evaluating a trained adapter. seconds: how long it trained."""
        work.run.note(work.adapter_id, state="evaluating")
        task = evaluate_on_ray(
            work, storage=self._storage, seconds=seconds, messages=self._messages, on_gpus=self._size.on_gpus
        )
        self._evaluating[task] = (work, seconds)

    def _end_evaluation(self, task: Any) -> None:
        """Keep the result of an evaluation, or start it again where its process or machine was lost."""
        work, seconds = self._evaluating.pop(task)
        try:
            self._keep(work, ray.get(task))
        except ray.exceptions.RayError as error:
            failure = failure_of(error, "evaluation")
            # Memory may have been short because of what ran beside it.
            may_pass = isinstance(failure, LostWorkerError | OutOfMemoryError)
            if may_pass and self._retries[work.name] < EVALUATION_RETRIES:
                self._retries[work.name] += 1
                self._evaluate(work, seconds)
            else:
                self._fail(work, failure)

    def _fail(self, work: Work, error: CatClusterError) -> None:
        self._keep(work, AdapterResult.failed(work.adapter_id, work.adapter.revision, error))

    def _keep(self, work: Work, result: AdapterResult) -> None:
        del self._works[work.name]
        self._retries.pop(work.name, None)
        work.run.note(
            work.adapter_id,
            state=result.outcome,
            reason=result.reason,
            permanent=result.permanent,
            metrics=result.summary()["metrics"],
        )
        work.run.listener.finished(result)
        self._settled[work.name] = (work, result)
        self._update_metrics()
        self._clear(work.name)

    def _clear(self, name: str) -> None:
        """Remove the checkpoints of an adapter that has its result, unless workers may look for them yet.

        Then it is done: whoever ends its run may be killed right after, and nobody would look for what is left of it.
        """
        if name in self._settled and not self._groups.is_needed(name):
            work, result = self._settled.pop(name)
            clear_checkpoints(work.adapter, result, work.run.registry.store, work.run.listener)
            self._on_result(work, result)

    def _update_metrics(self) -> None:
        self._metrics.set(telemetry.PACKS_RUNNING, len(self._groups.running))
        for spec, slots in zip((telemetry.SLOTS, telemetry.SLOTS_OCCUPIED), self._groups.slots, strict=True):
            self._metrics.set(spec, slots)
        states: list[str] = [adapter.state for run in self._runs for adapter in run.writer.progress.adapters]
        for state in telemetry.LABELS["state"].values:
            self._metrics.set(telemetry.ADAPTERS, states.count(state), state=state)
