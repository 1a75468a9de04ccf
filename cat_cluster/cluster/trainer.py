"""A pack on Ray Train: a Ray task that runs the trainer, and what it reports of failures.

Ray Train's controller loads this module too, so it imports none of the models.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cat_cluster.cluster.failures import failure_of, worst_of
from cat_cluster.cluster.messages import Messages
from cat_cluster.errors import CatClusterError
from cat_cluster.spec.sections import ClusterSpec

COLLECTIVE_SECONDS = 1800
START_SECONDS = 3600  # a worker group may wait for pods to start, or for evaluations that hold its processors


@dataclass(frozen=True, eq=False)
class PackSpec:
    """What the workers of a pack need to know; what they train is said by orders. workers: a number, or (least, most).

    number: the pack's own among those of its driver; threads: each worker's share of the cluster's CPUs; folder: where
    Ray Train keeps its own files; bases: to load before anything is to be trained.
    """

    number: int
    cluster: ClusterSpec
    storage: str
    messages: Messages
    workers: int | tuple[int, int]
    threads: int
    on_gpus: bool
    folder: str
    bases: tuple[str, ...] = ()


def workers_of(cluster: ClusterSpec, rows: int) -> int | tuple[int, int]:
    """Return how many workers a pack gets: as the spec says, but no more than it has rows in a step."""
    workers = cluster.workers
    if isinstance(workers, int):
        return min(workers, rows)
    least, most = (min(bound, rows) for bound in workers)
    return least if least == most else (least, most)


def most_workers(workers: int | tuple[int, int]) -> int:
    """Return the most workers that a group may have."""
    return workers if isinstance(workers, int) else workers[1]


def start_pack(pack: PackSpec) -> Any:
    """Start training a pack; return the reference of the error with which it failed, or of None.

    It ends when all adapters of an order are trained that is the last one. Each one's last checkpoint is in the store
    then. A lost worker costs a restart from there, at
    most `max_failures` times; a permanent error ends the pack at once. Cancelling the task has Ray Train stop the
    workers. Its process owns Ray Train's controller and through it the workers, so they also end when the process is
    killed or its driver ends.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    task = ray.remote(_fit).options(
        num_cpus=0, max_retries=0, scheduling_strategy=here, name=f"train pack {pack.number}"
    )
    return task.remote(pack)


def _fit(pack: PackSpec) -> CatClusterError | None:
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_SECONDS))
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths in the environment keep their meaning
    failures = pack.cluster.max_failures
    trainer = TorchTrainer(
        partial(_train_worker, pack),  # an argument of the function is loaded by the workers alone
        scaling_config=ray.train.ScalingConfig(num_workers=pack.workers, use_gpu=pack.on_gpus),
        torch_config=TorchConfig(timeout_s=COLLECTIVE_SECONDS),
        run_config=ray.train.RunConfig(
            # Ray is given no checkpoint: on every start a worker goes on from the store's.
            name=f"pack-{pack.number}",
            storage_path=pack.folder,
            failure_config=ray.train.FailureConfig(max_failures=failures),
            callbacks=[Restarts(pack.messages, pack.number, failures)],
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        return failure_of(error, adapters=pack.messages.adapters(pack.number))
    return None


def _train_worker(pack: PackSpec) -> None:
    from cat_cluster.cluster.pack_worker import train_worker

    train_worker(pack)


class Restarts(ray.train.UserCallback):  # type: ignore[misc]
    """Hears of each failure of workers: tells the driver, or ends the training that no restart would help.

    Ray Train itself says nothing of restarts. An error of its callback is to it one of its controller, after which it
    restarts nothing.
    """

    def __init__(self, messages: Messages, pack: int, max_failures: int) -> None:
        self._messages, self._pack = messages, pack
        self._failures, self._max_failures = 0, max_failures

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Raise a permanent failure; report another one, unless the pack is given up: its task returns that."""
        failure = worst_of(worker_exceptions, adapters=self._messages.adapters(self._pack))
        if failure.permanent:
            raise failure
        self._failures += 1
        if self._failures <= self._max_failures:
            self._messages.put(
                "restart",
                self._pack,
                f"workers failed ({str(failure)[:200]}); they go on from the last checkpoint, restart "
                f"{self._failures} of at most {self._max_failures}",
            )
