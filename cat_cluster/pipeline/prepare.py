"""What training needs of each adapter of a job: photos read, base loaded, identity and draws settled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cat_cluster.data.concepts import Concept, has_token, image_digests, load_concepts
from cat_cluster.data.decoys import with_decoys
from cat_cluster.data.draws import AdapterTask
from cat_cluster.data.latents import LatentCache
from cat_cluster.data.warnings import concept_warnings
from cat_cluster.errors import ChangedJobError, CheckpointError, EvaluationError, SpecError
from cat_cluster.evaluation.evaluate import image_templates
from cat_cluster.evaluation.judges import is_pocket, load_judges
from cat_cluster.evaluation.prompts import DECOYS, evaluation_prompts, fill
from cat_cluster.lora.bank import LoraBank, parameter_names, text_layers, weights_of
from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.base_names import check_buckets
from cat_cluster.models.device import choose_device
from cat_cluster.models.prompt_weights import Prompt
from cat_cluster.pipeline.start import start_weights, with_pinned_start
from cat_cluster.registry import Registry, revision_of
from cat_cluster.settings import Settings
from cat_cluster.spec.job import JobSpec, ResolvedAdapter
from cat_cluster.spec.sections import EvaluationSpec
from cat_cluster.store import ObjectStore
from cat_cluster.training import TRAINING_VERSION
from cat_cluster.training.checkpoint import CheckpointStore, tensor_names
from cat_cluster.training.loop import PackMember, TrainedAdapter
from cat_cluster.training.loss_curves import curves
from cat_cluster.training.methods import effective_alpha, initial_weights, trained_layers
from cat_cluster.training.optimizer import state_names


@dataclass(frozen=True, eq=False)
class PreparedAdapter:
    """An adapter whose photos were read and whose identity is known. warnings: what people should know of it."""

    resolved: ResolvedAdapter
    concepts: tuple[Concept, ...]
    base: BaseModel
    revision: str
    warnings: tuple[str, ...] = ()

    @property
    def image_digests(self) -> list[str]:
        """One sha256 per photo over its bytes and its caption, in concept and file order."""
        return image_digests(self.concepts)

    @property
    def rows(self) -> int:
        """Identity rows of a U-Net call."""
        return len(self.concepts) * self.resolved.training.rows_per_concept

    @property
    def resolution(self) -> int:
        """Side of the square training crops in pixels; buckets have at most as many pixels."""
        return self.resolved.training.resolution or self.base.resolution

    @property
    def bucket_step(self) -> int | None:
        """What the sides of the aspect buckets are multiples of, in pixels; None where crops are squares."""
        return self.base.size_unit if self.resolved.training.aspect_buckets else None


def prepare(job: JobSpec, settings: Settings, registry: Registry) -> list[PreparedAdapter]:
    """Prepare all adapters of a job, so that nothing is missed once the first one trains.

    Raises as Preparation does.
    """
    preparation = Preparation(settings)
    return [preparation.adapter(resolved, registry) for resolved in job.resolved()]


class Preparation:
    """Reads the photos and the base models of adapters and looks for their judges; for one thread.

    It keeps the `bases` that were used last, and what it has found of their judges.
    """

    def __init__(self, settings: Settings, bases: int | None = None, *, keep: Sequence[str] = ()) -> None:
        """bases: how many are kept, None: all. keep: names of bases that are kept beside these."""
        self._settings, self._most, self._keep = settings, bases, frozenset(keep)
        self._bases: dict[str, BaseModel] = {}
        self._judges: set[tuple[str, str]] = set()

    def adapter(self, given: ResolvedAdapter, registry: Registry) -> PreparedAdapter:
        """Prepare an adapter; one that trains on from another starts from what its reference names in the registry now.

        Raises ConceptError naming the adapter, BaseModelError, EvaluationError, or what with_pinned_start and
        start_weights do.
        """
        resolved = with_pinned_start(given, registry)
        adapter = prepare_adapter(resolved, self._settings, self._bases)
        self._bases[resolved.base] = self._bases.pop(resolved.base)  # the one used last comes last
        self._forget_oldest()
        start_weights(resolved, adapter.base, registry)
        judge = resolved.evaluation.judge
        if resolved.evaluation.enabled:
            _refuse_cut_subjects(adapter, image_templates(resolved.evaluation, adapter.base))
            self._look_for_judges(resolved.base, judge)
        return adapter

    def load(self, name: str) -> None:
        """Load a base and look for its usual judges before an adapter asks. Raises BaseModelError, EvaluationError."""
        self._bases[name] = load_base_model(name, device=choose_device(self._settings.device))
        self._look_for_judges(name, EvaluationSpec().judge)

    def _look_for_judges(self, base: str, judge: str) -> None:
        if (base, judge) not in self._judges:
            load_judges(judge, self._bases[base])
            self._judges.add((base, judge))

    def _forget_oldest(self) -> None:
        passing = [name for name in self._bases if name not in self._keep]
        for name in [] if self._most is None else passing[: max(0, len(passing) - self._most)]:
            del self._bases[name]
            self._judges = {found for found in self._judges if found[0] != name}


def prepare_adapter(resolved: ResolvedAdapter, settings: Settings, bases: dict[str, BaseModel]) -> PreparedAdapter:
    """Read one adapter's photos and its base model; `bases` keeps the loaded ones by name.

    Raises ConceptError naming the adapter, BaseModelError, or SpecError for a resolution that has no buckets.
    """
    masked = resolved.training.masked_loss
    concepts = load_concepts(resolved.id, resolved.concepts, settings.cache_dir, masked=masked)
    if resolved.base not in bases:
        bases[resolved.base] = load_base_model(resolved.base, device=choose_device(settings.device))
    base = bases[resolved.base]
    training = resolved.training
    warnings = concept_warnings(resolved.id, concepts, training, base.text_limit)
    revision = revision_of(resolved.id, resolved, image_digests(concepts), base.fingerprint, TRAINING_VERSION)
    adapter = PreparedAdapter(resolved, concepts, base, revision, warnings)
    check_buckets(resolved, adapter.resolution, base.size_unit)
    return adapter


def prepare_again(
    resolved: ResolvedAdapter, revision: str, settings: Settings, bases: dict[str, BaseModel]
) -> PreparedAdapter:
    """Read an adapter that was checked elsewhere; ChangedJobError if it is not the `revision` it was there."""
    adapter = prepare_adapter(resolved, settings, bases)
    if adapter.revision != revision:
        raise ChangedJobError(
            "its photos, its base or cat-cluster itself changed after the job was checked: submit it again"
        )
    return adapter


@contextmanager
def open_bank(base: BaseModel, pack: Sequence[PreparedAdapter]) -> Iterator[LoraBank]:
    """Put a bank into the base for adapters that can share a forward, and take it out again.

    It has the layers of text encoders too, whoever trains them: others may come in.
    """
    layers = dict.fromkeys(layer for adapter in pack for layer in trained_layers(base, adapter.resolved.training))
    bank = LoraBank.attach(base.network, layers=list({**layers, **dict.fromkeys(text_layers(base.network))}))
    try:
        yield bank
    finally:
        bank.detach()


def checkpoints_of(adapter: PreparedAdapter, store: ObjectStore) -> CheckpointStore:
    """Return where the checkpoints of an adapter are kept: under its revision, whatever it is packed with."""
    name = f"{adapter.resolved.id}/{adapter.revision}"
    return CheckpointStore(store, f"checkpoints/{name}", name)


def refuse_old_checkpoints(adapter: PreparedAdapter, store: ObjectStore) -> None:
    """Raise CheckpointError where an earlier cat-cluster, whose format is not read, left checkpoints of the adapter."""
    prefix = f"runs/{adapter.resolved.id}/{adapter.revision}/checkpoints/"
    if store.list(prefix):
        raise CheckpointError(
            f"adapter {adapter.resolved.id}: {prefix} in {store.url} holds checkpoints of an earlier cat-cluster, "
            "which this one cannot read: finish the job with the version that began it, or remove them to train from "
            "the start"
        )


def trained_adapter(adapter: PreparedAdapter, store: ObjectStore) -> TrainedAdapter:
    """Return what an adapter's last checkpoint holds; ChangedJobError if none is there, or it is not of its end."""
    checkpoints, training = checkpoints_of(adapter, store), adapter.resolved.training
    steps = checkpoints.steps()
    if not steps:
        raise ChangedJobError("its checkpoints are gone from the store: submit the job again")
    names = parameter_names(trained_layers(adapter.base, training))
    state = checkpoints.load(steps[-1], tensor_names(names, state_names(training)))
    if not state.ended(training.steps):
        raise ChangedJobError(f"its last checkpoint is of step {state.step} of {training.steps}: submit the job again")
    weights = None
    if state.dropped is None:
        part = "value" if training.ema is None else "average"
        weights = weights_of({name: state.parameters[name][part] for name in names})
    return TrainedAdapter(adapter.resolved.id, weights, state.dropped, curves(state.loss_curves, training.steps))


def pack_member(
    adapter: PreparedAdapter, cache_dir: Path | None, start: AdapterWeights | None = None, *, name: str | None = None
) -> PackMember:
    """Encode an adapter's photos, and draw its decoys and the weights it starts from, where `start` has none.

    name: the adapter's in its pack, its id if none is given.
    """
    resolved, base = adapter.resolved, adapter.base
    training, cache = resolved.training, LatentCache(base, cache_dir)
    concepts = tuple(
        cache.material(
            concept,
            resolution=adapter.resolution,
            bucket_step=adapter.bucket_step,
            crops_per_image=training.crops_per_image,
            alpha=effective_alpha(resolved.method, concept.alpha),
        )
        for concept in adapter.concepts
    )
    draw_key = training.draw_key or resolved.id
    if training.decoy_fraction > 0 and any(concept.alpha > 0 for concept in concepts):
        # An adapter that was trained on the words it is measured with would be measured on what it was taught.
        concepts = with_decoys(concepts, seed=training.seed, draw_key=draw_key, spell=base.spell, never=DECOYS)
    keyed = training.model_copy(update={"draw_key": draw_key})  # what is drawn depends on no name in a pack
    task = AdapterTask(name or resolved.id, concepts, keyed, _general_prompts(adapter))
    layers = trained_layers(base, training)
    initial = initial_weights(base.network, layers, rank=training.rank, seed=training.seed, draw_key=draw_key)
    return PackMember(task, AdapterWeights({**initial.layers, **({} if start is None else start.layers)}))


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


def _read_prompts(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"training.general_prompts: {path} cannot be read as UTF-8 text: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise SpecError(f"training.general_prompts: {path} holds no prompt: write one a line, or leave the field out")
    return prompts


def _refuse_cut_subjects(adapter: PreparedAdapter, templates: Sequence[str]) -> None:
    """Refuse evaluation prompts of which the text encoder does not read the token: with and without it are then one."""
    limit = adapter.base.text_limit
    for template in dict.fromkeys(templates):
        for concept in adapter.concepts:
            read, _ = limit.split(Prompt(fill(template, concept.class_noun, concept.token)))
            if not has_token(read, concept.token):
                raise EvaluationError(
                    f"evaluation.prompts: the text encoder reads the first {limit.tokens} tokens of a prompt, and the "
                    f"subject comes later in {template!r}; write {{}} further to the front (adapter "
                    f"{adapter.resolved.id})"
                )
