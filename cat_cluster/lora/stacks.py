"""Several adapters as one, for whoever applies a single file or bank slot: W + sum_m strength_m up_m down_m."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cat_cluster.errors import AdapterFormatError, AdapterMismatchError
from cat_cluster.lora.formats import AdapterWeights, LoraLayer


def stack_weights(adapters: Sequence[tuple[AdapterWeights, float]]) -> AdapterWeights:
    """Return adapters, each at its strength, as one: concatenated along the rank, which is the sum of their ranks.

    Each up is multiplied by its strength. Raises, naming the layer, AdapterMismatchError where two do not take the same
    sizes, and AdapterFormatError where a strength is more than its numbers hold.
    """
    parts: dict[str, list[LoraLayer]] = {}
    for weights, strength in adapters:
        for name, layer in weights.layers.items():
            up = layer.up * strength
            if not bool(up.isfinite().all()):
                raise AdapterFormatError(f"layer {name} is not finite at strength {strength:g}: lower the strength")
            parts.setdefault(name, []).append(LoraLayer(layer.down, up, layer.convolution))
    return AdapterWeights({name: _side_by_side(name, layers) for name, layers in parts.items()})


def _side_by_side(name: str, layers: Sequence[LoraLayer]) -> LoraLayer:
    sizes = {(layer.down.shape[1], layer.up.shape[0], layer.convolution) for layer in layers}
    if len(sizes) > 1:
        raise AdapterMismatchError(
            f"layer {name} has other sizes in one adapter than in another: stack those of one base"
        )
    return LoraLayer(
        torch.cat([layer.down for layer in layers]),
        torch.cat([layer.up for layer in layers], dim=1),
        layers[0].convolution,
    )
