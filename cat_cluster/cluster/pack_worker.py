"""What each worker of a pack does: prepare the adapters it is told of, train its rows, report to the driver."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from weakref import WeakValueDictionary

import ray.train
import ray.train.torch
import torch
from torch import distributed

from cat_cluster.cluster.failures import failure_of
from cat_cluster.cluster.messages import Order, OrderedAdapter, OrderReader
from cat_cluster.cluster.monitor import PackMonitor
from cat_cluster.cluster.trainer import PackSpec
from cat_cluster.cluster.zero import zero_engine
from cat_cluster.errors import CatClusterError
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.device import choose_device
from cat_cluster.models.out_of_memory import memory_explained
from cat_cluster.pipeline.job import stored_member
from cat_cluster.pipeline.prepare import PreparedAdapter, open_bank, prepare_again
from cat_cluster.runs.run import FencedStore, open_fenced_store
from cat_cluster.settings import Settings, load_settings
from cat_cluster.telemetry import STORE_RETRIES, Metrics
from cat_cluster.telemetry.ray_backend import RayBackend
from cat_cluster.training.engine import TorchEngine
from cat_cluster.training.loop import Pack, PackMember, check_checkpoints

IDLE_SECONDS = 0.05


@dataclass(frozen=True, eq=False)
class _Newcomer:
    """An adapter that is ready to join; store: of its run."""

    ordered: OrderedAdapter
    adapter: PreparedAdapter
    store: FencedStore
    member: PackMember


def train_worker(pack: PackSpec) -> None:
    """Train a pack as one of its workers, from the start or after a restart; settings are the worker's own."""
    settings, device = load_settings(), torch.device("cpu")
    if pack.on_gpus:
        device = ray.train.torch.get_device()
        settings = settings.model_copy(update={"device": str(device)})
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(min(pack.threads, _threads()))
    metrics = Metrics(RayBackend())
    with (
        PackMonitor(
            pack.messages,
            metrics,
            reports=distributed.get_rank() == 0,
            all_draw=pack.cluster.zero_stage == 3,
            upload_every=pack.cluster.checkpoint_every,
        ) as monitor,
        _Worker(pack, settings, monitor, metrics, device) as worker,
    ):
        worker.run()


class _Worker:
    """Trains what the orders say, in step with the other workers; a context manager.

    Adapters that an order names are prepared in a thread, while those before them train. They come in between two
    steps, as soon as every worker has them ready.
    """

    def __init__(
        self, pack: PackSpec, settings: Settings, monitor: PackMonitor, metrics: Metrics, device: torch.device
    ) -> None:
        self._spec, self._settings, self._monitor, self._metrics = pack, settings, monitor, metrics
        self._device = device
        self._first, self._count = distributed.get_rank() == 0, distributed.get_world_size()
        self._orders = OrderReader(pack.messages, pack.number) if self._first else None
        self._order, self._lost = Order(0, (), last=False), frozenset[str]()
        self._bases: dict[str, BaseModel] = {}
        # As long as an adapter of the run is here: a group outlives thousands of runs, and a store has connections.
        self._stores: WeakValueDictionary[tuple[str, int], FencedStore] = WeakValueDictionary()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._coming: dict[str, Future[_Newcomer | CatClusterError]] = {}
        self._pack: Pack | None = None
        self._open = ExitStack()
        for base in pack.bases:
            self._thread.submit(self._load, base)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._open.__exit__(kind, error, trace)

    def run(self) -> None:
        """Train until all adapters of the last order have ended."""
        while True:
            self._listen()
            if self._pack is not None and self._pack.training:
                with memory_explained(len(self._pack.training)):
                    report = self._pack.step()
                self._monitor.step(report, self._pack.slots)
                self._report_ended(report.ended)
            elif self._order.last and not self._coming:
                return
            else:
                time.sleep(IDLE_SECONDS)

    def _listen(self) -> None:
        """Do what the newest order says, once all workers know it, and take adapters in that all have ready."""
        newest = self._order if self._orders is None else self._orders.newest()
        lost = self._lost if self._pack is None else self._lost | self._pack.refused
        is_ready = bool(self._coming) and all(future.done() for future in self._coming.values())
        has_news = self._first and (newest.number > self._order.number or lost != self._lost)
        news, ready = self._sum(int(has_news), int(is_ready))
        if news:
            told = [(newest, lost)]
            distributed.broadcast_object_list(told)
            self._follow(*told[0])
        elif ready == self._count:
            self._admit()

    def _follow(self, order: Order, lost: frozenset[str]) -> None:
        """Go by an order from now on. lost: adapters whose run another driver has taken over."""
        self._order, self._lost = order, lost
        wanted = self._wanted()
        here = {} if self._pack is None else self._pack.slots
        self._coming = {name: future for name, future in self._coming.items() if name in wanted}
        for name, ordered in wanted.items():
            if name not in here and name not in self._coming:
                self._coming[name] = self._thread.submit(self._prepare, ordered)
        if self._pack is not None and not wanted.keys() >= set(self._pack.training):
            self._change([])  # one is to stop before its end; those that have ended may stay until others come
        if self._first:
            self._spec.messages.put("followed", self._spec.number, order.number)

    def _wanted(self) -> dict[str, OrderedAdapter]:
        return {ordered.name: ordered for ordered in self._order.adapters if ordered.name not in self._lost}

    def _load(self, base: str) -> None:
        with suppress(CatClusterError):  # an adapter that needs it says what is wrong
            self._bases[base] = load_base_model(base, device=choose_device(self._settings.device))

    def _prepare(self, ordered: OrderedAdapter) -> _Newcomer | CatClusterError:
        """Return an adapter ready to join, or why it cannot: whatever that is, it is this adapter's own."""
        try:
            store = self._store_of(ordered)
            store.attempt.check()
            for base in self._bases.keys() - {ordered.resolved.base, *self._spec.bases}:
                del self._bases[base]  # a pack that trains with it has it yet
            adapter = prepare_again(ordered.resolved, ordered.revision, self._settings, self._bases)
            member = stored_member(
                adapter, store, self._settings, name=ordered.name, on_checkpoint=self._monitor.checkpoint
            )
            check_checkpoints(member)
        except Exception as error:
            return failure_of(error, "preparing it")
        return _Newcomer(ordered, adapter, store, member)

    def _store_of(self, ordered: OrderedAdapter) -> FencedStore:
        of_run = (ordered.run_id, ordered.attempt)
        store = self._stores.get(of_run)
        if store is None:
            store = self._stores[of_run] = open_fenced_store(
                self._spec.storage, *of_run, on_retry=lambda what: self._metrics.inc(STORE_RETRIES, operation=what)
            )
        return store

    def _admit(self) -> None:
        """Take in what is prepared. One that cannot be used on any worker fails on all, and the others go on."""
        found = [(name, future.result()) for name, future in self._coming.items()]
        own = {name: one for name, one in found if isinstance(one, CatClusterError)}
        by_worker: list[dict[str, CatClusterError]] = [{} for _ in range(self._count)]
        distributed.all_gather_object(by_worker, own)
        failed = {name: error for errors in reversed(by_worker) for name, error in errors.items()}
        if self._first:
            for name, error in failed.items():
                self._spec.messages.put("failed", self._spec.number, name, error, wait=True)
        newcomers = [one for name, one in found if isinstance(one, _Newcomer) and name not in failed]
        self._coming = {}
        if newcomers:
            for one in newcomers:
                self._monitor.admit(one.ordered, one.adapter, one.store)
            self._change(newcomers)
            assert self._pack is not None
            training = self._pack.training
            self._report_ended([one.ordered.name for one in newcomers if one.ordered.name not in training])

    def _change(self, newcomers: Sequence[_Newcomer]) -> None:
        """Let adapters go that are not wanted, and take these in."""
        wanted = self._wanted()
        gone = [] if self._pack is None else [name for name in self._pack.slots if name not in wanted]
        with memory_explained(len(wanted)):
            if self._pack is not None and len(gone) == len(self._pack.slots):
                self._end()  # those who come may be of another kind, and of another base
            if self._pack is not None:
                self._pack.change(leave=gone, join=[one.member for one in newcomers])
            elif newcomers:
                self._pack = self._begin(newcomers)
        for name in gone:
            self._monitor.dismiss(name)

    def _begin(self, newcomers: Sequence[_Newcomer]) -> Pack:
        base, stage = newcomers[0].adapter.base, self._spec.cluster.zero_stage
        bank = self._open.enter_context(open_bank(base, [one.adapter for one in newcomers]))
        self._monitor.open(base, bank)
        return self._open.enter_context(
            Pack(
                base,
                bank,
                [one.member for one in newcomers],
                checkpoint_every=self._spec.cluster.checkpoint_every,
                make_engine=TorchEngine if stage is None else zero_engine(stage),
            )
        )

    def _end(self) -> None:
        """Store what is to go on elsewhere, and be without adapters."""
        assert self._pack is not None
        self._pack.park()
        self._open.close()
        self._pack = None

    def _report_ended(self, adapter_ids: Sequence[str]) -> None:
        if self._first and adapter_ids:
            self._spec.messages.put("ended", self._spec.number, tuple(adapter_ids), wait=True)

    def _sum(self, *values: int) -> list[int]:
        """Return the sums over all workers."""
        if self._count == 1:
            return list(values)
        summed = torch.tensor(values, device=self._device)
        distributed.all_reduce(summed)
        return [int(value) for value in summed.tolist()]


def _threads() -> int:
    """Share the processors of the machine among its workers."""
    workers_here = int(ray.train.get_context().get_local_world_size())
    return max(1, (os.cpu_count() or 1) // max(workers_here, 1))
