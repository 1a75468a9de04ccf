"""The job spec a user writes: its fields, their limits, and what one adapter resolves to.

Knows the shape of a spec and the token rules; never opens an image or loads a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_serializer, model_validator

from cat_cluster.errors import SpecError
from cat_cluster.spec.choices import BlockGroup, Blocks
from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.spec.fields import (
    BLOCK_GROUPS,
    AdapterId,
    Method,
    NameOrFolder,
    OneOrMore,
    StoragePlace,
    Text,
    words,
)
from cat_cluster.spec.sections import SECTIONS, ClusterSpec, EvaluationSpec, MonitoringSpec, Section, TrainingSpec
from cat_cluster.spec.uniqueness import all_token_repeats, id_repeats, token_repeats
from cat_cluster.spec.yaml_file import (
    FieldError,
    Location,
    SpecDocument,
    field_lines,
    parse_yaml,
    read_yaml,
    spec_error,
)

# Adapters that were published before there were these fields are found under their revisions: at its default none of
# them is a part of the digest.
_LATER_TRAINING = (
    *("decoy_fraction", "accumulate", "ema", "noise_offset", "optimizer", "block_lr_weights", "init_from"),
    *("caption_dropout", "tag_dropout", "shuffle_tags", "keep_tags", "prompt_chunks"),
    *("aspect_buckets", "masked_loss", "text_encoder"),
)

_RATES = {
    "adafactor": "0.5 to begin with, and a weight_decay of 0",
    "prodigy": "1.0, and lr_schedule: constant",
}
_ADAPTED: Mapping[Blocks, tuple[BlockGroup, ...]] = {"all": BLOCK_GROUPS, "mid_up": ("mid", "up"), "up": ("up",)}

_Settings = TypeVar("_Settings", bound=Section)


class AdapterSpec(Section):
    """One adapter: its concepts and what differs from the job; of `training` and `evaluation` only given keys count."""

    id: AdapterId = Field(description="Name of the adapter: a-z, 0-9 and -, at most 63 characters.")
    concepts: OneOrMore[ConceptSpec] = Field(description="Concepts; several make a joint adapter.")
    method: Method | None = Field(default=None, description="Overrides the job's method.")
    base: NameOrFolder | None = Field(default=None, description="Overrides the job's base model.")
    training: TrainingSpec | None = Field(default=None, description="Overrides the job's training, key by key.")
    evaluation: EvaluationSpec | None = Field(default=None, description="Overrides the job's evaluation, key by key.")

    @field_serializer("training", "evaluation")
    def _given_keys(self, value: Section | None) -> dict[str, Any] | None:
        return None if value is None else value.model_dump(mode="json", exclude_unset=True)

    @model_validator(mode="after")
    def _tokens_differ(self) -> Self:
        self.refuse([*token_repeats(self.model_dump()), *_foreign_noun_errors(self)])
        return self


class ResolvedAdapter(Section):
    """One adapter with every override merged: all that decides its training, but for the bytes of its images."""

    id: AdapterId = Field(description="Name of the adapter.")
    base: Text = Field(description="Base model: a name, a hub id, a folder or a file.")
    method: Method = Field(description="Training method.")
    concepts: OneOrMore[ConceptSpec] = Field(description="Concepts of the adapter.")
    training: TrainingSpec = Field(description="Merged training settings.")
    evaluation: EvaluationSpec = Field(description="Merged evaluation settings.")

    def digest(self) -> str:
        """Return the sha256 of the canonical JSON: equal settings give equal digests on every machine.

        Folders of images are left out (their bytes are digested with the run); a file of general prompts counts by
        its content. Raises SpecError when that file cannot be read.
        """
        content = self.model_dump(mode="json")
        for concept in content["concepts"]:
            del concept["images"]
        if self.training.general_prompts is not None:
            content["training"]["general_prompts"] = _file_digest(Path(self.training.general_prompts))
        for name in _LATER_TRAINING:
            if getattr(self.training, name) == TrainingSpec.model_fields[name].default:
                del content["training"][name]
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()


class JobSpec(Section):
    """A whole job: adapters that train on one or more base models, and how they are measured and stored."""

    name: Annotated[Text, Field(max_length=100)] = Field(description="Name of the job, for people.")
    base: NameOrFolder = Field(
        default="pocket",
        description="Base model: pocket, a diffusers folder or .safetensors checkpoint, here or under s3://, or a hub "
        "id.",
    )
    method: Method = Field(default="cat", description="Training method: cat, or lora for plain LoRA.")
    adapters: OneOrMore[AdapterSpec] = Field(description="Adapters to train, each id once.")
    training: TrainingSpec = Field(default=TrainingSpec(), description="How adapters are trained.")
    cluster: ClusterSpec = Field(default=ClusterSpec(), description="How the work is spread.")
    evaluation: EvaluationSpec = Field(default=EvaluationSpec(), description="How adapters are measured.")
    monitoring: MonitoringSpec = Field(default=MonitoringSpec(), description="What is recorded while training.")
    storage: StoragePlace | None = Field(
        default=None, description="Folder or URL that adapters are published to; none means CAT_STORAGE."
    )

    @model_validator(mode="after")
    def _adapters_agree(self) -> Self:
        errors = [*id_repeats(self.model_dump())]
        for index, adapter in enumerate(self.resolved()):
            errors += _merged_errors(adapter, self.adapters[index], index)
            errors += _sharding_errors(adapter, self.cluster)
            errors += _start_errors(adapter, self.adapters, index)
        self.refuse(list(dict.fromkeys(errors)))
        return self

    def resolved(self) -> tuple[ResolvedAdapter, ...]:
        """Return each adapter with its overrides merged over the job's settings, in the order of the spec."""
        return tuple(
            ResolvedAdapter(
                id=adapter.id,
                base=adapter.base or self.base,
                method=adapter.method or self.method,
                concepts=adapter.concepts,
                training=_merge(self.training, adapter.training),
                evaluation=_merge(self.evaluation, adapter.evaluation),
            )
            for adapter in self.adapters
        )


def load_spec(path: Path) -> JobSpec:
    """Read a YAML job spec; paths in it are relative to the file and come back absolute.

    Raises one SpecError that lists every bad field: its path, line, what is wrong and what is allowed.
    """
    return _job(read_yaml(path), {"folder": path.expanduser().absolute().parent})


def parse_spec(content: bytes, source: str) -> JobSpec:
    """Return the job spec of YAML that is in no file; paths stay as given. Raises SpecError as `load_spec` does.

    source: what its messages name, such as an address.
    """
    return _job(parse_yaml(content, source), None)


def job_of_json(text: str) -> JobSpec:
    """Return the job spec of a JSON text; paths stay as given.

    Raises one SpecError with a line for each bad field: its path, what is wrong and what is allowed.
    """
    try:
        return JobSpec.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise SpecError("\n".join(field_lines(error, _SECTIONS))) from None


def _job(document: SpecDocument, context: dict[str, Path] | None) -> JobSpec:
    try:
        spec = JobSpec.model_validate(document.data, context=context)
    except ValidationError as error:
        # Repeats are looked for here too: pydantic compares whole adapters only once each of them is valid.
        repeats = [*id_repeats(document.data), *all_token_repeats(document.data)]
        raise spec_error(document, error, _SECTIONS, repeats) from None
    if document.errors:
        raise spec_error(document, None, _SECTIONS, [])
    return spec


def spec_json_schema() -> dict[str, Any]:
    """Return the JSON schema of a job spec, with a description for each field."""
    return JobSpec.model_json_schema()


def _merge(settings: _Settings, override: _Settings | None) -> _Settings:
    given = {} if override is None else {name: getattr(override, name) for name in override.model_fields_set}
    return settings.model_copy(update=given)


def _foreign_noun_errors(adapter: AdapterSpec) -> Iterator[FieldError]:
    for index, concept in enumerate(adapter.concepts):
        nouns = [other.class_noun for other in adapter.concepts if other is not concept]
        noun = next((noun for noun in nouns if concept.token.casefold() in words(noun)), None)
        if noun is not None:
            text = (
                f"{concept.token!r} is a word of another concept's class noun {noun!r}; choose a rare word such as sks"
            )
            yield ("concepts", index, "token"), text


def _merged_errors(adapter: ResolvedAdapter, given: AdapterSpec, index: int) -> Iterator[FieldError]:
    """Rules that hold between fields of one adapter once its overrides are merged."""

    def place(section: Literal["training", "evaluation"], key: str) -> Location:
        override: Section | None = getattr(given, section)
        own = override is not None and key in override.model_fields_set
        return ("adapters", index, section, key) if own else (section, key)

    yield from _training_errors(adapter.training, place)
    evaluation = adapter.evaluation
    if evaluation.require is not None and not evaluation.enabled:
        # At the adapter's own half of the contradiction, if it has one: the job's half may be right for the others.
        own = [place("evaluation", key) for key in ("require", "enabled")]
        where = next((found for found in own if found[0] == "adapters"), own[0])
        yield where, "require needs an evaluation, and enabled is false; remove require, or set enabled to true"
    prompts = () if evaluation.prompts == "default" else evaluation.prompts
    if evaluation.enabled and len(prompts) * evaluation.images_per_prompt == 1:
        text = "one image cannot be measured: diversity needs 2 per concept; raise it, or give more prompts"
        yield place("evaluation", "images_per_prompt"), text
    for number, prompt in enumerate(prompts):
        for token in (concept.token for concept in adapter.concepts):
            if token.casefold() in words(prompt):
                text = f"{prompt!r} holds the token {token!r}; leave it out, {{}} is replaced by it"
                yield (*place("evaluation", "prompts"), number), text


def _training_errors(
    training: TrainingSpec, place: Callable[[Literal["training"], str], Location]
) -> Iterator[FieldError]:
    if training.warmup_steps is not None and training.warmup_steps >= training.steps:
        text = f"{training.warmup_steps} must be less than steps, which is {training.steps}"
        yield place("training", "warmup_steps"), text
    if training.optimizer != "adamw" and "learning_rate" not in training.model_fields_set:
        text = f"the default is for adamw, and optimizer is {training.optimizer}: give it, {_RATES[training.optimizer]}"
        yield place("training", "learning_rate"), text
    if training.keep_tags and not training.changes_tags:
        text = "keeps tags that nothing leaves out or moves; give tag_dropout or shuffle_tags, or leave it out"
        yield place("training", "keep_tags"), text
    for group in training.block_lr_weights or {}:
        if training.optimizer == "prodigy":
            yield place("training", "block_lr_weights"), "prodigy finds one step size for all blocks; remove it"
            break
        if group not in _ADAPTED[training.blocks]:
            text = f"{group} is not adapted with blocks: {training.blocks}; remove it, or adapt more blocks"
            yield (*place("training", "block_lr_weights"), group), text
    of_text = training.text_encoder
    if training.optimizer == "prodigy" and of_text is not None and of_text.learning_rate is not None:
        where = (*place("training", "text_encoder"), "learning_rate")
        yield where, "prodigy finds one step size for all layers; remove it, as in text_encoder: {}"


def _sharding_errors(adapter: ResolvedAdapter, cluster: ClusterSpec) -> Iterator[FieldError]:
    if cluster.zero_stage and adapter.training.optimizer == "adafactor":
        text = (
            f"{cluster.zero_stage} shards the weights, and adafactor (adapter {adapter.id}) needs each matrix whole; "
            "use 0 or none, or another optimizer"
        )
        yield ("cluster", "zero_stage"), text


def _start_errors(adapter: ResolvedAdapter, of_job: Sequence[AdapterSpec], index: int) -> Iterator[FieldError]:
    """What an alias of an adapter of the job names would change when that one is published."""
    adapter_id, _, name = (adapter.training.init_from or "").partition("@")
    if not name.startswith("r-") and adapter_id in {one.id for one in of_job}:
        own = of_job[index].training
        given = own is not None and "init_from" in own.model_fields_set
        text = f"{adapter_id} is trained by this job; name a revision, as in {adapter_id}@r-0123456789ab"
        yield (*(("adapters", index) if given else ()), "training", "init_from"), text


def _file_digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise SpecError(f"training.general_prompts: {path} cannot be read: {error.strerror}") from error


_SECTIONS: Mapping[str, type[BaseModel]] = {
    "": JobSpec,
    "adapters": AdapterSpec,
    "concepts": ConceptSpec,
    **SECTIONS,
}
