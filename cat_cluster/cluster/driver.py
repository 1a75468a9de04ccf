"""A whole job on a Ray cluster: packs train side by side, and a task evaluates and publishes each trained adapter.

The driver holds one attempt of the run (runs.py). What training has reached is in the store at every moment, so a
driver that takes over goes on from there.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import ray

from cat_cluster import telemetry
from cat_cluster.cluster.connection import ClusterSize, await_workers, check_cluster, cluster_address, ray_connection
from cat_cluster.cluster.failures import failure_of, unwrapped
from cat_cluster.cluster.groups import Group, Groups
from cat_cluster.cluster.messages import Messages
from cat_cluster.cluster.ray_jobs import current_job
from cat_cluster.cluster.tasks import evaluate_on_ray, pack_size_on_ray
from cat_cluster.cluster.trainer import PackSpec, start_pack
from cat_cluster.errors import (
    CatClusterError,
    ClusterError,
    LostWorkerError,
    OutOfMemoryError,
    StoreRefusedError,
)
from cat_cluster.pipeline.job import (
    AdapterResult,
    JobListener,
    already_published,
    by_kind,
    clear_checkpoints,
    tell_warnings,
)
from cat_cluster.pipeline.prepare import PreparedAdapter, checkpoints_of, prepare
from cat_cluster.registry import Registry
from cat_cluster.runs.progress import RunProgress
from cat_cluster.runs.progress_writer import ProgressWriter
from cat_cluster.runs.run import Attempt, FencedStore, Run, run_id_of
from cat_cluster.settings import Settings
from cat_cluster.spec.job import JobSpec
from cat_cluster.store import open_store
from cat_cluster.telemetry.ray_backend import RayBackend
from cat_cluster.training.loop import StepReport

POLL_SECONDS = 0.1
CANCEL_SECONDS = 10.0  # that tasks have to end in when the driver stops early
EVALUATION_RETRIES = 3  # of one whose process or machine is lost
CHECK_SECONDS = 2.0  # between two checks whether the attempt is superseded or asked to stop


def run_on_ray(
    job: JobSpec, store_url: str, settings: Settings, listener: JobListener, *, address: str | None = None
) -> list[AdapterResult]:
    """Train, evaluate and publish every adapter of a job on a Ray cluster, with the promises of pipeline.job.run_job.

    settings: the driver's own; a worker reads its own from its environment, which a Ray started here has from this
    process. address: the cluster; None means RAY_ADDRESS, else a Ray started on this machine. Everything is validated
    before training starts: spec, photos, bases, judges, storage, cluster. Raises SupersededError when another driver
    takes the run over, KeyboardInterrupt when somebody asks it to stop.
    """
    address = None if ray.is_initialized() else cluster_address(address)
    store = open_store(store_url)
    store.check_access()
    prepared = prepare(job, settings, Registry(store))
    run = Run(store, run_id_of(job, [adapter.image_digests for adapter in prepared]))
    with (
        unwrapped("the run"),
        ray_connection(address) as size,
        tempfile.TemporaryDirectory(prefix="cat-cluster-", ignore_cleanup_errors=True) as folder,
    ):
        size = await_workers(job, size, listener.message)
        check_cluster(job, store.url, size)
        run.write_spec(job)
        attempt = run.claim(job=current_job())
        progress = RunProgress.begin(run.run_id, job, state="running", attempt=attempt.number)
        with ProgressWriter(attempt, progress) as writer, unwrapped("the run"):
            return _Driver(job, listener, attempt, writer, size, folder).run(prepared)


class _Driver:
    def __init__(
        self,
        job: JobSpec,
        listener: JobListener,
        attempt: Attempt,
        writer: ProgressWriter,
        size: ClusterSize,
        folder: str,
    ) -> None:
        self._job, self._listener, self._attempt, self._writer = job, listener, attempt, writer
        self._size, self._folder = size, folder
        self._registry = Registry(FencedStore(attempt))
        self._adapters: dict[str, PreparedAdapter] = {}
        self._results: dict[str, AdapterResult] = {}
        self._groups = Groups(max(1, size.workers // _most(job.cluster.workers)))
        self._training: dict[Any, Group] = {}  # by the references of their tasks, as are the evaluations
        self._evaluating: dict[Any, tuple[PreparedAdapter, float]] = {}
        self._retries: Counter[str] = Counter()  # of evaluations, by adapter
        self._checked = time.monotonic()
        self._metrics = telemetry.Metrics(RayBackend())
        self._messages = Messages.start()

    def run(self, prepared: Sequence[PreparedAdapter]) -> list[AdapterResult]:
        """Bring every adapter to its end and return the results in the order given."""
        self._adapters = {adapter.resolved.id: adapter for adapter in prepared}
        try:
            tell_warnings(prepared, self._listener)
            self._plan(prepared)
            while self._evaluating or not self._groups.idle:
                while (group := self._groups.next(busy=bool(self._evaluating))) is not None:
                    self._start(group)
                for group, newcomers in self._groups.fill():
                    self._began(newcomers, len(group.adapters))
                self._give_orders()
                ready, _ = ray.wait([*self._training, *self._evaluating], timeout=POLL_SECONDS)
                self._take_events()
                for task in ready:
                    if task in self._training:
                        self._end_group(task)
                    else:
                        self._end_evaluation(task)
                self._check_attempt()
        finally:
            _cancel([*self._training, *self._evaluating])  # none is left unless the driver stops early
        return [self._results[adapter.resolved.id] for adapter in prepared]

    def _plan(self, prepared: Sequence[PreparedAdapter]) -> None:
        untrained = []
        for adapter in prepared:
            self._writer.adapter(adapter.resolved.id, revision=adapter.revision)
            done = already_published(adapter, self._registry)
            if done is not None:
                self._keep(done)
                continue
            stored = checkpoints_of(adapter, self._registry.store).steps()
            self._writer.adapter(adapter.resolved.id, step=max(stored, default=0))
            if adapter.resolved.training.steps in stored:
                self._evaluate(adapter, 0.0)
            else:
                untrained.append(adapter)
        for kind, adapters in by_kind(untrained, self._registry.store).items():
            self._groups.wait(kind, self._pack_size(adapters), adapters)
        if (packs := self._groups.to_come) > 1:
            self._listener.message(
                f"{len(untrained)} adapters in {packs} packs, {min(packs, self._groups.most)} at a time, "
                f"on {self._size.workers} {self._size.kind}"
            )

    def _pack_size(self, adapters: Sequence[PreparedAdapter]) -> int:
        on_gpus, together = self._size.on_gpus, self._groups.most
        try:
            return pack_size_on_ray(adapters, self._job, on_gpus=on_gpus, side_by_side=together)
        except ray.exceptions.RayError as error:
            self._listener.message(f"packs of one: {failure_of(error, 'measuring the memory of a step')}")
            return 1

    def _threads(self, workers: int | tuple[int, int]) -> int:
        """Share the cluster's CPUs among the workers of a group that starts and of those that train beside it."""
        groups = min(self._groups.most, len(self._groups.running) + self._groups.to_come)
        return max(1, int(self._size.cpus) // (groups * _most(workers)))

    def _start(self, group: Group) -> None:
        adapters = list(group.adapters.values())
        workers = _workers_of(self._job, adapters)
        if workers != self._job.cluster.workers:
            self._listener.message(f"{_names(group.adapters)}: {workers} workers, as many as rows in a step")
        spec = PackSpec(
            number=group.number,
            job=self._job,
            storage=self._attempt.run.store.url,
            run_id=self._attempt.run.run_id,
            attempt=self._attempt.number,
            messages=self._messages,
            workers=workers,
            threads=self._threads(workers),
            on_gpus=self._size.on_gpus,
            folder=self._folder,
        )
        self._give_orders()  # before its workers ask for one
        self._began(adapters, len(adapters))
        self._training[start_pack(spec)] = group

    def _began(self, adapters: Sequence[PreparedAdapter], together: int) -> None:
        self._listener.started({one.resolved.id: one.resolved.training.steps for one in adapters}, together)
        for adapter in adapters:
            self._writer.adapter(adapter.resolved.id, state="training")
        self._update_metrics()

    def _give_orders(self) -> None:
        for group, order in self._groups.orders():
            self._messages.give(group.number, order)

    def _take_events(self) -> None:
        for kind, *event in self._messages.take():
            if kind == "step":
                self._note_step(*event)
            elif kind == "images":
                self._listener.images(*event)
            elif event[0] in self._groups.running:  # else its task has ended, and more is known than this event says
                number, *said = event
                self._hear(self._groups.running[number], kind, *said)

    def _note_step(self, report: StepReport) -> None:
        self._listener.step(report)
        for adapter_id, losses in report.losses.items():
            tokens = {token: {"identity": one.identity, "cat": one.cat} for token, one in losses.items()}
            self._writer.adapter(adapter_id, step=report.done[adapter_id], losses=tokens)

    def _hear(self, group: Group, kind: str, *said: Any) -> None:
        """Take note of what the workers of a group say; after a restart they may say it again."""
        if kind == "ended":
            for adapter_id in [name for name in said[0] if name in group.adapters]:
                self._evaluate(group.end(adapter_id), group.seconds(adapter_id))
        elif kind == "failed" and said[0] in group.adapters:
            group.end(said[0])
            self._fail(*said)
        elif kind == "followed":
            for adapter_id in group.forget(*said):
                self._clear(adapter_id)
        elif kind == "restart":
            self._listener.message(f"{_names(group.adapters)}: {said[0]}")

    def _end_group(self, task: Any) -> None:
        """Start evaluating what a group has left, or split it where it failed."""
        group = self._training.pop(task)
        try:
            failure: CatClusterError | None = ray.get(task)
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            # The workers have ended too, but Ray may keep their resources reserved until this driver ends.
            raise ClusterError(
                f"the process that controls the training of {', '.join(group.adapters)} was killed, as happens when "
                "the driver's machine or pod runs out of memory: submit or train again to go on from the last "
                "checkpoint"
            ) from error
        except ray.exceptions.RayError as error:
            failure = failure_of(error, adapters=len(group.adapters))
        self._take_events()  # what ended before the failure needs no second try
        del self._groups.running[group.number]
        for adapter_id in group.leaving:
            self._clear(adapter_id)
        left = list(group.adapters.values())
        if failure is None:
            for adapter in left:
                self._evaluate(adapter, group.seconds(adapter.resolved.id))
        elif len(left) == 1 and isinstance(failure, OutOfMemoryError) and (self._training or self._evaluating):
            self._attempt.check()
            self._listener.message(f"{left[0].resolved.id} waits until it has the cluster to itself: {failure}")
            self._groups.wait_alone(left[0])
        elif len(left) == 1 or isinstance(failure, StoreRefusedError):
            for adapter in left:
                self._fail(adapter.resolved.id, failure)
        elif left:
            # Whatever it was, one adapter may be the cause: halves find it, and the others get through.
            self._attempt.check()
            self._listener.message(f"a pack of {len(left)} failed and is trained in two halves: {failure}")
            middle = len(left) // 2
            self._groups.wait_apart(left[:middle], left[middle:])
        self._update_metrics()

    def _evaluate(self, adapter: PreparedAdapter, seconds: float) -> None:
        """Start evaluating a trained adapter. seconds: how long it trained."""
        self._writer.adapter(adapter.resolved.id, state="evaluating")
        task = evaluate_on_ray(
            adapter,
            storage=self._attempt.run.store.url,
            run_id=self._attempt.run.run_id,
            attempt=self._attempt.number,
            seconds=seconds,
            messages=self._messages,
            on_gpus=self._size.on_gpus,
        )
        self._evaluating[task] = (adapter, seconds)

    def _clear(self, adapter_id: str) -> None:
        """Remove the checkpoints of an adapter that has its result, unless workers may look for them yet."""
        if not self._groups.is_needed(adapter_id):
            result = self._results.get(adapter_id)
            clear_checkpoints(self._adapters[adapter_id], result, self._registry.store, self._listener)

    def _end_evaluation(self, task: Any) -> None:
        """Keep the result of an evaluation, or start it again where its process or machine was lost."""
        adapter, seconds = self._evaluating.pop(task)
        try:
            self._keep(ray.get(task))
            self._clear(adapter.resolved.id)
        except ray.exceptions.RayError as error:
            self._attempt.check()
            failure, adapter_id = failure_of(error, "evaluation"), adapter.resolved.id
            # Memory may have been short because of what ran beside it.
            may_pass = isinstance(failure, LostWorkerError | OutOfMemoryError)
            if may_pass and self._retries[adapter_id] < EVALUATION_RETRIES:
                self._retries[adapter_id] += 1
                self._evaluate(adapter, seconds)
            else:
                self._fail(adapter_id, failure)

    def _fail(self, adapter_id: str, error: CatClusterError) -> None:
        revision = self._writer.progress.adapter(adapter_id).revision or ""
        self._keep(AdapterResult.failed(adapter_id, revision, error))

    def _keep(self, result: AdapterResult) -> None:
        self._results[result.adapter_id] = result
        self._writer.adapter(
            result.adapter_id,
            state=result.outcome,
            reason=result.reason,
            permanent=result.permanent,
            metrics=result.summary()["metrics"],
        )
        self._listener.finished(result)
        self._update_metrics()

    def _check_attempt(self) -> None:
        """Stop when another driver has taken over the run, or when somebody asks for it."""
        if time.monotonic() - self._checked < CHECK_SECONDS:
            return
        self._checked = time.monotonic()
        self._attempt.check()
        if self._attempt.stop_requested():
            raise KeyboardInterrupt

    def _update_metrics(self) -> None:
        self._metrics.set(telemetry.PACKS_RUNNING, len(self._groups.running))
        states: list[str] = [adapter.state for adapter in self._writer.progress.adapters]
        for state in telemetry.LABELS["state"].values:
            self._metrics.set(telemetry.ADAPTERS, states.count(state), state=state)


def _workers_of(job: JobSpec, pack: Sequence[PreparedAdapter]) -> int | tuple[int, int]:
    """Return how many workers a pack gets: as the spec says, but no more than it has rows in a step."""
    rows = sum(adapter.rows for adapter in pack)
    workers = job.cluster.workers
    if isinstance(workers, int):
        return min(workers, rows)
    least, most = (min(bound, rows) for bound in workers)
    return least if least == most else (least, most)


def _names(adapters: Iterable[str]) -> str:
    first, *others = adapters
    return f"{first} and {len(others)} more" if others else first


def _most(workers: int | tuple[int, int]) -> int:
    return workers if isinstance(workers, int) else workers[1]


def _cancel(tasks: Sequence[Any]) -> None:
    """End tasks by an interrupt, on which Ray Train stops its workers, and after a while by force."""
    if not tasks:
        return
    for task in tasks:
        ray.cancel(task, recursive=False)
    _, left = ray.wait(tasks, num_returns=len(tasks), timeout=CANCEL_SECONDS)
    for task in left:
        ray.cancel(task, force=True)
