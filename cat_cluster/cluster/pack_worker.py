"""What each worker of a pack does: prepare the adapters, train its rows, report to the driver."""

from __future__ import annotations

import os

import ray.train
import ray.train.torch
import torch
from torch import distributed

from cat_cluster.cluster.monitor import PackMonitor
from cat_cluster.cluster.runs import open_fenced_store
from cat_cluster.cluster.trainer import PackSpec
from cat_cluster.cluster.zero import zero_engine
from cat_cluster.errors import CatClusterError
from cat_cluster.models.base_model import BaseModel
from cat_cluster.pipeline.job import train_adapters
from cat_cluster.pipeline.prepare import PreparedAdapter, prepare_again
from cat_cluster.settings import Settings, load_settings
from cat_cluster.telemetry import STORE_RETRIES, Metrics
from cat_cluster.telemetry.ray_backend import RayBackend
from cat_cluster.training.engine import TorchEngine


def train_worker(pack: PackSpec) -> None:
    """Train a pack as one of its workers, from the start or after a restart; settings are the worker's own."""
    settings = load_settings()
    if pack.on_gpus:
        settings = settings.model_copy(update={"device": str(ray.train.torch.get_device())})
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
    adapters, failed = _prepare(pack, settings)
    if first:
        for adapter_id, error in failed.items():
            pack.events.put("failed", adapter_id, error, wait=True)
    if not adapters:
        return
    stage = pack.job.cluster.zero_stage
    with PackMonitor(pack.job, adapters, store, pack.events, metrics, pack.run_id, reports=first) as monitor:
        train_adapters(
            adapters,
            pack.job,
            store,
            settings,
            on_step=monitor.step,
            on_checkpoint=monitor.checkpoint,
            make_engine=TorchEngine if stage is None else zero_engine(stage),
            on_bank=monitor.open_bank,
        )


def _prepare(pack: PackSpec, settings: Settings) -> tuple[list[PreparedAdapter], dict[str, CatClusterError]]:
    """Read every adapter's photos; one that cannot be used on any worker fails on all, and the others go on."""
    bases: dict[str, BaseModel] = {}
    adapters: list[PreparedAdapter] = []
    failed: dict[str, CatClusterError] = {}
    for resolved, revision in pack.adapters:
        try:
            adapters.append(prepare_again(resolved, revision, settings, bases))
        except CatClusterError as error:
            failed[resolved.id] = error
    by_worker: list[dict[str, CatClusterError]] = [{} for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(by_worker, failed)
    for others in by_worker:
        failed = {**others, **failed}
    return [adapter for adapter in adapters if adapter.resolved.id not in failed], failed


def _threads() -> int:
    """Share the processors of the machine among its workers."""
    workers_here = int(ray.train.get_context().get_local_world_size())
    return max(1, (os.cpu_count() or 1) // max(workers_here, 1))
