"""Drafts of tiny adapters for the registry's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from cat_cluster.lora.formats import AdapterWeights, LoraLayer
from cat_cluster.registry import AdapterDraft, Registry
from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.spec.job import ResolvedAdapter
from cat_cluster.spec.sections import EvaluationSpec, TrainingSpec
from cat_cluster.store import LocalStore

BASE = "b" * 64
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0")

DraftFactory = Callable[..., AdapterDraft]


@pytest.fixture(scope="session")
def unet(tiny_base_folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_base_folder / "unet")


@pytest.fixture(scope="session")
def make_weights(unet: UNet2DConditionModel) -> Callable[..., AdapterWeights]:
    """Random weights that fit the tiny U-Net; `broken` puts that number into the last layer."""

    def make(*, rank: int = 2, seed: int = 0, broken: float | None = None) -> AdapterWeights:
        generator = torch.Generator().manual_seed(seed)
        layers = {}
        for name, linear in unet.named_modules():
            if name.endswith(ADAPTED):
                down = torch.randn(rank, linear.in_features, generator=generator)
                layers[name] = LoraLayer(down=down, up=torch.randn(linear.out_features, rank, generator=generator))
        if broken is not None:
            layers[max(layers)].up[0, 0] = broken
        return AdapterWeights(layers)

    return make


@pytest.fixture(scope="session")
def make_draft(make_weights: Callable[..., AdapterWeights]) -> DraftFactory:
    """A draft of adapter `cup`; another seed makes another revision; keywords replace fields."""

    def make(*, seed: int = 0, adapter_id: str = "cup", **changes: Any) -> AdapterDraft:
        resolved = ResolvedAdapter(
            id=adapter_id,
            base="pocket",
            method="cat",
            concepts=(ConceptSpec(token="sks", class_noun="cup", images="photos", alpha=2.0),),
            training=TrainingSpec(rank=2, seed=seed),
            evaluation=EvaluationSpec(),
        )
        fields: dict[str, Any] = {
            "adapter_id": adapter_id,
            "resolved": resolved,
            "base_name": "pocket",
            "base_fingerprint": BASE,
            "image_digests": ["1" * 64, "2" * 64],
            "weights": make_weights(seed=seed),
            "training": {"steps": 400, "history": {"sks": [0.5, 0.25]}, "dropped": None},
            "metrics": {"kps": 0.2, "intervals": {"kps": [0.1, 0.3]}},
            "judge": {"name": "pocket", "digest": "d" * 64},
            "reference": {"kps": 0.2},
            "samples": {"base.png": b"the same in every revision", "token.png": f"picture {seed}".encode()},
        }
        return AdapterDraft(**{**fields, **changes})

    return make


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(LocalStore(tmp_path / "storage"))
