"""The training service: one process that takes runs from a queue in the store and trains their adapters as they come.

It claims a run when one of its adapters is due for a place, so of several services each works on other runs, and a run
whose holder has died is taken over. Whose turn it is says FairShare; who trains with whom, the engine room.
"""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from cat_cluster.cluster.connection import ClusterSize
from cat_cluster.cluster.engine_room import EngineRoom
from cat_cluster.cluster.failures import failure_of
from cat_cluster.cluster.queued_run import QueuedRun, RunLog, refused
from cat_cluster.cluster.service_report import ServiceReport
from cat_cluster.cluster.work import HeldRun, Work
from cat_cluster.errors import CatClusterError, ClusterError, ObjectUnreadableError, StoreError, SupersededError
from cat_cluster.pipeline.job import AdapterResult
from cat_cluster.pipeline.prepare import Preparation
from cat_cluster.runs.fair_share import FairShare
from cat_cluster.runs.lease import LeaseWatch
from cat_cluster.runs.progress import RunProgress, RunState
from cat_cluster.runs.progress_writer import ProgressWriter
from cat_cluster.runs.queue import QueueEntry
from cat_cluster.runs.queue_reader import QueueReader
from cat_cluster.runs.run import Attempt
from cat_cluster.settings import Settings
from cat_cluster.spec.sections import ClusterSpec
from cat_cluster.store import ObjectStore

REFRESH_SECONDS = 0.5  # between two looks at the queue
LOOK_SECONDS = 5.0  # between two looks at a run that another service holds
UNREADABLE_SECONDS = 300.0  # between two looks at a run of which the store cannot read something
CHECK_SECONDS = 0.2  # between two looks at a run that is held here, one after the other
KEPT_BASES = 2  # that photos are read with, beside those that are loaded before they are asked for
PREPARED_AHEAD = 4  # adapters whose turn is next for which runs are held: their photos are read before there is a place


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
        self._preparation = Preparation(settings, KEPT_BASES, keep=options.bases)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        for base in options.bases:
            self._thread.submit(self._load, base)
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
        self._held: dict[str, QueuedRun] = {}
        self._ending: dict[str, tuple[QueuedRun, RunState | None]] = {}  # what the store is yet to be told
        self._busy: set[tuple[str, str]] = set()  # ids and revisions of the adapters at work
        self._not_before: dict[str, float] = {}  # runs that others hold, and when to look at them again
        self._refreshed = self._checked = float("-inf")
        self._to_check: deque[str] = deque()
        self._trouble = ""  # of the store, as it was last said
        self._report = ServiceReport(store, options.name, options.cluster)

    def __enter__(self) -> Self:
        self._report.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop at once; every run is given back, and goes on from its checkpoints wherever it is claimed next."""
        try:
            self._room.__exit__(kind, error, trace)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)  # photos that are being read may take their time
            for held, state in self._ending.values():
                with suppress(StoreError, SupersededError):
                    held.run.end(state)
            for held in self._held.values():
                with suppress(StoreError, SupersededError):
                    held.run.give_back()
            self._report.__exit__()
            self._folder.cleanup()

    def turn(self) -> None:
        """Look at the queue, give adapters places, and take note of what has ended.

        A store that cannot be reached is said once and asked again. Raises ClusterError as the engine room does, and
        where another process of this service's name has taken a run over.
        """
        try:
            self._look_at_queue()
            if not self._trouble:
                self._take_all_prepared()
                if self._has_turns():
                    self._give_turns()
            self._check_one()
        except StoreError as error:
            self._say_trouble(error)
        self._room.turn()

    def _say_trouble(self, error: StoreError) -> None:
        if str(error) != self._trouble:
            self._trouble = str(error)
            self._say(f"{error}; trying again")

    def _look_at_queue(self) -> None:
        now = time.monotonic()
        if now - self._refreshed < REFRESH_SECONDS:
            return
        self._refreshed = now
        self._reader.refresh()
        self._write_ends()
        for run_id in self._not_before.keys() - {entry.run_id for entry in self._reader.entries()}:
            del self._not_before[run_id]  # others have brought them to their end
            self._lease.forget(run_id)
        self._take_all_prepared()
        self._give_turns()
        self._report.show(self._reader.entries(), self._held, *self._room.at_work)
        self._trouble = ""

    def _has_turns(self) -> bool:
        """Whether an adapter waits for which there is a place: it needs no look at the store to begin."""
        ready = (self._next_work(held) for held in self._held.values())
        return any(work is not None and self._room.has_place(work) for work in ready)

    def _next_work(self, held: QueuedRun) -> Work | None:
        """Return the adapter of a run whose turn is next; None where others have at work all that wait."""
        return next((one for one in held.waiting if one.identity not in self._busy), None)

    def _give_turns(self) -> None:
        """Give places as long as there are any, and hold the runs of those who are next."""
        ahead = sum(held.preparation is not None for held in self._held.values())
        is_full = False
        for entry in self._fair.order([(entry, self._could_begin(entry)) for entry in self._reader.entries()]):
            held = self._held.get(entry.run_id)
            if held is None:
                ahead += int(ahead < PREPARED_AHEAD and self._claim(entry))
            elif held.waiting and (is_full or not self._begin(held)):
                is_full = True  # nobody goes before whose turn it is
                ahead += 1
            if is_full and ahead >= PREPARED_AHEAD:
                return

    def _could_begin(self, entry: QueueEntry) -> int:
        """How many adapters of a run could be given a place now; a run that is not held counts as one."""
        if (held := self._held.get(entry.run_id)) is not None:
            return sum(work.identity not in self._busy for work in held.waiting)
        return int(time.monotonic() >= self._not_before.get(entry.run_id, 0.0))

    def _claim(self, entry: QueueEntry) -> bool:
        """Hold the run of an entry and read its photos; False where somebody else holds it or it has ended."""
        self._not_before[entry.run_id] = time.monotonic() + LOOK_SECONDS
        try:
            if self._lease.look(entry.run_id) == "ended":
                self._leave_queue(entry)
                return False
            attempt = self._lease.claim(entry.run_id)
        except ObjectUnreadableError as error:
            self._not_before[entry.run_id] = time.monotonic() + UNREADABLE_SECONDS
            self._say(f"{entry.run_id}: {error}")
            return False
        if attempt is None:
            return False
        try:
            return self._hold(entry, attempt)
        except StoreError:
            self._lease.forget(entry.run_id)  # so that it is claimed again
            raise

    def _hold(self, entry: QueueEntry, attempt: Attempt) -> bool:
        """Begin with a run that was claimed; False where nothing can be done with it."""
        try:
            job, is_to_stop = attempt.run.read_spec(), attempt.run.asked_to_stop()
            begun = RunProgress.begin(entry.run_id, job, state="running", attempt=attempt.number)
            writer = ProgressWriter(attempt, begun).__enter__()
        except SupersededError:
            return False  # it stays in the queue for whoever has it now
        except CatClusterError as error:
            if isinstance(error, StoreError) and not isinstance(error, ObjectUnreadableError):
                raise
            self._refuse(entry, attempt, error)
            return False
        del self._not_before[entry.run_id]
        run = HeldRun(job, attempt, writer, RunLog(lambda text: self._say(f"{entry.run_id} ({job.name}): {text}")))
        held = self._held[entry.run_id] = QueuedRun(entry, run)
        self._to_check.append(entry.run_id)
        if is_to_stop:  # an earlier attempt was asked, and ended before it knew
            self._stop(held)
            return False
        held.preparation = self._thread.submit(self._prepare, held)
        return True

    def _refuse(self, entry: QueueEntry, attempt: Attempt, error: CatClusterError) -> None:
        """End a run that nothing can be done with, so that whoever waits for it hears why."""
        self._say(f"{entry.run_id}: {error}")
        with suppress(SupersededError):
            attempt.check()
            attempt.run.write_progress(refused(entry, attempt.number, str(error)))
            self._leave_queue(entry)

    def _prepare(self, held: QueuedRun) -> None:
        for resolved in held.run.job.resolved():
            if self._held.get(held.entry.run_id) is not held:
                return  # it was let go
            try:
                held.found.append((resolved, self._preparation.adapter(resolved, held.run.registry)))
            except Exception as error:  # whatever it is, it is this adapter's own
                held.found.append((resolved, failure_of(error, "reading its photos and its base")))

    def _load(self, base: str) -> None:
        with suppress(CatClusterError):  # an adapter that needs it says what is wrong
            self._preparation.load(base)

    def _take_all_prepared(self) -> None:
        for one in list(self._held.values()):
            if one.preparation is not None:
                self._take_prepared(one, one.preparation)

    def _take_prepared(self, held: QueuedRun, preparation: Future[None]) -> None:
        """Have adapters that are read wait for places; those that cannot be used have failed."""
        is_last = preparation.done()  # asked first: what it had found by then is looked at
        while held.found:
            resolved, found = held.found.popleft()
            if isinstance(found, CatClusterError):
                self._fail(held, AdapterResult.failed(resolved.id, "", found))
                continue
            for warning in found.warnings:
                held.run.listener.message(f"warning: {warning}")
            held.waiting.append(Work(held.run, found))
        if is_last:
            held.preparation = None
            self._end_if_done(held)

    def _fail(self, held: QueuedRun, result: AdapterResult) -> None:
        held.run.note(result.adapter_id, state="failed", reason=result.reason, permanent=result.permanent)
        held.run.listener.finished(result)

    def _begin(self, held: QueuedRun) -> bool:
        """Give a run's next adapter a place; False where there is none.

        One that another run has at work as well waits for what becomes of that: they would write the same objects.
        """
        work = self._next_work(held)
        if work is None:
            return True
        if not self._room.has_place(work):
            return False
        held.waiting.remove(work)
        held.begun[work.name] = work
        self._busy.add(work.identity)
        self._fair.take(held.entry.owner)
        try:
            self._room.take([work])
        except SupersededError:
            self._lose(held)
        except StoreError:
            held.waiting.appendleft(work)
            self._leave(held, work)
            raise
        except CatClusterError as error:
            result = AdapterResult.failed(work.adapter_id, work.adapter.revision, error)
            self._fail(held, result)
            self._on_result(work, result)
        return True

    def _on_result(self, work: Work, result: AdapterResult) -> None:
        held = self._held.get(work.run.run_id)
        if held is None or held.run is not work.run:
            return  # it was released meanwhile
        self._leave(held, work)
        self._end_if_done(held)

    def _leave(self, held: QueuedRun, work: Work) -> None:
        """Note that an adapter is no longer at work."""
        del held.begun[work.name]
        self._busy.discard(work.identity)
        self._fair.give_back(held.entry.owner)

    def _end_if_done(self, held: QueuedRun) -> None:
        if held.has_ended:
            self._end(held)

    def _end(self, held: QueuedRun, state: RunState | None = None) -> None:
        """End a run, as its adapters say if not in a given state."""
        self._let_go(held)
        self._ending[held.entry.run_id] = held, state
        try:
            self._write_ends()
        except StoreError as error:
            self._say_trouble(error)

    def _write_ends(self) -> None:
        """Write how runs have ended, which stay claimed until the store can say so."""
        for run_id, (held, state) in list(self._ending.items()):
            try:
                held.run.end(state)
            except SupersededError:
                self._lease.forget(run_id)
            else:
                self._leave_queue(held.entry)
            del self._ending[run_id]

    def _check_one(self) -> None:
        """See whether one of the runs is held yet, and whether somebody asked it to stop; each in its turn."""
        if not self._to_check or time.monotonic() - self._checked < CHECK_SECONDS:
            return
        self._checked = time.monotonic()
        self._to_check.rotate(-1)
        held = self._held[self._to_check[-1]]
        if not held.run.attempt.is_current():
            self._lose(held)
        elif held.run.attempt.run.asked_to_stop():
            self._stop(held)

    def _stop(self, held: QueuedRun) -> None:
        self._say(f"{held.entry.run_id}: stopped, as somebody asked")
        self._end(held, "stopped")

    def _lose(self, held: QueuedRun) -> None:
        attempt = held.run.attempt
        self._say(f"{held.entry.run_id}: another service or driver has taken it over")
        self._let_go(held)
        held.run.writer.leave()
        self._not_before[held.entry.run_id] = time.monotonic() + LOOK_SECONDS
        claim = attempt.run.claim_of(attempt.number + 1)
        if claim is not None and claim.service == self._lease.service:
            raise ClusterError(
                f"another process of the training service {claim.service}, on {claim.host}, has taken "
                f"{held.entry.run_id} over: one of a name may run, and this one ends; give one of them another --name"
            )

    def _let_go(self, held: QueuedRun) -> None:
        """Work no more on a run."""
        self._room.release(held.run)
        for work in list(held.begun.values()):
            self._leave(held, work)
        if held.preparation is not None:
            held.preparation.cancel()
        self._to_check.remove(held.entry.run_id)
        del self._held[held.entry.run_id]

    def _leave_queue(self, entry: QueueEntry) -> None:
        self._reader.remove(entry)
        self._lease.forget(entry.run_id)
        self._not_before.pop(entry.run_id, None)
