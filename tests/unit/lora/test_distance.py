"""The distance of two adapters is that of their products, layer by layer."""

from __future__ import annotations

import math

import pytest
import torch

from cat_cluster.lora.distance import relative_distance
from cat_cluster.lora.formats import AdapterWeights, LoraLayer


def adapter(seed: int, *names: str, rank: int = 3) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    return AdapterWeights(
        {
            name: LoraLayer(torch.randn(rank, 7, generator=generator), torch.randn(9, rank, generator=generator))
            for name in names
        }
    )


def moved(start: AdapterWeights, size: float) -> AdapterWeights:
    return AdapterWeights({name: LoraLayer(layer.down, layer.up + size) for name, layer in start.layers.items()})


@pytest.mark.parametrize("size", [1e-4, 0.1, 3.0])
def test_the_distance_is_that_of_the_products(size: float) -> None:
    """Also a small one, where squares that cancel could leave nothing."""
    start = adapter(1, "a", "b")
    weights = moved(start, size)
    apart, whole = 0.0, 0.0
    for name, first in start.layers.items():
        layer = weights.layers[name]
        product, first_product = layer.up.double() @ layer.down.double(), first.up.double() @ first.down.double()
        apart += float((product - first_product).square().sum())
        whole += float(first_product.square().sum())
    assert relative_distance(weights, start) == pytest.approx(math.sqrt(apart / whole), rel=1e-6)


def test_layers_that_only_one_has_count_as_nothing_in_the_other_and_ranks_may_differ() -> None:
    start, weights = adapter(1, "a"), adapter(1, "a", rank=3)
    more = AdapterWeights({**weights.layers, **adapter(2, "b", rank=5).layers})
    extra, first = more.layers["b"], start.layers["a"]
    wanted = float((extra.up @ extra.down).norm() / (first.up @ first.down).norm())
    assert relative_distance(more, start) == pytest.approx(wanted, rel=1e-5)
    assert relative_distance(start, start) == pytest.approx(0.0, abs=1e-7)
    nothing = AdapterWeights({"a": LoraLayer(first.down, torch.zeros_like(first.up))})
    assert relative_distance(start, nothing) == math.inf
