"""Adapters made by other tools: read from a file, checked against the base, measured if there are photos, published."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cat_cluster.data.concepts import Concept, check_tokens, load_concept
from cat_cluster.errors import AdapterFormatError, SpecError
from cat_cluster.evaluation.evaluate import Evaluator
from cat_cluster.evaluation.results import Evaluation
from cat_cluster.lora.bank import LoraBank
from cat_cluster.lora.formats import TEXT_ENCODER, UNSUPPORTED, AdapterWeights, find_weights, read_foreign
from cat_cluster.lora.reduction import report
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.base_names import lasting_name
from cat_cluster.pipeline.publish import adapter_draft
from cat_cluster.pipeline.published_adapters import ImageListener
from cat_cluster.registry import Manifest, Registry
from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.spec.imported import ImportedAdapter, ImportedConcept
from cat_cluster.spec.sections import EvaluationSpec
from cat_cluster.spec.yaml_file import field_lines


@dataclass(frozen=True)
class ImportRequest:
    """A file to import. tokens, class_nouns and, unless empty, photos (folders) have one entry per concept.

    unet_only: leave a text-encoder part of the file out; skip_unsupported: leave out what is not applied, for which a
    file is refused else. rank: of the LoRA that stands for each LoHa or LoKr layer.
    """

    file: Path
    adapter_id: str
    tokens: Sequence[str]
    class_nouns: Sequence[str]
    photos: Sequence[Path] = ()
    base: str = "pocket"
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    unet_only: bool = False
    skip_unsupported: bool = False
    rank: int | None = None


def import_adapter(request: ImportRequest, registry: Registry, device: str, listener: ImageListener) -> Manifest:
    """Publish an adapter of a diffusers, PEFT or kohya file and return its manifest; with photos it is measured too.

    The manifest's training names the tensors that were left out, counts them by kind, and says how near the LoRA of
    LoHa and LoKr layers are; it names the layers that the service does not adapt. The same file under the same id and
    settings is published once. Raises SpecError for bad ids, tokens or numbers of them, ConceptError for bad photos,
    AdapterFormatError by name for what this project does not apply, and AdapterMismatchError when the file is of
    another base model.
    """
    request = replace(request, base=lasting_name(request.base))  # which the manifest keeps
    path = find_weights(request.file)
    imported = _described(request, path)
    concepts = _concepts(request)
    base = load_base_model(request.base, device=device)
    skip = UNSUPPORTED if request.skip_unsupported else frozenset({TEXT_ENCODER} if request.unet_only else ())
    network = base.unet if request.unet_only else base.network
    found = read_foreign(path, unet=network, skip=skip, rank=request.rank)
    imported = imported.model_copy(update={"text_encoders": bool(found.weights.of_text.layers)})
    evaluation = _measure(base, found.weights, concepts, imported, listener) if concepts else None
    training: dict[str, Any] = {"imported_from": imported.source}
    if found.left_out.keys:
        training |= {"left_out": found.left_out.names, "left_out_kinds": found.left_out.counts}
    if request.rank is not None:
        training["reduced"] = report(found.reductions, request.rank)
    draft = adapter_draft(imported, base, concepts, found.weights, evaluation, training=training)
    return registry.publish(draft)


def _described(request: ImportRequest, path: Path) -> ImportedAdapter:
    if len(request.tokens) != len(request.class_nouns):
        raise SpecError(
            f"{len(request.tokens)} tokens and {len(request.class_nouns)} class nouns: give one class noun per token"
        )
    if request.photos and len(request.photos) != len(request.tokens):
        raise SpecError(
            f"{len(request.tokens)} tokens and {len(request.photos)} folders of photos: give one folder per token, in "
            "the order of the tokens, or none to publish without measuring"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AdapterFormatError(f"{path} cannot be read: {error}; check the path") from error
    try:
        return ImportedAdapter.model_validate(
            {
                "id": request.adapter_id,
                "base": request.base,
                "concepts": [
                    {"token": token, "class_noun": noun}
                    for token, noun in zip(request.tokens, request.class_nouns, strict=True)
                ],
                "evaluation": request.evaluation,
                "rank": request.rank,
                "source": path.name,
                "source_sha256": hashlib.sha256(content).hexdigest(),
            }
        )
    except ValidationError as error:
        lines = field_lines(error, {"": ImportedAdapter, "concepts": ImportedConcept, "evaluation": EvaluationSpec})
        raise SpecError("\n".join([f"{path.name} cannot be imported as asked:", *lines])) from error


def _concepts(request: ImportRequest) -> tuple[Concept, ...]:
    concepts = tuple(
        # Photos only measure an adapter that was trained elsewhere: where they have masks, these change nothing.
        load_concept(ConceptSpec(token=token, class_noun=noun, images=str(folder), captions="template"), masked=True)
        for token, noun, folder in zip(request.tokens, request.class_nouns, request.photos, strict=bool(request.photos))
    )
    check_tokens(concepts)
    return concepts


def _measure(
    base: BaseModel,
    weights: AdapterWeights,
    concepts: Sequence[Concept],
    imported: ImportedAdapter,
    listener: ImageListener,
) -> Evaluation:
    bank = LoraBank.attach(base.network, layers=list(weights.layers))
    try:
        bank.load(1, weights)
        return Evaluator(base, bank).evaluate(
            1, concepts, imported.evaluation, on_progress=lambda done, total: listener.images(imported.id, done, total)
        )
    finally:
        bank.detach()
