"""A whole job on a Ray cluster: packs side by side, each adapter measured and published by a task of its own.

The driver holds one attempt of the run (runs.py). What training has reached is in the store at every moment, so a
driver that takes over goes on from there.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from cat_cluster import telemetry
from cat_cluster.cluster.connection import PACK_THREAD, ClusterSize, check_cluster, ray_session
from cat_cluster.cluster.event_queue import EventQueue
from cat_cluster.cluster.ray_jobs import current_job
from cat_cluster.cluster.run_progress import RunProgress
from cat_cluster.cluster.run_writer import ProgressWriter
from cat_cluster.cluster.runs import Attempt, FencedStore, Run, run_id_of
from cat_cluster.cluster.tasks import evaluate_on_ray, pack_size_on_ray
from cat_cluster.cluster.trainer import PackOrder, train_on_ray, workers_of
from cat_cluster.errors import CatClusterError
from cat_cluster.pipeline.job import AdapterResult, JobListener, already_published, plan_packs
from cat_cluster.pipeline.prepare import PreparedAdapter, checkpoints_of, prepare
from cat_cluster.registry import Registry
from cat_cluster.settings import Settings
from cat_cluster.spec.job import JobSpec
from cat_cluster.store import open_store
from cat_cluster.telemetry.ray_backend import RayBackend

POLL_SECONDS = 0.1
HALT_SECONDS = 10.0  # that a pack's thread has to end in when the driver leaves early
WATCH_SECONDS = 2.0  # between two looks whether the attempt still stands and nobody asked it to stop


def run_on_ray(
    job: JobSpec, store_url: str, settings: Settings, listener: JobListener, *, address: str | None = None
) -> list[AdapterResult]:
    """Train, measure and publish every adapter of a job on a Ray cluster; see workflow.run_job for what it promises.

    address: the cluster; None means RAY_ADDRESS, else a Ray started on this machine. Everything is validated before
    training starts: spec, photos, bases, judges, storage, cluster. Raises SupersededError when another driver takes
    the run over, KeyboardInterrupt when somebody asks it to stop.
    """
    store = open_store(store_url)
    store.check_access()
    prepared = prepare(job, settings)
    run = Run(store, run_id_of(job, [adapter.image_digests for adapter in prepared]))
    with ray_session(address) as size:
        check_cluster(job, store.url, size)
        run.write_spec(job)
        attempt = run.claim(job=current_job())
        progress = RunProgress.begin(run.run_id, job, state="running", attempt=attempt.number)
        with ProgressWriter(attempt, progress) as writer:
            return _Driver(job, settings, listener, attempt, writer, size).run(prepared)


@dataclass(eq=False)
class _Pack:
    """A pack that trains in a thread of its own."""

    order: PackOrder
    adapters: list[PreparedAdapter]
    started: float = field(default_factory=time.perf_counter)
    error: CatClusterError | None = None
    thread: threading.Thread | None = None
    controller: Any = None
    halted: bool = False

    def start(self) -> None:
        self.thread = threading.Thread(target=self._train, name=f"{PACK_THREAD}{self.order.number}", daemon=True)
        self.thread.start()

    def _train(self) -> None:
        try:
            train_on_ray(self.order, self._control)
        except CatClusterError as error:
            self.error = error
        except Exception as error:  # Ray is gone or refuses: the adapters' record must say so all the same
            self.error = CatClusterError(f"{type(error).__name__}: {str(error).strip()[-500:]}")

    def _control(self, controller: Any) -> None:
        self.controller = controller
        if self.halted:
            ray.kill(controller)

    def halt(self) -> None:
        """End the workers; Ray may be shut down when the thread has ended."""
        self.halted = True
        if self.controller is not None:
            ray.kill(self.controller)

    @property
    def done(self) -> bool:
        return self.thread is not None and not self.thread.is_alive()


class _Driver:
    def __init__(
        self,
        job: JobSpec,
        settings: Settings,
        listener: JobListener,
        attempt: Attempt,
        writer: ProgressWriter,
        size: ClusterSize,
    ) -> None:
        self._job, self._settings, self._listener = job, settings, listener
        self._attempt, self._writer, self._size = attempt, writer, size
        self._registry = Registry(FencedStore(attempt))
        self._results: dict[str, AdapterResult] = {}
        self._waiting: deque[list[PreparedAdapter]] = deque()
        self._running: dict[int, _Pack] = {}
        self._measuring: dict[Any, PreparedAdapter] = {}
        self._packs = 0
        self._watched = time.monotonic()
        self._metrics = telemetry.Metrics(RayBackend())
        self._board = EventQueue.start()

    def run(self, prepared: Sequence[PreparedAdapter]) -> list[AdapterResult]:
        """Bring every adapter to its end and return the results in the order given."""
        self._plan(prepared)
        try:
            while self._waiting or self._running or self._measuring:
                while self._waiting and len(self._running) < self._side_by_side():
                    self._start(self._waiting.popleft())
                self._take_events()
                for pack in [pack for pack in self._running.values() if pack.done]:
                    self._end(pack)
                self._take_results()
                self._watch()
        finally:
            self._halt()
        return [self._results[adapter.resolved.id] for adapter in prepared]

    def _halt(self) -> None:
        """End the packs that still train; none does unless the driver leaves early."""
        for pack in self._running.values():
            pack.halt()
        for pack in self._running.values():
            if pack.thread is not None:
                pack.thread.join(HALT_SECONDS)

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
                self._measure(adapter, 0.0)
            else:
                untrained.append(adapter)
        packs = plan_packs(untrained, self._registry.store, self._pack_size)
        self._waiting.extend(packs)
        if len(packs) > 1:
            self._listener.message(
                f"{len(untrained)} adapters in {len(packs)} packs, {min(len(packs), self._side_by_side())} at a time, "
                f"on {self._size.workers} {'GPUs' if self._size.on_gpus else 'CPUs'}"
            )

    def _pack_size(self, group: Sequence[PreparedAdapter]) -> int:
        on_gpus, together = self._size.on_gpus, self._side_by_side()
        try:
            return pack_size_on_ray(group, self._job, self._settings, on_gpus=on_gpus, side_by_side=together)
        except ray.exceptions.RayError as error:
            self._listener.message(f"measuring what memory allows failed ({type(error).__name__}): packs of one")
            return 1

    def _side_by_side(self) -> int:
        workers = self._job.cluster.workers
        return max(1, self._size.workers // (workers if isinstance(workers, int) else workers[1]))

    def _start(self, adapters: list[PreparedAdapter]) -> None:
        workers = workers_of(self._job, adapters)
        if workers != self._job.cluster.workers:
            self._listener.message(
                f"{adapters[0].resolved.id}{' and others' if len(adapters) > 1 else ''}: {workers} workers, for a step "
                "has no more rows"
            )
        order = PackOrder(
            number=self._packs,
            job=self._job,
            adapters=tuple((adapter.resolved, adapter.revision) for adapter in adapters),
            storage=self._attempt.run.store.url,
            run_id=self._attempt.run.run_id,
            attempt=self._attempt.number,
            settings=self._settings,
            board=self._board,
            workers=workers,
            on_gpus=self._size.on_gpus,
        )
        self._packs += 1
        self._running[order.number] = _Pack(order, adapters)
        self._listener.pack_started(order.ids, adapters[0].resolved.training.steps)
        for adapter_id in order.ids:
            self._writer.adapter(adapter_id, state="training")
        self._running[order.number].start()
        self._count()

    def _take_events(self) -> None:
        for kind, *event in self._board.take():
            if kind == "step":
                (report,) = event
                self._listener.step(report)
                for adapter_id, losses in report.losses.items():
                    tokens = {token: {"identity": one.identity, "cat": one.cat} for token, one in losses.items()}
                    self._writer.adapter(adapter_id, step=report.step, losses=tokens)
            elif kind == "images":
                self._listener.images(*event)
            elif kind == "message":
                self._listener.message(*event)
            elif kind == "failed":
                self._fail(*event)

    def _end(self, pack: _Pack) -> None:
        """Hand the trained adapters of a pack on to be measured, or try those of a failed one apart."""
        del self._running[pack.order.number]
        self._take_events()
        seconds = time.perf_counter() - pack.started
        left = [adapter for adapter in pack.adapters if adapter.resolved.id not in self._results]
        if pack.error is None:
            for adapter in left:
                self._measure(adapter, seconds)
        elif len(left) == 1:
            self._fail(left[0].resolved.id, str(pack.error))
        else:
            # Whatever it was, one adapter may be the cause: halves find it, and the others get through.
            self._attempt.check()
            self._listener.message(f"a pack of {len(left)} failed and is trained in two halves: {pack.error}")
            middle = len(left) // 2
            self._waiting.extendleft([left[middle:], left[:middle]])
        self._count()

    def _measure(self, adapter: PreparedAdapter, seconds: float) -> None:
        self._writer.adapter(adapter.resolved.id, state="evaluating")
        task = evaluate_on_ray(
            adapter,
            self._settings,
            storage=self._attempt.run.store.url,
            run_id=self._attempt.run.run_id,
            attempt=self._attempt.number,
            seconds=seconds,
            board=self._board,
            on_gpus=self._size.on_gpus,
        )
        self._measuring[task] = adapter

    def _take_results(self) -> None:
        if not self._measuring:
            time.sleep(POLL_SECONDS)
            return
        ready, _ = ray.wait(list(self._measuring), timeout=POLL_SECONDS)
        for task in ready:
            adapter = self._measuring.pop(task)
            try:
                self._keep(ray.get(task))
            except ray.exceptions.RayError as error:
                self._attempt.check()
                cause = getattr(error, "cause", None) or error
                self._fail(adapter.resolved.id, f"measuring stopped: {str(cause).strip()[-500:]}")

    def _fail(self, adapter_id: str, reason: str) -> None:
        revision = self._writer.progress.adapter(adapter_id).revision or ""
        self._keep(AdapterResult(adapter_id, revision, "failed", reason=reason))

    def _keep(self, result: AdapterResult) -> None:
        self._results[result.adapter_id] = result
        self._writer.adapter(
            result.adapter_id, state=result.outcome, reason=result.reason, metrics=result.summary()["metrics"]
        )
        self._listener.finished(result)
        self._count()

    def _watch(self) -> None:
        """Stop when another driver has the run, or when somebody asks for it."""
        if time.monotonic() - self._watched < WATCH_SECONDS:
            return
        self._watched = time.monotonic()
        self._attempt.check()
        if self._attempt.stop_requested():
            raise KeyboardInterrupt

    def _count(self) -> None:
        self._metrics.set(telemetry.PACKS_RUNNING, len(self._running))
        states: list[str] = [adapter.state for adapter in self._writer.progress.adapters]
        for state in telemetry.LABELS["state"].values:
            self._metrics.set(telemetry.ADAPTERS, states.count(state), state=state)
