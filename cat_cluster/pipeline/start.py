"""Training on from a published adapter: which revision it is, whether it fits, and how far training went from it."""

from __future__ import annotations

from typing import Any

from cat_cluster.errors import AdapterMismatchError, AdapterNotFoundError, RegistryError, SpecError
from cat_cluster.lora.distance import relative_distance
from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.lora.layers import in_text_encoder
from cat_cluster.models.base_model import BaseModel
from cat_cluster.registry import Registry
from cat_cluster.spec.job import ResolvedAdapter
from cat_cluster.spec.sections import TextEncoderSpec, TrainingSpec
from cat_cluster.training.methods import trained_layers


def with_pinned_start(resolved: ResolvedAdapter, registry: Registry) -> ResolvedAdapter:
    """Return an adapter whose `init_from` is the revision that it names now; the adapter itself without one.

    Raises SpecError for a start of another rank or one in quarantine, AdapterNotFoundError where there is none.
    """
    training = resolved.training
    if training.init_from is None:
        return resolved
    try:
        manifest = registry.resolve(training.init_from)
    except AdapterNotFoundError as error:
        raise AdapterNotFoundError(f"{_field(resolved)}: {error}") from error
    if manifest.rank != training.rank:
        raise SpecError(
            f"{_field(resolved)}: {manifest.name} has rank {manifest.rank} and training.rank is {training.rank}: "
            f"set it to {manifest.rank}"
        )
    if (quarantine := registry.quarantined(manifest.adapter_id, manifest.revision)) is not None:
        raise SpecError(
            f"{_field(resolved)}: {manifest.name} is in quarantine ({quarantine.reason}): release it, or name another"
        )
    return resolved.model_copy(update={"training": training.model_copy(update={"init_from": manifest.name})})


def start_weights(resolved: ResolvedAdapter, base: BaseModel, registry: Registry) -> AdapterWeights | None:
    """Return the weights that an adapter trains on from, None where it starts anew.

    Raises AdapterMismatchError for a start of another base or with layers that this training does not adapt,
    RegistryError or AdapterFormatError where it cannot be read.
    """
    training = resolved.training
    if training.init_from is None:
        return None
    manifest = registry.resolve(training.init_from)
    try:
        weights = registry.load_weights(manifest, base_fingerprints=base.fingerprints, unet=base.network)
    except (AdapterMismatchError, RegistryError) as error:
        raise type(error)(f"{_field(resolved)}: {error}") from error
    # Files of kohya's trainer have the last layer of SDXL's first text encoder, of which nothing is ever read.
    unread = base.text_encoders.unread
    weights = AdapterWeights({name: one for name, one in weights.layers.items() if not name.startswith(unread)})
    adapted = set(trained_layers(base, training))
    foreign = next((layer for layer in weights.layers if layer not in adapted), None)
    if foreign is not None:
        raise AdapterMismatchError(
            f"{_field(resolved)}: {manifest.name} changes {foreign}, which {_left_out(base, training, foreign)}"
        )
    return weights


def start_record(resolved: ResolvedAdapter, weights: AdapterWeights, start: AdapterWeights | None) -> dict[str, Any]:
    """Return what a manifest's training says of the start: the adapter, and ||W - W_0|| / ||W_0|| over all layers."""
    if start is None:
        return {}
    return {"init_from": {"adapter": resolved.training.init_from, "distance": relative_distance(weights, start)}}


def _left_out(base: BaseModel, training: TrainingSpec, layer: str) -> str:
    """Say why training does not adapt a layer, and what to do."""
    all_of_it: dict[str, object] = {"targets": "attention_ff", "blocks": "all", "text_encoder": TextEncoderSpec()}
    if layer not in trained_layers(base, training.model_copy(update=all_of_it)):
        return (
            "no training adapts, as of convolutions and layers outside of attention blocks: start from another adapter"
        )
    by = f"targets: {training.targets} and blocks: {training.blocks} leave out"
    if in_text_encoder(layer):
        by = "training without text_encoder leaves out"
    return f"{by}: adapt more, or start from another adapter"


def _field(resolved: ResolvedAdapter) -> str:
    return f"training.init_from of adapter {resolved.id}"
