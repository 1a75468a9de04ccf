"""Ray tasks beside the training: how large a pack may be, and evaluating and publishing one trained adapter."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from transformers.utils import logging as transformers_logging

from cat_cluster import telemetry
from cat_cluster.cluster.messages import Messages, OrderedAdapter
from cat_cluster.cluster.work import Work
from cat_cluster.errors import CatClusterError
from cat_cluster.evaluation.evaluate import EvaluationMemory
from cat_cluster.evaluation.judges import load_judges
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.device import choose_device
from cat_cluster.pipeline.job import AdapterResult, finish_adapter, pack_size
from cat_cluster.pipeline.prepare import PreparedAdapter, prepare_adapter, prepare_again, trained_adapter
from cat_cluster.registry import Registry
from cat_cluster.runs.run import open_fenced_store
from cat_cluster.settings import load_settings
from cat_cluster.spec.fields import PackSize
from cat_cluster.spec.job import ResolvedAdapter
from cat_cluster.spec.sections import EvaluationSpec
from cat_cluster.telemetry.ray_backend import RayBackend

IMAGE_EVENT_SECONDS = 0.25


def pack_size_on_ray(group: Sequence[PreparedAdapter], max_pack: PackSize, *, on_gpus: bool, side_by_side: int) -> int:
    """Return how many adapters of a group are trained together; `auto` is measured where workers run.

    Raises ray.exceptions.RayError where that cannot be measured.
    """
    if max_pack != "auto" or len(group) == 1:
        return pack_size(group, max_pack, load_settings())
    size: int = ray.get(measure_on_ray(group, on_gpus=on_gpus, side_by_side=side_by_side))
    return size


def measure_on_ray(group: Sequence[PreparedAdapter], *, on_gpus: bool, side_by_side: int) -> Any:
    """Start measuring how many adapters like those of a group are trained together; return the number's reference."""
    adapters = [adapter.resolved for adapter in group]
    # Where Ray may try a task again, it does so without end for want of memory.
    task = ray.remote(_pack_size).options(num_cpus=1, num_gpus=1 if on_gpus else 0, max_retries=0)
    return task.remote(adapters, 1 if on_gpus else side_by_side)


def evaluate_on_ray(work: Work, *, storage: str, seconds: float, messages: Messages, on_gpus: bool) -> Any:
    """Start evaluating and publishing a trained adapter; return the reference of its AdapterResult.

    seconds: how long it trained. Its checkpoints are left to the caller, since workers may look for them. Ray does not
    try it again, as for want of memory it would do so without end.
    """
    task = ray.remote(_evaluate).options(
        num_cpus=1, num_gpus=1 if on_gpus else 0, max_retries=0, name=f"evaluate {work.adapter_id}"
    )
    return task.remote(work.ordered(), storage, seconds, messages)


def warm_on_ray(base: str) -> Any:
    """Have a process load what evaluations of adapters of a base need; return the reference of None.

    Ray gives the next evaluation that it starts on the same machine to that process, as long as it is idle.
    """
    return ray.remote(_warm).options(num_cpus=1, max_retries=0, name=f"load {base}").remote(base)


def _warm(base: str) -> None:
    with suppress(CatClusterError):  # an adapter that needs it says what is wrong
        _cache.load(base)


def _pack_size(adapters: Sequence[ResolvedAdapter], shared_by: int) -> int:
    settings = load_settings()
    torch.set_num_threads(1)
    bases: dict[str, Any] = {}
    usable = []
    for adapter in adapters:
        with suppress(CatClusterError):  # one that became unusable after the check fails with its pack, by name
            usable.append(prepare_adapter(adapter, settings, bases))
    return pack_size(usable, "auto", settings, shared_by=shared_by) if usable else 1


def _evaluate(ordered: OrderedAdapter, storage: str, seconds: float, messages: Messages) -> AdapterResult:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()  # bars for files that load in a moment would fill the job's log
    metrics = telemetry.Metrics(RayBackend())
    sent = 0.0

    def on_images(_: str, done: int, total: int) -> None:
        nonlocal sent
        if done == total or time.monotonic() - sent >= IMAGE_EVENT_SECONDS:
            sent = time.monotonic()
            messages.put("images", ordered.name, done, total)

    started = time.perf_counter()
    # A task that is given up goes on until an interrupt reaches it; its run may be said to be stopped before that.
    store = open_fenced_store(storage, ordered.run_id, ordered.attempt, until_ended=True)
    try:
        adapter = _cache.prepare(ordered.resolved, ordered.revision)
        result = finish_adapter(
            adapter,
            trained_adapter(adapter, store),
            Registry(store),
            seconds,
            on_images,
            _cache.memory,
        )
    except CatClusterError as error:
        result = AdapterResult.failed(ordered.resolved.id, ordered.revision, error)
    metrics.observe(telemetry.EVALUATION_SECONDS, time.perf_counter() - started)
    return result


@dataclass(eq=False)
class _Cache:
    """What a process keeps from one evaluation to the next: the base, and what was found for it."""

    bases: dict[str, BaseModel] = field(default_factory=dict)
    memory: EvaluationMemory = field(default_factory=EvaluationMemory)

    def prepare(self, resolved: ResolvedAdapter, revision: str) -> PreparedAdapter:
        """Read an adapter's photos, and its base unless the last evaluation had the same."""
        self._forget_others(resolved.base)
        return prepare_again(resolved, revision, load_settings(), self.bases)

    def load(self, base: str) -> None:
        """Load a base and its usual judges. Raises BaseModelError, EvaluationError."""
        self._forget_others(base)
        if base not in self.bases:
            self.bases[base] = load_base_model(base, device=choose_device(load_settings().device))
        judge = EvaluationSpec().judge
        if judge not in self.memory.judges:
            self.memory.judges[judge] = load_judges(judge, self.bases[base])

    def _forget_others(self, base: str) -> None:
        if base not in self.bases:
            self.bases.clear()
            self.memory = EvaluationMemory()


_cache = _Cache()
