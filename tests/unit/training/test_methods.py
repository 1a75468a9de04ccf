"""What an adapter starts from and which terms its method adds up."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from cat_cluster.lora.bank import adapted_layers
from cat_cluster.models.base_model import load_base_model
from cat_cluster.training.methods import effective_alpha, initial_weights


def test_plain_lora_has_no_cat_term() -> None:
    assert effective_alpha("lora", 5.0) == 0.0
    assert effective_alpha("cat", 5.0) == 5.0


@pytest.mark.parametrize("targets", ["attention", "cross_attention", "attention_ff"])
def test_initial_weights_are_those_of_peft_in_law_and_keyed_by_name(tiny_base_folder: Path, targets: str) -> None:
    unet = load_base_model(str(tiny_base_folder)).unet
    layers = adapted_layers(unet, targets)
    weights = initial_weights(unet, layers, rank=4, seed=0, draw_key="mug")
    fewer = initial_weights(unet, layers[::-2], rank=4, seed=0, draw_key="mug")
    other = initial_weights(unet, layers, rank=4, seed=0, draw_key="tea")
    assert weights.rank == 4
    assert set(weights.layers) == set(layers)
    for name, layer in weights.layers.items():
        bound = 1 / math.sqrt(unet.get_submodule(name).in_features)
        assert layer.down.abs().max() <= bound
        assert layer.down.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.4)
        assert torch.equal(layer.up, torch.zeros_like(layer.up))
        assert not torch.equal(layer.down, other.layers[name].down)
    assert all(torch.equal(layer.down, weights.layers[name].down) for name, layer in fewer.layers.items())
