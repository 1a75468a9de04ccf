"""What is served in the serving benchmarks: adapters of chance in a real registry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from cat_cluster.lora.bank import adapted_layers
from cat_cluster.lora.formats import AdapterWeights, LoraLayer
from cat_cluster.models.base_model import BaseModel
from cat_cluster.registry import AdapterDraft, Manifest, Registry
from cat_cluster.spec.choices import Targets
from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.spec.job import ResolvedAdapter
from cat_cluster.spec.sections import EvaluationSpec, TrainingSpec
from cat_cluster.store import open_store
from jobs.benchmark.timing import RANK

TARGETS: Targets = "attention_ff"
CHANGE = 0.07  # of the norm of each weight matrix: what trained adapters of this rank do
TOKEN, NOUN = "sks", "cup"


def random_adapter(unet: UNet2DConditionModel, seed: int) -> AdapterWeights:
    """An adapter of rank 8 that changes every weight matrix by 7% of its norm."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in adapted_layers(unet, TARGETS):
        weight = unet.get_submodule(name).weight.detach().float().cpu()
        outputs, inputs = weight.shape
        down = torch.randn(RANK, inputs, generator=generator) * inputs**-0.5
        up = torch.randn(outputs, RANK, generator=generator)
        change = ((up.mT @ up) * (down @ down.mT)).sum().sqrt()  # the Frobenius norm of up @ down
        layers[name] = LoraLayer(down, up * (CHANGE * torch.linalg.matrix_norm(weight) / change))
    return AdapterWeights(layers)


def publish(
    storage: Path,
    base: BaseModel,
    adapter_id: str,
    weights: AdapterWeights,
    evaluation: EvaluationSpec | None = None,
    reference: Mapping[str, Any] | None = None,
) -> Manifest:
    """Publish an adapter as training does; with a reference it can be probed."""
    resolved = ResolvedAdapter(
        id=adapter_id,
        base=base.name,
        method="cat",
        concepts=(ConceptSpec(token=TOKEN, class_noun=NOUN, images="photos"),),
        training=TrainingSpec(rank=RANK),
        evaluation=evaluation or EvaluationSpec(),
    )
    draft = AdapterDraft(
        adapter_id=adapter_id,
        resolved=resolved,
        base_name=base.name,
        base_fingerprint=base.fingerprint,
        image_digests=["0" * 64],
        weights=weights,
        training={},
        reference=reference,
    )
    return Registry(open_store(str(storage))).publish(draft)
