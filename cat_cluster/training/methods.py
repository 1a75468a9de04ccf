"""The training methods: which loss terms add up, and from which weights an adapter starts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel

from cat_cluster.data.keys import keyed_generator
from cat_cluster.lora.formats import AdapterWeights, LoraLayer
from cat_cluster.spec.choices import MethodName


def effective_alpha(method: MethodName, alpha: float) -> float:
    """Return the weight of a concept's CAT term: its own alpha under `cat`, 0 under plain `lora`."""
    return alpha if method == "cat" else 0.0


def initial_weights(
    unet: UNet2DConditionModel, layers: Sequence[str], *, rank: int, seed: int, draw_key: str
) -> AdapterWeights:
    """Return the LoRA weights an adapter starts from: A Kaiming-uniform (a = sqrt 5, as PEFT), B zero.

    layers: module paths of the adapted linears. Each A [R, in] is keyed by (seed, draw key, layer), so it does
    not depend on the pack. B [out, R] = 0 makes the untrained adapter equal to the base model.
    """
    weights = {}
    for name in layers:
        linear = unet.get_submodule(name)
        bound = 1.0 / math.sqrt(linear.in_features)  # sqrt(6 / ((1 + 5) * fan_in))
        generator = keyed_generator(seed, draw_key, "lora_down", name)
        down = generator.uniform(-bound, bound, (rank, linear.in_features)).astype("float32")
        weights[name] = LoraLayer(down=torch.from_numpy(down), up=torch.zeros(linear.out_features, rank))
    return AdapterWeights(weights)
