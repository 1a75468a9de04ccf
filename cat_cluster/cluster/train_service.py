"""The training service: one process that takes runs from a queue in the store and trains their adapters as they come.

It claims a run when one of its adapters is due for a place, so of several services each works on other runs, and a run
whose holder has died is taken over. Whose turn it is says FairShare; who trains with whom, the engine room.
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Self

import ray

from cat_cluster.cluster.connection import ClusterSize, check_size, cluster_address, ray_connection
from cat_cluster.cluster.engine_room import EngineRoom, most_workers
from cat_cluster.cluster.failures import unwrapped
from cat_cluster.cluster.work import HeldRun, Work
from cat_cluster.errors import CatClusterError, RunError, StoreError, SupersededError
from cat_cluster.pipeline.job import AdapterResult
from cat_cluster.pipeline.prepare import Preparation, PreparedAdapter
from cat_cluster.registry import Registry
from cat_cluster.runs.fair_share import FairShare
from cat_cluster.runs.lease import LeaseWatch
from cat_cluster.runs.progress import RunProgress, RunState
from cat_cluster.runs.progress_writer import ProgressWriter
from cat_cluster.runs.queue import QueueEntry
from cat_cluster.runs.queue_reader import QueueReader
from cat_cluster.settings import Settings
from cat_cluster.spec.job import JobSpec, ResolvedAdapter
from cat_cluster.spec.sections import ClusterSpec
from cat_cluster.store import ObjectStore, open_store
from cat_cluster.training.step_report import StepReport

REFRESH_SECONDS = 0.5  # between two looks at the queue
LOOK_SECONDS = 5.0  # between two looks at a run that another service holds
CHECK_SECONDS = 0.2  # between two looks at a run that is held here, one after the other
KEPT_BASES = 2  # that photos are read with
PREPARED_AHEAD = 4  # runs whose photos are read while their adapters wait for a place


@dataclass(frozen=True)
class ServiceOptions:
    """How a training service works.

    name: of the service, of which one process runs at a time; groups: least and most groups of workers; cluster: how
    they train; owner_limits: the most adapters of an owner that train at once; bases: loaded before they are asked for.
    """

    name: str
    groups: tuple[int, int]
    cluster: ClusterSpec
    owner_limits: Mapping[str, int] = field(default_factory=dict)
    bases: tuple[str, ...] = ()


_Prepared = list[tuple[ResolvedAdapter, PreparedAdapter | CatClusterError]]


@dataclass(eq=False)
class _Held:
    """A run that the service works on. waiting: adapters without a place; begun: those that have one, or had."""

    entry: QueueEntry
    run: HeldRun
    preparation: Future[_Prepared] | None
    waiting: deque[Work] = field(default_factory=deque)
    begun: set[str] = field(default_factory=set)

    @property
    def has_ended(self) -> bool:
        return self.preparation is None and not self.waiting and not self.begun


class _Log:
    """A JobListener of a run that says what happens to it, a line each."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def message(self, text: str) -> None:
        self._say(text)

    def started(self, steps: Mapping[str, int], together: int) -> None:
        names = ", ".join(f"{adapter_id} ({own} steps)" for adapter_id, own in steps.items())
        self._say(f"training {names}; {together} together")

    def step(self, report: StepReport) -> None:
        """The run's record says it."""

    def images(self, adapter_id: str, done: int, total: int) -> None:
        """The run's record says when they are done."""

    def finished(self, result: AdapterResult) -> None:
        self._say(f"{result.outcome} {result.adapter_id}: {result.reason or result.revision}")


class TrainService:
    """Trains what the queue of a store asks for: call `turn` again and again. A context manager."""

    def __init__(
        self,
        store: ObjectStore,
        settings: Settings,
        options: ServiceOptions,
        size: ClusterSize,
        say: Callable[[str], None],
    ) -> None:
        self._store, self._say = store, say
        self._reader, self._lease = QueueReader(store), LeaseWatch(store, options.name)
        self._fair = FairShare(options.owner_limits)
        self._preparation = Preparation(settings, KEPT_BASES)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._folder = tempfile.TemporaryDirectory(prefix="cat-cluster-", ignore_cleanup_errors=True)
        least, most = options.groups
        self._room = EngineRoom(
            options.cluster,
            size,
            store.url,
            self._folder.name,
            groups=most,
            keep=least,
            bases=options.bases,
            on_result=self._on_result,
            say=say,
        )
        self._held: dict[str, _Held] = {}
        self._not_before: dict[str, float] = {}  # runs that others hold, and when to look at them again
        self._refreshed = self._checked = float("-inf")
        self._to_check: deque[str] = deque()
        self._trouble = ""  # of the store, as it was last said

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop at once; every run is given back, and goes on from its checkpoints wherever it is claimed next."""
        self._room.__exit__(kind, error, trace)
        self._thread.shutdown(cancel_futures=True)
        for held in self._held.values():
            with suppress(StoreError, SupersededError):
                held.run.give_back()
        self._folder.cleanup()

    def turn(self) -> None:
        """Look at the queue, give adapters places, and take note of what has ended.

        A store that cannot be reached is said once and asked again. Raises ClusterError as the engine room does.
        """
        try:
            self._look_at_queue()
            self._check_one()
        except StoreError as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                self._say(f"{error}; trying again")
        self._room.turn()

    def _look_at_queue(self) -> None:
        now = time.monotonic()
        if now - self._refreshed < REFRESH_SECONDS:
            return
        self._refreshed = now
        self._reader.refresh()
        for one in list(self._held.values()):
            if one.preparation is not None and one.preparation.done():
                self._take_prepared(one, one.preparation)
        waiting = [(entry, self._could_begin(entry)) for entry in self._reader.entries()]
        for entry in self._fair.order(waiting):
            held = self._held.get(entry.run_id)
            if held is None and self._ahead < PREPARED_AHEAD:
                self._claim(entry)
            elif held is not None and held.waiting and not self._begin(held):
                break  # nobody goes before whose turn it is
        self._trouble = ""

    @property
    def _ahead(self) -> int:
        """How many runs that are held have adapters without a place."""
        return sum(held.preparation is not None or bool(held.waiting) for held in self._held.values())

    def _could_begin(self, entry: QueueEntry) -> int:
        """How many adapters of a run could be given a place now; a run that is not held counts as one."""
        if (held := self._held.get(entry.run_id)) is not None:
            return len(held.waiting)
        return int(time.monotonic() >= self._not_before.get(entry.run_id, 0.0))

    def _claim(self, entry: QueueEntry) -> None:
        """Hold the run of an entry and read its photos, unless somebody else holds it or it has ended."""
        self._not_before[entry.run_id] = time.monotonic() + LOOK_SECONDS
        if self._lease.look(entry.run_id) == "ended":
            self._leave_queue(entry)
            return
        attempt = self._lease.claim(entry.run_id)
        if attempt is None:
            return
        try:
            job = attempt.run.read_spec()
            begun = RunProgress.begin(entry.run_id, job, state="running", attempt=attempt.number)
            writer = ProgressWriter(attempt, begun).__enter__()
        except RunError as error:
            self._say(f"{entry.run_id}: {error}")
            self._leave_queue(entry)
            return
        except StoreError:
            self._lease.forget(entry.run_id)  # so that it is claimed again
            raise
        del self._not_before[entry.run_id]
        run = HeldRun(job, attempt, writer, _Log(lambda text: self._say(f"{entry.run_id} ({job.name}): {text}")))
        held = self._held[entry.run_id] = _Held(entry, run, None)
        if attempt.stop_requested():
            self._stop(held)
            return
        held.preparation = self._thread.submit(self._prepare, job, run.registry)
        self._to_check.append(entry.run_id)

    def _prepare(self, job: JobSpec, registry: Registry) -> _Prepared:
        found: _Prepared = []
        for resolved in job.resolved():
            try:
                found.append((resolved, self._preparation.adapter(resolved, registry)))
            except CatClusterError as error:
                found.append((resolved, error))
        return found

    def _take_prepared(self, held: _Held, preparation: Future[_Prepared]) -> None:
        """Have a run's adapters wait for places; those that cannot be used have failed."""
        held.preparation = None
        for resolved, found in preparation.result():
            if isinstance(found, CatClusterError):
                result = AdapterResult.failed(resolved.id, "", found)
                held.run.note(resolved.id, state="failed", reason=result.reason, permanent=result.permanent)
                held.run.listener.finished(result)
                continue
            for warning in found.warnings:
                held.run.listener.message(f"warning: {warning}")
            held.waiting.append(Work(held.run, found))
        self._end_if_done(held)

    def _begin(self, held: _Held) -> bool:
        """Give a run's next adapter a place; False where there is none."""
        work = held.waiting[0]
        if not self._room.has_place(work):
            return False
        held.waiting.popleft()
        held.begun.add(work.name)
        self._fair.take(held.entry.owner)
        try:
            self._room.take([work])
        except SupersededError:
            self._lose(held)
        except StoreError:
            held.waiting.appendleft(work)
            held.begun.discard(work.name)
            self._fair.give_back(held.entry.owner)
            raise
        except CatClusterError as error:
            result = AdapterResult.failed(work.adapter_id, work.adapter.revision, error)
            held.run.note(work.adapter_id, state="failed", reason=result.reason, permanent=result.permanent)
            self._on_result(work, result)
        return True

    def _on_result(self, work: Work, result: AdapterResult) -> None:
        held = self._held[work.run.run_id]
        held.begun.discard(work.name)
        self._fair.give_back(held.entry.owner)
        self._end_if_done(held)

    def _end_if_done(self, held: _Held) -> None:
        if held.has_ended:
            self._end(held)

    def _end(self, held: _Held, state: RunState | None = None) -> None:
        """End a run, as its adapters say if not in a given state."""
        self._let_go(held)
        try:
            held.run.end(state)
            self._leave_queue(held.entry)
        except SupersededError:
            self._lease.forget(held.entry.run_id)
        except StoreError as error:
            self._lease.forget(held.entry.run_id)  # it is claimed again, and ends when the store can say so
            self._say(f"{held.entry.run_id}: {error}")

    def _check_one(self) -> None:
        """See whether one of the runs is held yet, and whether somebody asked it to stop; each in its turn."""
        if not self._to_check or time.monotonic() - self._checked < CHECK_SECONDS:
            return
        self._checked = time.monotonic()
        held = self._held.get(self._to_check.popleft())
        if held is None:
            return
        self._to_check.append(held.entry.run_id)
        if not held.run.attempt.is_current():
            self._lose(held)
        elif held.run.attempt.stop_requested():
            self._stop(held)

    def _stop(self, held: _Held) -> None:
        self._say(f"{held.entry.run_id}: stopped, as somebody asked")
        self._end(held, "stopped")

    def _lose(self, held: _Held) -> None:
        self._say(f"{held.entry.run_id}: another service or driver has taken it over")
        self._let_go(held)
        held.run.writer.leave()
        self._not_before[held.entry.run_id] = time.monotonic() + LOOK_SECONDS

    def _let_go(self, held: _Held) -> None:
        """Work no more on a run."""
        self._room.release(held.run)
        for _ in held.begun:
            self._fair.give_back(held.entry.owner)
        if held.preparation is not None:
            held.preparation.cancel()
        del self._held[held.entry.run_id]

    def _leave_queue(self, entry: QueueEntry) -> None:
        self._reader.remove(entry)
        self._lease.forget(entry.run_id)
        self._not_before.pop(entry.run_id, None)


def run_train_service(
    store_url: str,
    settings: Settings,
    options: ServiceOptions,
    say: Callable[[str], None],
    *,
    address: str | None = None,
) -> None:
    """Train what the queue of a storage asks for until somebody interrupts it: SIGTERM is a KeyboardInterrupt here.

    address: of the Ray cluster; None means RAY_ADDRESS, else a Ray started on this machine. Raises SpecError for a
    cluster that is too small for one group, ClusterError, StoreError.
    """
    address = None if ray.is_initialized() else cluster_address(address)
    store = open_store(store_url)
    store.check_access()
    with unwrapped("the service"), ray_connection(address) as size:
        check_size(options.cluster, store.url, size)
        if options.groups[0] * most_workers(options.cluster.workers) >= size.workers:
            say(
                f"warning: the groups that are kept take all {size.workers} {size.kind} of the cluster, and what is "
                "trained waits for one of them to be published with: keep fewer with --groups, or let the cluster grow"
            )
        # Once Ray is joined, which has a handler of its own that ends the process with nothing given back.
        signal.signal(signal.SIGTERM, _interrupt)
        with TrainService(store, settings, options, size, say) as service:
            say(f"training service {options.name}: waiting for runs in the queue of {store.url}")
            while True:
                service.turn()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Stop as Ctrl-C does, and ignore further signals while runs are given back."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt
