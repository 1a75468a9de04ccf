"""One pack on Ray Train: what each worker does, and how the group is started and restarted."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController
from torch import distributed

from cat_cluster.cluster.event_queue import EventQueue
from cat_cluster.cluster.monitor import PackMonitor
from cat_cluster.cluster.restarts import RestartMessages
from cat_cluster.cluster.runs import Attempt, FencedStore, Run
from cat_cluster.cluster.zero import zero_engine
from cat_cluster.errors import CatClusterError
from cat_cluster.models.base_model import BaseModel
from cat_cluster.pipeline.job import train_adapters
from cat_cluster.pipeline.prepare import PreparedAdapter, prepare_again
from cat_cluster.settings import Settings
from cat_cluster.spec.job import JobSpec, ResolvedAdapter
from cat_cluster.store import open_store
from cat_cluster.telemetry import STORE_RETRIES, Metrics
from cat_cluster.telemetry.ray_backend import RayBackend
from cat_cluster.training.engine import TorchEngine

COLLECTIVE_SECONDS = 1800


@dataclass(frozen=True, eq=False)
class PackOrder:
    """All that the workers of a pack are told. board: where the driver looks for word; number: the pack's own."""

    number: int
    job: JobSpec
    adapters: tuple[tuple[ResolvedAdapter, str], ...]
    storage: str
    run_id: str
    attempt: int
    settings: Settings
    board: EventQueue
    workers: int | tuple[int, int]
    on_gpus: bool

    @property
    def ids(self) -> tuple[str, ...]:
        """The adapters' ids."""
        return tuple(resolved.id for resolved, _ in self.adapters)


class _Trainer(ray.train.torch.TorchTrainer):  # type: ignore[misc]
    """A trainer that tells which actor controls its run.

    Ray ends the whole process, with no word, when it is shut down while a thread waits for a result: a driver that
    leaves early must end that actor first, and Ray names it nowhere.
    """

    on_controller: Callable[[Any], None]

    def _create_default_callbacks(self) -> list[Any]:
        # Ray would start a process that manages datasets, of which there are none: seconds of a small machine.
        return [one for one in super()._create_default_callbacks() if not isinstance(one, DatasetsCallback)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        options = {"num_cpus": 0, "label_selector": here, "runtime_env": {"env_vars": get_env_vars_to_propagate()}}
        controller = ray.remote(**options)(TrainController).remote(**arguments)
        self.on_controller(controller)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())


def train_on_ray(order: PackOrder, on_controller: Callable[[Any], None]) -> None:
    """Train a pack on its workers and return when each adapter's last checkpoint is in the store.

    A lost worker costs a restart from there, at most `max_failures` times. on_controller is given the actor that
    controls the run; killing it ends the pack. Raises CatClusterError with the reason of the last failure.
    """
    failures = order.job.cluster.max_failures
    with tempfile.TemporaryDirectory(prefix="cat-cluster-") as folder:
        trainer = _Trainer(
            _work,
            train_loop_config={"order": order},
            scaling_config=ray.train.ScalingConfig(num_workers=order.workers, use_gpu=order.on_gpus),
            torch_config=ray.train.torch.TorchConfig(timeout_s=COLLECTIVE_SECONDS),
            run_config=ray.train.RunConfig(
                # Ray is given no checkpoint: on every start a worker goes on from the store's.
                name=f"{order.run_id}-{order.attempt}-{order.number}",
                storage_path=folder,
                failure_config=ray.train.FailureConfig(max_failures=failures),
                callbacks=[RestartMessages(order.board, order.ids, failures)],
            ),
        )
        trainer.on_controller = on_controller
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise CatClusterError(_reason(error)) from error


def workers_of(job: JobSpec, pack: Sequence[PreparedAdapter]) -> int | tuple[int, int]:
    """Return how many workers a pack gets: as the spec says, but no more than it has rows in a step."""
    rows = sum(adapter.rows for adapter in pack)
    workers = job.cluster.workers
    if isinstance(workers, int):
        return min(workers, rows)
    least, most = (min(bound, rows) for bound in workers)
    return least if least == most else (least, most)


def _work(config: dict[str, Any]) -> None:
    """What every worker of a pack runs, from the start or after a restart."""
    order: PackOrder = config["order"]
    if not order.on_gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(_threads(order))
    settings = order.settings
    if order.on_gpus:
        settings = settings.model_copy(update={"device": str(ray.train.torch.get_device())})
    metrics = Metrics(RayBackend())
    place = open_store(order.storage, on_retry=lambda operation: metrics.inc(STORE_RETRIES, operation=operation))
    attempt = Attempt(Run(place, order.run_id), order.attempt)
    store = FencedStore(attempt)
    first = distributed.get_rank() == 0
    superseded = [first and not attempt.is_current()]
    distributed.broadcast_object_list(superseded)
    if superseded[0]:
        return  # an error would have Ray start the workers again and again, until the driver looks
    pack, failed = _prepare(order, settings)
    if first:
        for adapter_id, reason in failed.items():
            order.board.tell("failed", adapter_id, reason, wait=True)
    if not pack:
        return
    stage = order.job.cluster.zero_stage
    with PackMonitor(order.job, pack, store, order.board, metrics, order.run_id, writes=first) as monitor:
        train_adapters(
            pack,
            order.job,
            store,
            settings,
            on_step=monitor.step,
            on_checkpoint=monitor.checkpoint,
            make_engine=TorchEngine if stage is None else zero_engine(stage),
            on_bank=monitor.open_bank,
        )


def _prepare(order: PackOrder, settings: Settings) -> tuple[list[PreparedAdapter], dict[str, str]]:
    """Read every adapter's photos; one that cannot be used on any worker fails on all, and the others go on."""
    bases: dict[str, BaseModel] = {}
    pack: list[PreparedAdapter] = []
    failed: dict[str, str] = {}
    for resolved, revision in order.adapters:
        try:
            pack.append(prepare_again(resolved, revision, settings, bases))
        except CatClusterError as error:
            failed[resolved.id] = str(error)
    known: list[dict[str, str]] = [{} for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(known, failed)
    for others in known:
        failed = {**others, **failed}
    return [adapter for adapter in pack if adapter.resolved.id not in failed], failed


def _threads(order: PackOrder) -> int:
    """Share the processors of the machine among its workers."""
    here = int(ray.train.get_context().get_local_world_size())
    return max(1, (os.cpu_count() or 1) // max(here, 1))


def _reason(error: ray.train.TrainingFailedError) -> str:
    """Return the first worker's own error in one line; the whole trace is in the job's log."""
    failures = getattr(error, "worker_failures", None) or {}
    causes = [cause for _, cause in sorted(failures.items())] or [error]
    expected = [cause for cause in causes if isinstance(_root(cause), CatClusterError)]
    root = _root((expected or causes)[0])
    text = str(root).strip() or type(root).__name__
    return text if isinstance(root, CatClusterError) else f"training stopped: {type(root).__name__}: {text[-500:]}"


def _root(error: BaseException) -> BaseException:
    for name in ("cause", "_base_exc", "__cause__"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return _root(inner)
    return error
