"""Which blocks of a U-Net a bank adapts, and blocks that are compiled."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch._dynamo.utils
from diffusers import UNet2DConditionModel

from cat_cluster.lora.bank import BLOCKS, TARGETS, LoraBank, adapted_layers
from cat_cluster.models.base_model import compiled_blocks
from cat_cluster.spec.choices import Blocks, Targets
from cat_cluster.training.methods import initial_weights
from tests.unit.lora.test_bank import WeightsFactory, attach, inputs, loss_of, predict


def test_whatever_a_spec_may_choose_has_its_layers() -> None:
    assert (tuple(TARGETS), tuple(BLOCKS)) == (get_args(Targets), get_args(Blocks))


@pytest.mark.parametrize(("blocks", "first"), [("all", "down_blocks"), ("mid_up", "mid_block"), ("up", "up_blocks")])
def test_nothing_below_the_first_adapted_layer_takes_part_in_the_backward(
    unet: UNet2DConditionModel, blocks: str, first: str
) -> None:
    layers = adapted_layers(unet, "attention", blocks)
    assert any(name.startswith(first) for name in layers)
    assert set(layers) == {n for n in adapted_layers(unet, "attention") if n.startswith(BLOCKS[blocks])}
    kept: dict[str, bool] = {}
    for name in ("conv_in", "down_blocks.0", "mid_block", "up_blocks.1"):
        unet.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: kept.update(
                {name: (output[0] if isinstance(output, tuple) else output).requires_grad}
            )
        )
    bank = LoraBank.attach(unet, layers=layers)
    bank.new_trainable(1, initial_weights(unet, layers, rank=2, seed=0, draw_key="mug"))
    with bank.rows([1, 1]):
        loss_of(unet(*inputs(2)).sample).backward()
    assert all(parameter.grad is not None for parameter in bank.parameters(1))
    order = ["conv_in", "down_blocks.0", "mid_block", "up_blocks.1"]
    reached = {"all": 1, "mid_up": 2, "up": 3}[blocks]
    assert [kept[name] for name in order] == [False] * reached + [True] * (4 - reached)


def test_unknown_blocks_are_refused(one_unet: UNet2DConditionModel) -> None:
    with pytest.raises(ValueError, match="mid_up"):
        adapted_layers(one_unet, "attention", "down")


@pytest.mark.slow
def test_compiled_blocks_give_the_same_rows_and_another_adapter_compiles_nothing(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory
) -> None:
    one, two, three = (make_weights(one_unet, seed=seed) for seed in (1, 2, 3))
    bank = attach(one_unet, [one, two])
    expected = predict(bank, [1, 0, 1])
    usual = torch._dynamo.config.recompile_limit
    with compiled_blocks(one_unet.mid_block):  # compiling all takes minutes
        assert torch._dynamo.config.recompile_limit >= 1000, "photos of a few sizes would pass torch's own limit"
        torch.testing.assert_close(predict(bank, [1, 0, 1]), expected, rtol=1e-4, atol=1e-5)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert before > 0
        bank.load(1, three)
        changed = predict(bank, [1, 2, 0])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    torch.testing.assert_close(changed, predict(bank, [1, 2, 0]), rtol=1e-4, atol=1e-5)
    assert torch._dynamo.config.recompile_limit == usual
    assert not any(module._compiled_call_impl for module in one_unet.modules())
