"""What each worker of a pack does: prepare the adapters it is told of, train its rows, report to the driver."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import ray.train
import ray.train.torch
import torch
from torch import distributed

from cat_cluster.cluster.messages import Order, OrderReader
from cat_cluster.cluster.monitor import PackMonitor
from cat_cluster.cluster.trainer import PackSpec
from cat_cluster.cluster.zero import zero_engine
from cat_cluster.errors import CatClusterError
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.out_of_memory import memory_explained
from cat_cluster.pipeline.job import stored_member
from cat_cluster.pipeline.prepare import PreparedAdapter, open_bank, prepare_again
from cat_cluster.runs.run import FencedStore, open_fenced_store
from cat_cluster.settings import Settings, load_settings
from cat_cluster.spec.job import ResolvedAdapter
from cat_cluster.telemetry import STORE_RETRIES, Metrics
from cat_cluster.telemetry.ray_backend import RayBackend
from cat_cluster.training.engine import TorchEngine
from cat_cluster.training.loop import Pack, PackMember

IDLE_SECONDS = 0.05


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
    store = open_fenced_store(
        pack.storage,
        pack.run_id,
        pack.attempt,
        on_retry=lambda operation: metrics.inc(STORE_RETRIES, operation=operation),
    )
    first = distributed.get_rank() == 0
    superseded = [first and not store.attempt.is_current()]
    distributed.broadcast_object_list(superseded)
    if superseded[0]:
        return  # after an error Ray would start the workers again and again, until the driver notices
    with (
        PackMonitor(pack.job, store, pack.messages, metrics, pack.run_id, reports=first) as monitor,
        _Worker(pack, settings, store, monitor, device) as worker,
    ):
        worker.run()


class _Worker:
    """Trains what the orders say, in step with the other workers; a context manager.

    Adapters that an order names are prepared in a thread, while those before them train. They come in between two
    steps, as soon as every worker has them ready.
    """

    def __init__(
        self, pack: PackSpec, settings: Settings, store: FencedStore, monitor: PackMonitor, device: torch.device
    ) -> None:
        self._spec, self._settings, self._store, self._monitor = pack, settings, store, monitor
        self._device = device
        self._first, self._count = distributed.get_rank() == 0, distributed.get_world_size()
        self._orders = OrderReader(pack.messages, pack.number) if self._first else None
        self._order = Order(0, (), last=False)
        self._bases: dict[str, BaseModel] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._coming: dict[str, Future[tuple[PreparedAdapter, PackMember]]] = {}
        self._pack: Pack | None = None
        self._open = ExitStack()

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
        newest = None if self._orders is None else self._orders.newest()
        is_ready = bool(self._coming) and all(future.done() for future in self._coming.values())
        number, ready = self._sum(0 if newest is None else newest.number, int(is_ready))
        if number > self._order.number:
            orders = [newest]
            distributed.broadcast_object_list(orders)
            assert orders[0] is not None
            self._follow(orders[0])
        elif ready == self._count:
            self._admit()

    def _follow(self, order: Order) -> None:
        self._order = order
        wanted = {resolved.id: (resolved, revision) for resolved, revision in order.adapters}
        here = {} if self._pack is None else self._pack.slots
        self._coming = {name: future for name, future in self._coming.items() if name in wanted}
        for name, adapter in wanted.items():
            if name not in here and name not in self._coming:
                self._coming[name] = self._thread.submit(self._prepare, *adapter)
        if self._pack is not None and not wanted.keys() >= set(self._pack.training):
            self._change({})  # one is to stop before its end; those that have ended may stay until others come
        if self._first:
            self._spec.messages.put("followed", self._spec.number, order.number)

    def _prepare(self, resolved: ResolvedAdapter, revision: str) -> tuple[PreparedAdapter, PackMember]:
        adapter = prepare_again(resolved, revision, self._settings, self._bases)
        member = stored_member(adapter, self._store, self._settings, on_checkpoint=self._monitor.checkpoint)
        return adapter, member

    def _admit(self) -> None:
        """Take in what is prepared. One that cannot be used on any worker fails on all, and the others go on."""
        own: dict[str, CatClusterError] = {}
        for name, future in self._coming.items():
            error = future.exception()
            if isinstance(error, CatClusterError):
                own[name] = error
            elif error is not None:
                raise error
        by_worker: list[dict[str, CatClusterError]] = [{} for _ in range(self._count)]
        distributed.all_gather_object(by_worker, own)
        failed = {name: error for errors in reversed(by_worker) for name, error in errors.items()}
        if self._first:
            for name, error in failed.items():
                self._spec.messages.put("failed", self._spec.number, name, error, wait=True)
        prepared = {name: future.result() for name, future in self._coming.items() if name not in failed}
        self._coming = {}
        if prepared:
            self._monitor.admit([adapter for adapter, _ in prepared.values()])
            self._change(prepared)
            assert self._pack is not None
            training = self._pack.training
            self._report_ended([name for name in prepared if name not in training])

    def _change(self, prepared: Mapping[str, tuple[PreparedAdapter, PackMember]]) -> None:
        """Let adapters go that the order does not name, and take in these."""
        wanted = {resolved.id for resolved, _ in self._order.adapters}
        members = [member for _, member in prepared.values()]
        gone = [] if self._pack is None else [name for name in self._pack.slots if name not in wanted]
        with memory_explained(len(wanted)):
            if self._pack is None:
                self._pack = self._begin(list(prepared.values()))
            elif len(gone) == len(self._pack.slots) and not members:
                self._end()
            else:
                self._pack.change(leave=gone, join=members)

    def _begin(self, prepared: Sequence[tuple[PreparedAdapter, PackMember]]) -> Pack:
        base, stage = prepared[0][0].base, self._spec.job.cluster.zero_stage
        bank = self._open.enter_context(open_bank(base, [adapter for adapter, _ in prepared]))
        self._monitor.open(base, bank)
        return self._open.enter_context(
            Pack(
                base,
                bank,
                [member for _, member in prepared],
                checkpoint_every=self._spec.job.cluster.checkpoint_every,
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
