"""The training methods: which loss terms add up, which layers are adapted, and from which weights an adapter starts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from cat_cluster.data.keys import keyed_generator
from cat_cluster.lora.bank import adapted_layers, text_layers
from cat_cluster.lora.formats import AdapterWeights, LoraLayer
from cat_cluster.lora.layers import sizes_of
from cat_cluster.models.base_model import BaseModel
from cat_cluster.spec.choices import MethodName
from cat_cluster.spec.sections import TrainingSpec


def effective_alpha(method: MethodName, alpha: float) -> float:
    """Return the weight of a concept's CAT term: its own alpha under `cat`, 0 under plain `lora`."""
    return alpha if method == "cat" else 0.0


def trained_layers(base: BaseModel, training: TrainingSpec) -> tuple[str, ...]:
    """Return the layers of a base's `network` that an adapter trains: of the U-Net and, if asked, of text encoders.

    Those whose output nothing reads would get no gradient, and are left out.
    """
    of_unet = adapted_layers(base.unet, training.targets, training.blocks)
    if training.text_encoder is None:
        return of_unet
    unread = base.text_encoders.unread
    return (*of_unet, *(layer for layer in text_layers(base.network) if not layer.startswith(unread)))


def initial_weights(
    network: nn.Module, layers: Sequence[str], *, rank: int, seed: int, draw_key: str
) -> AdapterWeights:
    """Return the LoRA weights an adapter starts from: A Kaiming-uniform (a = sqrt 5, as PEFT), B zero.

    layers: paths of the adapted linears in a U-Net, or in a base's `network`. Each A [R, in] is keyed by (seed, draw
    key, layer), so it does not depend on the pack. B [out, R] = 0 makes the untrained adapter equal to the base model.
    """
    weights = {}
    for name in layers:
        sizes = sizes_of(network.get_submodule(name))
        assert sizes is not None  # an adapted layer has them
        inputs, outputs = sizes
        bound = 1.0 / math.sqrt(inputs)  # sqrt(6 / ((1 + 5) * fan_in))
        generator = keyed_generator(seed, draw_key, "lora_down", name)
        down = generator.uniform(-bound, bound, (rank, inputs)).astype("float32")
        weights[name] = LoraLayer(down=torch.from_numpy(down), up=torch.zeros(outputs, rank))
    return AdapterWeights(weights)
