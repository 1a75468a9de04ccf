"""Several adapters as one file: what PEFT makes of it is what it makes of them one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from cat_cluster.errors import AdapterMismatchError
from cat_cluster.lora.formats import AdapterWeights, LoraLayer, read_adapter, write_adapter
from cat_cluster.lora.stacks import stack_weights
from cat_cluster.spec.choices import AdapterFormat
from tests.unit.lora.test_bank import WeightsFactory, inputs, with_peft

STRENGTHS = (0.75, -0.5, 1.25)


@pytest.fixture
def members(one_unet: UNet2DConditionModel, make_weights: WeightsFactory) -> list[AdapterWeights]:
    """Adapters of several ranks, one of other layers, one with convolutions."""
    made = zip(((2,), (1, 3), (3,)), ("attention_ff", "attention_ff", "attention"), strict=True)
    return [
        make_weights(one_unet, ranks=ranks, targets=targets, convolutions=number == 1, seed=number)
        for number, (ranks, targets) in enumerate(made)
    ]


@torch.no_grad()
def test_a_stack_is_the_sum_of_the_changes(one_unet: UNet2DConditionModel, members: list[AdapterWeights]) -> None:
    x, t, text = inputs(2)
    stacked = stack_weights(list(zip(members, STRENGTHS, strict=True)))
    for name, layer in stacked.layers.items():
        changes = [s * m.layers[name].up @ m.layers[name].down for m, s in zip(members, STRENGTHS, strict=True)
                   if name in m.layers]  # fmt: skip
        torch.testing.assert_close(layer.up @ layer.down, sum(changes), rtol=1e-5, atol=1e-5)
        assert len(layer.down) == sum(len(m.layers[name].down) for m in members if name in m.layers)
    found = with_peft(one_unet, stacked)(x, t, text).sample
    for weights, strength in zip(members, STRENGTHS, strict=True):
        for name, layer in weights.layers.items():
            weight = one_unet.get_submodule(name).weight
            weight += (strength * layer.up @ layer.down).view_as(weight)
    torch.testing.assert_close(found, one_unet(x, t, text).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fmt", ["diffusers", "peft", "kohya"])
def test_a_stack_goes_out_and_comes_in_in_every_format(
    one_unet: UNet2DConditionModel, members: list[AdapterWeights], tmp_path: Path, fmt: AdapterFormat
) -> None:
    stacked = stack_weights(list(zip(members, STRENGTHS, strict=True)))
    path = write_adapter(stacked, tmp_path, fmt, adapter_id="cup+mug", metadata={})
    assert read_adapter(path, unet=one_unet).digest() == stacked.digest()


def test_one_adapter_is_itself_to_the_bit(members: list[AdapterWeights]) -> None:
    assert stack_weights([(members[0], 1.0)]).digest() == members[0].digest()


def test_layers_of_other_sizes_are_named() -> None:
    one, two = (AdapterWeights({"mid": LoraLayer(torch.ones(2, n), torch.ones(4, 2))}) for n in (3, 5))
    with pytest.raises(AdapterMismatchError, match="layer mid has other sizes"):
        stack_weights([(one, 1.0), (two, 1.0)])
