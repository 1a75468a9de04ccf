"""A whole job on one machine: photos -> latents -> packs -> adapters -> measures -> registry."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from cat_cluster.base_model import BaseModel, load_base_model
from cat_cluster.batches import AdapterTask
from cat_cluster.concepts import Concept, check_tokens, has_token, load_concept
from cat_cluster.errors import AdapterNotFoundError, CatClusterError, ConceptError, SpecError
from cat_cluster.evaluation.bootstrap import METRICS
from cat_cluster.evaluation.evaluate import Evaluator, image_templates
from cat_cluster.evaluation.features import is_pocket, load_judges
from cat_cluster.evaluation.prompts import evaluation_prompts, fill
from cat_cluster.evaluation.results import Evaluation
from cat_cluster.latents import LatentCache
from cat_cluster.lora.bank import LoraBank, adapted_layers
from cat_cluster.methods import effective_alpha, initial_weights
from cat_cluster.published import image_digests, photo_objects, sample_objects
from cat_cluster.registry import AdapterDraft, Manifest, Registry, revision_of
from cat_cluster.settings import Settings
from cat_cluster.spec import JobSpec, ResolvedAdapter
from cat_cluster.store import ObjectStore
from cat_cluster.training.checkpoint import CheckpointStore
from cat_cluster.training.loop import LoopSettings, PackMember, StepReport, TrainedAdapter, train_pack
from cat_cluster.training.optimizer import SlotSettings

Outcome = Literal["published", "already published", "failed"]


class JobListener(Protocol):
    """Who is told how a job goes: the terminal, a test, later a run record."""

    def message(self, text: str) -> None:
        """A line for people."""

    def pack_started(self, adapter_ids: Sequence[str], steps: int) -> None:
        """Training of a pack begins."""

    def step(self, report: StepReport) -> None:
        """A step of the running pack is done."""

    def images(self, adapter_id: str, done: int, total: int) -> None:
        """Evaluation images of an adapter are being made."""

    def finished(self, result: AdapterResult) -> None:
        """An adapter is published, was already, or has failed."""


@dataclass(frozen=True, eq=False)
class AdapterResult:
    """What became of one adapter of a job. reason: why it failed; evaluation: None unless measured in this run."""

    adapter_id: str
    revision: str
    outcome: Outcome
    reason: str | None = None
    manifest: Manifest | None = None
    evaluation: Evaluation | None = None

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


@dataclass(frozen=True, eq=False)
class PreparedAdapter:
    """An adapter whose photos were read and whose identity is known."""

    resolved: ResolvedAdapter
    concepts: tuple[Concept, ...]
    base: BaseModel
    revision: str

    @property
    def image_digests(self) -> list[str]:
        """One sha256 per photo over its bytes and its caption, in concept and file order."""
        return image_digests(self.concepts)

    @property
    def resolution(self) -> int:
        """Side of the square training crops in pixels."""
        return self.resolved.training.resolution or self.base.resolution


def run_job(job: JobSpec, store: ObjectStore, settings: Settings, listener: JobListener) -> list[AdapterResult]:
    """Train, measure and publish every adapter of a job; one that is already published is left as it is.

    Everything is validated before anything is trained. A failed adapter does not stop the others: its result says
    why. Results come in the order of the spec.
    """
    prepared = prepare(job, settings)
    registry = Registry(store)
    results: dict[str, AdapterResult] = {}
    waiting = []
    for adapter in prepared:
        try:
            manifest = registry.resolve(f"{adapter.resolved.id}@{adapter.revision}")
        except AdapterNotFoundError:
            waiting.append(adapter)
            continue
        registry.finish_publishing(manifest)
        checkpoints_of(adapter, store).clear()  # a crash right after publishing leaves them behind
        results[adapter.resolved.id] = AdapterResult(
            adapter.resolved.id, adapter.revision, "already published", manifest=manifest
        )
        listener.finished(results[adapter.resolved.id])
    for pack in plan_packs(waiting, store, job.cluster.max_pack):
        for result in _run_pack(pack, job, registry, settings, listener):
            results[result.adapter_id] = result
    return [results[adapter.resolved.id] for adapter in prepared]


def prepare(job: JobSpec, settings: Settings) -> list[PreparedAdapter]:
    """Read the photos and the base models of a job and look for its judges, so that nothing is missed later.

    Raises ConceptError naming the adapter, BaseModelError, or EvaluationError.
    """
    device = choose_device(settings.device)
    bases: dict[str, BaseModel] = {}
    judges_found: set[tuple[str, str]] = set()
    prepared = []
    for resolved in job.resolved():
        try:
            concepts = tuple(load_concept(spec) for spec in resolved.concepts)
            check_tokens(concepts)
        except ConceptError as error:
            raise ConceptError(f"adapter {resolved.id}: {error}") from error
        if resolved.base not in bases:
            bases[resolved.base] = load_base_model(resolved.base, device=device)
        base, judge = bases[resolved.base], resolved.evaluation.judge
        if resolved.evaluation.enabled:
            image_templates(resolved.evaluation, base)
            if (resolved.base, judge) not in judges_found:
                load_judges(judge, base)
                judges_found.add((resolved.base, judge))
        revision = revision_of(resolved.id, resolved, image_digests(concepts), base.fingerprint)
        prepared.append(PreparedAdapter(resolved, concepts, base, revision))
    return prepared


def choose_device(name: str) -> str:
    """Return the torch device for a setting: `auto` means CUDA where there is one, else the CPU."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise SpecError(f"device {name!r}: this torch sees no CUDA device; set CAT_DEVICE=cpu or auto")
    return name


def plan_packs(adapters: Sequence[PreparedAdapter], store: ObjectStore, max_pack: int) -> list[list[PreparedAdapter]]:
    """Group adapters that can share a forward, at most `max_pack` together, in the order given.

    Adapters of an interrupted job share a pack where they have a checkpoint of one step in common, so that nobody
    is thrown back further than its own last checkpoints. With fewer than it would keep, the start is one of them.
    """
    groups: dict[tuple[object, ...], list[PreparedAdapter]] = {}
    for adapter in adapters:
        groups.setdefault(_pack_key(adapter), []).append(adapter)
    packs = []
    for group in groups.values():
        stands = {id(adapter): checkpoints_of(adapter, store).resumable() for adapter in group}
        while group:
            step = min(max(stands[id(adapter)]) for adapter in group)
            together = [adapter for adapter in group if step in stands[id(adapter)]]
            group = [adapter for adapter in group if step not in stands[id(adapter)]]
            packs += [together[i : i + max_pack] for i in range(0, len(together), max_pack)]
    return packs


def _pack_key(adapter: PreparedAdapter) -> tuple[object, ...]:
    training = adapter.resolved.training
    return (
        adapter.base.fingerprint,
        adapter.resolution,
        training.steps,
        training.targets,
        training.blocks,
        training.precision,
        training.gradient_checkpointing,
        training.joint_rows,
        training.compile,
    )


def _run_pack(
    pack: Sequence[PreparedAdapter], job: JobSpec, registry: Registry, settings: Settings, listener: JobListener
) -> Iterator[AdapterResult]:
    base, training = pack[0].base, pack[0].resolved.training
    checkpoints = [checkpoints_of(adapter, registry.store) for adapter in pack]
    with open_bank(base, pack) as bank:
        members = [pack_member(adapter, bank, settings.cache_dir) for adapter in pack]
        listener.pack_started([adapter.resolved.id for adapter in pack], training.steps)
        started = time.perf_counter()
        trained = train_pack(
            base,
            bank,
            members,
            LoopSettings(
                steps=training.steps,
                checkpoint_every=job.cluster.checkpoint_every,
                joint_rows=training.joint_rows,
                bf16=training.precision == "bf16",
                gradient_checkpointing=training.gradient_checkpointing,
                compile=training.compile,
            ),
            checkpoints=checkpoints,
            on_step=listener.step,
        )
        seconds = time.perf_counter() - started
        evaluator = Evaluator(base, bank)
        for slot, (adapter, result) in enumerate(zip(pack, trained, strict=True), start=1):
            try:
                outcome = _finish(adapter, result, slot, evaluator, registry, seconds, listener)
                checkpoints[slot - 1].clear()
            except CatClusterError as error:
                # Its checkpoints stay: the same job again measures and publishes it without training.
                outcome = AdapterResult(adapter.resolved.id, adapter.revision, "failed", reason=str(error))
            listener.finished(outcome)
            yield outcome


@contextmanager
def open_bank(base: BaseModel, pack: Sequence[PreparedAdapter]) -> Iterator[LoraBank]:
    """Put a bank with one slot per adapter into the base's U-Net, and take it out again."""
    training = pack[0].resolved.training
    layers = adapted_layers(base.unet, training.targets, training.blocks)
    rank = max(adapter.resolved.training.rank for adapter in pack)
    bank = LoraBank.attach(base.unet, slots=len(pack), rank=rank, layers=layers)
    try:
        yield bank
    finally:
        bank.detach()


def checkpoints_of(adapter: PreparedAdapter, store: ObjectStore) -> CheckpointStore:
    """Return where the checkpoints of an adapter are kept: under its revision, whatever it is packed with."""
    name = f"{adapter.resolved.id}/{adapter.revision}"
    return CheckpointStore(store, f"runs/{name}/checkpoints", name)


def pack_member(adapter: PreparedAdapter, bank: LoraBank, cache_dir: Path | None) -> PackMember:
    """Encode an adapter's photos and settle its draws, its optimiser and the weights it starts from."""
    resolved, base = adapter.resolved, adapter.base
    training = resolved.training
    draw_key = training.draw_key or resolved.id
    cache = LatentCache(base, cache_dir)
    task = AdapterTask(
        adapter_id=resolved.id,
        draw_key=draw_key,
        seed=training.seed,
        rows=training.rows_per_concept,
        cat_fraction=training.cat_fraction,
        prior_prompt=training.prior_prompt,
        general_prompts=_general_prompts(adapter),
        concepts=tuple(
            cache.material(
                concept,
                resolution=adapter.resolution,
                crops_per_image=training.crops_per_image,
                alpha=effective_alpha(resolved.method, concept.alpha),
            )
            for concept in adapter.concepts
        ),
        alpha_schedule=training.alpha_schedule,
        pool_size=training.pool_size if training.teacher == "pool" else None,
    )
    return PackMember(
        task=task,
        optimiser=SlotSettings(
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            lr_schedule=training.lr_schedule,
            warmup_steps=training.steps // 15 if training.warmup_steps is None else training.warmup_steps,
            steps=training.steps,
        ),
        initial=initial_weights(base.unet, bank.layers, rank=training.rank, seed=training.seed, draw_key=draw_key),
        min_snr_gamma=training.min_snr_gamma,
        drift_budget=training.drift_budget,
    )


def _general_prompts(adapter: PreparedAdapter) -> tuple[str, ...]:
    """The general part of the prior-prompt mixture, without prompts that are judged on or hold a token."""
    training, evaluation = adapter.resolved.training, adapter.resolved.evaluation
    prompts = adapter.base.general_prompts()
    if training.general_prompts is not None:
        prompts = _read_prompts(Path(training.general_prompts))
    templates = evaluation_prompts(evaluation.prompts, pocket=is_pocket(adapter.base))
    judged = {fill(template, concept.class_noun, None) for template in templates for concept in adapter.concepts}
    tokens = [concept.token for concept in adapter.concepts]
    return tuple(p for p in prompts if p not in judged and not any(has_token(p, token) for token in tokens))


def _finish(
    adapter: PreparedAdapter,
    trained: TrainedAdapter,
    slot: int,
    evaluator: Evaluator,
    registry: Registry,
    seconds: float,
    listener: JobListener,
) -> AdapterResult:
    """Measure and publish one trained adapter; raises CatClusterError when it cannot be measured or stored."""
    resolved = adapter.resolved
    if trained.weights is None:
        return AdapterResult(resolved.id, adapter.revision, "failed", reason=trained.dropped)
    evaluation = None
    if resolved.evaluation.enabled:
        evaluation = evaluator.evaluate(
            slot,
            adapter.concepts,
            resolved.evaluation,
            on_progress=lambda done, total: listener.images(resolved.id, done, total),
        )
    draft = AdapterDraft(
        adapter_id=resolved.id,
        resolved=resolved,
        base_name=adapter.base.name,
        base_fingerprint=adapter.base.fingerprint,
        image_digests=adapter.image_digests,
        weights=trained.weights,
        training={"steps": resolved.training.steps, "pack_seconds": round(seconds, 2), "history": trained.history},
        metrics=None if evaluation is None else evaluation.to_json(),
        judge=None if evaluation is None else evaluation.to_json()["judge"],
        reference=None if evaluation is None else evaluation.reference(),
        samples={**photo_objects(adapter.concepts), **({} if evaluation is None else sample_objects(evaluation))},
    )
    manifest = registry.publish(draft)
    return AdapterResult(resolved.id, adapter.revision, "published", manifest=manifest, evaluation=evaluation)


def _read_prompts(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"training.general_prompts: {path} cannot be read as UTF-8 text: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise SpecError(f"training.general_prompts: {path} holds no prompt: write one a line, or leave the field out")
    return prompts
