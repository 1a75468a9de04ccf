"""A whole job in this process: photos -> latents -> packs -> adapters -> measures -> registry.

The steps of a job are functions of their own, so that `cluster/driver.py` can spread them over a Ray cluster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

from cat_cluster.errors import AdapterNotFoundError, CatClusterError, StoreError, SupersededError
from cat_cluster.evaluation.evaluate import EvaluationMemory, Evaluator
from cat_cluster.evaluation.gates import check_gates
from cat_cluster.evaluation.intervals import METRICS
from cat_cluster.evaluation.results import Evaluation
from cat_cluster.models.out_of_memory import memory_explained
from cat_cluster.pipeline.prepare import (
    PreparedAdapter,
    checkpoints_of,
    open_bank,
    pack_member,
    prepare,
    refuse_old_checkpoints,
)
from cat_cluster.pipeline.publish import adapter_draft
from cat_cluster.pipeline.start import start_record, start_weights
from cat_cluster.registry import Manifest, Reference, Registry
from cat_cluster.settings import Settings, load_settings
from cat_cluster.spec.choices import Outcome
from cat_cluster.spec.fields import PackSize
from cat_cluster.spec.job import JobSpec
from cat_cluster.store import ObjectStore
from cat_cluster.training import TRAINING_VERSION
from cat_cluster.training.loop import PackMember, TrainedAdapter, train_pack
from cat_cluster.training.pack_size import measured_pack_size
from cat_cluster.training.step_report import StepReport


class JobListener(Protocol):
    """Receives the progress of a job: the terminal, a test, a run's record."""

    def message(self, text: str) -> None:
        """A line for people."""

    def started(self, steps: Mapping[str, int], together: int) -> None:
        """Adapters begin to train; steps: adapter id -> how many it takes in all; together: in one forward now."""

    def step(self, report: StepReport) -> None:
        """A step of a running pack is done."""

    def images(self, adapter_id: str, done: int, total: int) -> None:
        """Evaluation images of an adapter are being made."""

    def finished(self, result: AdapterResult) -> None:
        """An adapter is published, was already, was rejected by its gates, or has failed."""


class Silent:
    """A listener that shows nothing."""

    def message(self, text: str) -> None: ...

    def started(self, steps: Mapping[str, int], together: int) -> None: ...

    def step(self, report: StepReport) -> None: ...

    def images(self, adapter_id: str, done: int, total: int) -> None: ...

    def finished(self, result: AdapterResult) -> None: ...


@dataclass(frozen=True, eq=False)
class AdapterResult:
    """What became of one adapter of a job.

    reason: why it failed or was rejected; permanent: whether the same job would fail again; dropped: whether training
    gave it up; evaluation: None unless measured in this run.
    """

    adapter_id: str
    revision: str
    outcome: Outcome
    reason: str | None = None
    manifest: Manifest | None = None
    evaluation: Evaluation | None = None
    permanent: bool = False
    dropped: bool = False

    @property
    def is_settled(self) -> bool:
        """Whether nothing goes on from here: one that could not be measured or stored may be yet."""
        return self.outcome != "failed" or self.dropped

    @classmethod
    def failed(cls, adapter_id: str, revision: str, error: CatClusterError) -> AdapterResult:
        """Return the result of an adapter that failed with an error."""
        return cls(adapter_id, revision, "failed", reason=str(error), permanent=error.permanent)

    def summary(self) -> dict[str, Any]:
        """The result as JSON: id, revision, outcome, and the reason or the metrics."""
        metrics = {} if self.manifest is None or self.manifest.metrics is None else self.manifest.metrics
        return {
            "id": self.adapter_id,
            "revision": self.revision,
            "outcome": self.outcome,
            "reason": self.reason,
            "metrics": {name: metrics[name] for name in METRICS if name in metrics},
        }


def run_job(
    job: JobSpec, store: ObjectStore, settings: Settings | None = None, listener: JobListener | None = None
) -> list[AdapterResult]:
    """Train, measure and publish every adapter of a job; one that is already published is left as it is.

    settings: those of the environment unless given; listener: receives the progress, if given.
    Everything is validated before anything is trained. A failed adapter does not stop the others: its result says
    why. Results come in the order of the spec.
    """
    settings, listener = settings or load_settings(), listener or Silent()
    registry = Registry(store)
    prepared = prepare(job, settings, registry)
    tell_warnings(prepared, listener)
    results: dict[str, AdapterResult] = {}
    memories: dict[str, EvaluationMemory] = {}

    def keep(result: AdapterResult) -> None:
        results[result.adapter_id] = result
        listener.finished(result)

    waiting = []
    for adapter in prepared:
        done = already_published(adapter, registry)
        if done is None:
            waiting.append(adapter)
        else:
            keep(done)
    for pack in plan_packs(waiting, store, lambda group: pack_size(group, job.cluster.max_pack, settings)):
        listener.started({adapter.resolved.id: adapter.resolved.training.steps for adapter in pack}, len(pack))
        started = time.perf_counter()
        trained = train_adapters(pack, job, store, settings, on_step=listener.step)
        seconds = time.perf_counter() - started
        for adapter, one in zip(pack, trained, strict=True):
            memory = memories.setdefault(adapter.base.fingerprint, EvaluationMemory())
            keep(finish_adapter(adapter, one, registry, seconds, listener.images, memory))
            clear_checkpoints(adapter, results[adapter.resolved.id], store, listener)
    return [results[adapter.resolved.id] for adapter in prepared]


def tell_warnings(prepared: Sequence[PreparedAdapter], listener: JobListener) -> None:
    """Pass on what people should know of the adapters of a job before it trains them."""
    for adapter in prepared:
        for warning in adapter.warnings:
            listener.message(f"warning: {warning}")


def already_published(adapter: PreparedAdapter, registry: Registry) -> AdapterResult | None:
    """Return the result of an adapter whose revision is in the registry, and finish what a crash cut off there."""
    try:
        manifest = registry.resolve(Reference(adapter.resolved.id, adapter.revision))
    except AdapterNotFoundError:
        return None
    registry.finish_publishing(manifest)
    checkpoints_of(adapter, registry.store).clear()  # a crash right after publishing leaves them behind
    outcome: Outcome = "already published" if manifest.status == "published" else "rejected"
    reason = None if outcome == "already published" else "its gates failed when it was measured"
    return AdapterResult(adapter.resolved.id, adapter.revision, outcome, reason, manifest)


def plan_packs(
    adapters: Sequence[PreparedAdapter],
    store: ObjectStore,
    largest: Callable[[Sequence[PreparedAdapter]], int],
) -> list[list[PreparedAdapter]]:
    """Group adapters that can share a forward into packs of even size, at most `largest(group)` together.

    Raises as by_kind does.
    """
    packs = []
    for group in by_kind(adapters, store).values():
        packs += _even_parts(group, largest(group))
    return packs


def by_kind(adapters: Sequence[PreparedAdapter], store: ObjectStore) -> dict[Hashable, list[PreparedAdapter]]:
    """Group adapters that can share a forward, by what they have in common.

    Within a group those of like rank come together, since a bank pads all to its largest rank, and of these those of
    like steps, since one that ends leaves its place empty.
    Raises CheckpointError for checkpoints of a version whose checkpoints this one does not read.
    """
    groups: dict[Hashable, list[PreparedAdapter]] = {}
    for adapter in adapters:
        refuse_old_checkpoints(adapter, store)
        groups.setdefault(pack_key(adapter), []).append(adapter)
    return {kind: sorted(group, key=_likeness) for kind, group in groups.items()}


def _likeness(adapter: PreparedAdapter) -> tuple[int, int]:
    return adapter.resolved.training.rank, adapter.resolved.training.steps


def _even_parts(adapters: Sequence[PreparedAdapter], limit: int) -> list[list[PreparedAdapter]]:
    count = -(-len(adapters) // limit)
    ends = [len(adapters) * part // count for part in range(count + 1)]
    return [list(adapters[start:end]) for start, end in pairwise(ends)]


def pack_key(adapter: PreparedAdapter) -> Hashable:
    """Return what adapters have in common that can share a forward."""
    training = adapter.resolved.training
    return (
        adapter.base.fingerprint,
        adapter.resolution,
        training.targets,
        training.blocks,
        training.precision,
        training.gradient_checkpointing,
        training.joint_rows,
        training.compile,
        training.prompt_chunks,
    )


def pack_size(group: Sequence[PreparedAdapter], max_pack: PackSize, settings: Settings, *, shared_by: int = 1) -> int:
    """Return how many adapters of a group are trained together: the spec's number, or what memory allows here.

    shared_by: packs that train at once in this memory. Raises OutOfMemoryError where not even two fit.
    """
    if max_pack != "auto":
        return max_pack
    if len(group) == 1:
        return 1
    # The most demanding adapters stand for all: a pack of them is the largest that can come about.
    heaviest = sorted(group, key=_demand)[-2:]
    with memory_explained(len(heaviest)), open_bank(heaviest[0].base, heaviest) as bank:
        members = [pack_member(one, settings.cache_dir, name=f"{number}") for number, one in enumerate(heaviest)]
        return measured_pack_size(heaviest[0].base, bank, members, shared_by=shared_by)


def _demand(adapter: PreparedAdapter) -> tuple[int, bool, int]:
    """What orders adapters by the memory they take: activations of rows are most of it, then those of trained texts."""
    training = adapter.resolved.training
    return adapter.rows, training.text_encoder is not None, training.rank


def train_adapters(
    pack: Sequence[PreparedAdapter],
    job: JobSpec,
    store: ObjectStore,
    settings: Settings,
    *,
    on_step: Callable[[StepReport], None],
) -> list[TrainedAdapter]:
    """Train the adapters of one pack together, from their checkpoints on. Raises OutOfMemoryError."""
    base = pack[0].base
    with memory_explained(len(pack)), open_bank(base, pack) as bank:
        members = [stored_member(adapter, store, settings) for adapter in pack]
        return train_pack(base, bank, members, checkpoint_every=job.cluster.checkpoint_every, on_step=on_step)


def stored_member(
    adapter: PreparedAdapter,
    store: ObjectStore,
    settings: Settings,
    *,
    name: str | None = None,
    on_checkpoint: Callable[[float, int], None] | None = None,
) -> PackMember:
    """Return an adapter as a pack takes it in, with its photos encoded and its checkpoints in the store.

    name: in the pack, its id if none is given. on_checkpoint is called after each stored checkpoint with its seconds
    and bytes. Raises as start_weights does.
    """
    start = start_weights(adapter.resolved, adapter.base, Registry(store))
    series = replace(checkpoints_of(adapter, store), on_saved=on_checkpoint)
    return replace(pack_member(adapter, settings.cache_dir, start, name=name), checkpoints=series)


def finish_adapter(
    adapter: PreparedAdapter,
    trained: TrainedAdapter,
    registry: Registry,
    seconds: float,
    on_images: Callable[[str, int, int], None],
    memory: EvaluationMemory,
) -> AdapterResult:
    """Measure a trained adapter, check its gates and publish it; seconds: how long it trained with its pack.

    memory: what measuring other adapters of the same base has found already. An adapter that cannot be measured or
    stored has failed; the same job again measures and publishes it without training, as long as it has checkpoints.
    """
    try:
        with memory_explained():
            return _finish(adapter, trained, registry, seconds, on_images, memory)
    except CatClusterError as error:
        return AdapterResult.failed(adapter.resolved.id, adapter.revision, error)


def clear_checkpoints(
    adapter: PreparedAdapter, result: AdapterResult | None, store: ObjectStore, listener: JobListener
) -> None:
    """Remove the checkpoints of an adapter that nothing goes on from; say so where the store does not let them go."""
    if result is None or not result.is_settled:
        return
    try:
        with suppress(SupersededError):  # then they are another driver's
            checkpoints_of(adapter, store).clear()
    except StoreError as error:
        listener.message(f"warning: checkpoints of {adapter.resolved.id} are left in the store: {error}")


def _finish(
    adapter: PreparedAdapter,
    trained: TrainedAdapter,
    registry: Registry,
    seconds: float,
    on_images: Callable[[str, int, int], None],
    memory: EvaluationMemory,
) -> AdapterResult:
    resolved = adapter.resolved
    if trained.weights is None:
        return AdapterResult(
            resolved.id, adapter.revision, "failed", reason=trained.dropped, permanent=True, dropped=True
        )
    evaluation = None
    if resolved.evaluation.enabled:
        with open_bank(adapter.base, [adapter]) as bank:
            bank.load(1, trained.weights)
            evaluation = Evaluator(adapter.base, bank, memory=memory).evaluate(
                1,
                adapter.concepts,
                resolved.evaluation,
                on_progress=lambda done, total: on_images(resolved.id, done, total),
            )
    start = start_record(resolved, trained.weights, start_weights(resolved, adapter.base, registry))
    failures = check_gates(resolved.evaluation.require, {} if evaluation is None else evaluation.to_json())
    draft = adapter_draft(
        resolved,
        adapter.base,
        adapter.concepts,
        trained.weights,
        evaluation,
        training={
            "steps": resolved.training.steps,
            "resolution": adapter.resolution,
            "pack_seconds": round(seconds, 2),
            "history": trained.history,
            **start,
        },
        training_version=TRAINING_VERSION,
        status="rejected" if failures else "published",
    )
    manifest = registry.publish(draft)
    outcome: Outcome = "rejected" if failures else "published"
    reason = "; ".join(failures) or None
    return AdapterResult(resolved.id, adapter.revision, outcome, reason, manifest, evaluation)
