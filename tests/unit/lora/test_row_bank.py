"""The bank of serving: a row bound once is what PEFT makes of its adapter, and no row notices another."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch._dynamo.utils
from diffusers import UNet2DConditionModel
from torch import Tensor

from cat_cluster.errors import AdapterMismatchError
from cat_cluster.lora import row_bank
from cat_cluster.lora.bank import TARGETS, LoraBank, adapted_layers, served_layers
from cat_cluster.lora.formats import AdapterWeights, LoraLayer
from cat_cluster.lora.layers import change_of_pixels
from cat_cluster.lora.row_bank import AdapterLayout, RowAdapter, RowBank, RowBlock
from cat_cluster.lora.stacks import stack_weights
from cat_cluster.models.base_model import compiled_blocks
from tests.unit.lora.test_bank import WeightsFactory, inputs, with_peft

RANK = 4


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@contextmanager
def attached(unet: UNet2DConditionModel, targets: str = "attention_ff", rank: int = RANK) -> Iterator[RowBank]:
    bank = RowBank(unet, AdapterLayout(unet, served_layers(unet, targets), rank))
    try:
        yield bank
    finally:
        bank.detach()


def predict(bank: RowBank, block: RowBlock, rows: int) -> Tensor:
    with block.call(rows):
        output: Tensor = bank.unet(*inputs(rows)).sample
    return output


def texts(rows: int) -> Tensor:
    """The texts of `inputs`, which draws them last: they depend on the number of rows."""
    return inputs(rows)[2]


def bind_all(
    bank: RowBank, block: RowBlock, adapters: Sequence[AdapterWeights | None], strengths: Sequence[float]
) -> None:
    for row, (weights, strength) in enumerate(zip(adapters, strengths, strict=True)):
        stack = () if weights is None else (row_adapter(bank, weights, strength),)
        block.bind([row], texts(len(adapters))[row : row + 1], stack)


def row_adapter(bank: RowBank, weights: AdapterWeights, strength: float = 1.0) -> RowAdapter:
    return RowAdapter(bank.layout.pack(weights), weights.rank, strength)


def scaled(weights: AdapterWeights, strength: float) -> AdapterWeights:
    return AdapterWeights({name: replace(layer, up=layer.up * strength) for name, layer in weights.layers.items()})


# -- the flat vector -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", list(TARGETS))
def test_pack_and_factors_are_inverse(unet: UNet2DConditionModel, make_weights: WeightsFactory, targets: str) -> None:
    layers = adapted_layers(unet, targets)
    layout = AdapterLayout(unet, layers, RANK)
    weights = make_weights(unet, ranks=(1, 3, 4), targets=targets)
    flat = torch.stack([layout.pack(weights), layout.pack(make_weights(unet, targets=targets, seed=9))])
    assert flat.shape == (2, layout.size)
    assert layout.size == sum(RANK * (inputs + outputs) for inputs, outputs in layout.shapes.values())
    touched = torch.zeros(2, layout.size)
    for name in layers:
        down, up = layout.factors(flat, name)
        rank = len(weights.layers[name].down)
        assert torch.equal(down[0, :rank], weights.layers[name].down)
        assert torch.equal(up[0, :, :rank], weights.layers[name].up)
        assert not down[0, rank:].any()
        assert not up[0, :, rank:].any()
        for part in layout.factors(touched, name):
            part += 1
    assert torch.equal(touched, torch.ones_like(touched)), "parts overlap, or leave a gap"


@pytest.mark.parametrize("targets", ["attention_ff", "all"])
def test_1x1_convolutions_and_layers_outside_attention_are_pefts(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory, targets: str
) -> None:
    weights = make_weights(one_unet, ranks=(2, 4), targets=targets, convolutions=True)
    assert any(layer.convolution for layer in weights.layers.values())
    outside = {"time_embedding.linear_1", "mid_block.resnets.0.time_emb_proj", "up_blocks.0.resnets.0.conv_shortcut"}
    assert (outside <= set(weights.layers)) == (targets == "all")
    x, t, text = inputs(2)
    bare = one_unet(x, t, text).sample
    expected = with_peft(one_unet, weights)(x, t, text).sample
    with attached(one_unet, targets) as bank:
        block = bank.block(2, text.shape[1])
        bind_all(bank, block, [weights, None], [1.0, 1.0])
        found = predict(bank, block, 2)
        one_unet.to(memory_format=torch.channels_last)
        again = predict(bank, block, 2)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], bare[1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[0], bare[0], atol=1e-3)


def test_convolutions_cost_nothing_unless_an_adapter_in_the_call_changes_them(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counting(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        asked.append(len(x))
        return change_of_pixels(x, down, up)

    monkeypatch.setattr(row_bank, "change_of_pixels", counting)
    plain = make_weights(one_unet, ranks=(2,), targets="attention_ff")
    imported = make_weights(one_unet, ranks=(2,), targets="attention_ff", convolutions=True)
    with attached(one_unet) as bank:
        convolutions, block = len(bank.layout.rare), bank.block(3, inputs(1)[2].shape[1])
        bind_all(bank, block, [plain, None, imported], [1.0, 1.0, 1.0])
        alone = predict(bank, block, 2)
        assert asked == []
        predict(bank, block, 3)
        assert asked == [3] * convolutions
        block.move(2, 1)
        predict(bank, block, 2)
        assert asked == [3] * convolutions + [2] * convolutions
        block.clear(1)
        assert torch.equal(predict(bank, block, 2)[0], alone[0])
        assert len(asked) == 2 * convolutions


def test_layers_that_an_adapter_lacks_are_zero(one_unet: UNet2DConditionModel, make_weights: WeightsFactory) -> None:
    layout = AdapterLayout(one_unet, adapted_layers(one_unet, "attention_ff"), RANK)
    flat = layout.pack(make_weights(one_unet, targets="cross_attention")).unsqueeze(0)
    for name in layout.shapes:
        assert bool(layout.factors(flat, name)[1].any()) == (".attn2." in name)


def test_what_does_not_fit_is_refused(one_unet: UNet2DConditionModel, make_weights: WeightsFactory) -> None:
    layout = AdapterLayout(one_unet, adapted_layers(one_unet, "cross_attention"), RANK)
    with pytest.raises(AdapterMismatchError, match="raise max_rank"):
        layout.pack(make_weights(one_unet, ranks=(5,), targets="cross_attention"))
    with pytest.raises(AdapterMismatchError, match="set targets"):
        layout.pack(make_weights(one_unet, targets="attention_ff"))
    name = next(iter(layout.shapes))
    with pytest.raises(AdapterMismatchError, match="the base it was made for"):
        layout.pack(AdapterWeights({name: LoraLayer(torch.zeros(1, 3), torch.zeros(8, 1))}))


# -- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("targets", list(TARGETS))
def test_every_row_of_a_mixed_batch_is_pefts_and_the_other_banks(
    unet: UNet2DConditionModel, make_weights: WeightsFactory, targets: str
) -> None:
    one, two = (make_weights(unet, ranks=r, targets=targets, seed=s) for s, r in enumerate([(1, 3), (4,)], 1))
    adapters = [two, None, one, one, two, None]
    strengths = [1.0, 1.0, 0.5, 1.0, -0.75, 1.0]
    x, t, text = inputs(6)
    bare = unet(x, t, text).sample
    oracles = [None if a is None else with_peft(unet, scaled(a, s)) for a, s in zip(adapters, strengths, strict=True)]
    expected = [bare[row] if o is None else o(x, t, text).sample[row] for row, o in enumerate(oracles)]
    with attached(unet, targets) as bank:
        block = bank.block(8, text.shape[1])
        bind_all(bank, block, adapters, strengths)
        found = predict(bank, block, 6)
    training = LoraBank.attach(unet, layers=adapted_layers(unet, targets))
    for slot, (weights, strength) in enumerate([(two, 1.0), (one, 0.5), (one, 1.0), (two, -0.75)], 1):
        training.load(slot, weights, strength=strength)
    with training.rows([1, 0, 2, 3, 4, 0]):
        other_bank = unet(x, t, text).sample
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, other_bank, rtol=1e-4, atol=1e-5)
    assert float((found[0] - bare[0]).abs().max()) > 1e-3
    assert torch.equal(found[[1, 5]], bare[[1, 5]]), "a base row is the bare U-Net's, to the bit"


def test_a_batch_of_base_rows_is_the_bare_unet_to_the_bit(unet: UNet2DConditionModel) -> None:
    bare = unet(*inputs(5)).sample
    with attached(unet) as bank:
        block = bank.block(5, 7)
        bind_all(bank, block, [None] * 5, [1.0] * 5)
        assert torch.equal(predict(bank, block, 5), bare)


def test_a_row_does_not_depend_on_its_neighbours(one_unet: UNet2DConditionModel, make_weights: WeightsFactory) -> None:
    one, two = (make_weights(one_unet, targets="attention_ff", seed=seed) for seed in (1, 2))
    poisoned = scaled(two, float("nan"))
    with attached(one_unet) as bank:
        found = []
        for neighbour in (None, two, poisoned):
            block = bank.block(3, 7)
            bind_all(bank, block, [neighbour, one, neighbour], [1.0] * 3)
            found.append(predict(bank, block, 3))
        assert torch.equal(found[0][1], found[1][1])
        assert torch.equal(found[0][1], found[2][1])
        assert found[2][0].isnan().all()
        # The next image in a row that a damaged adapter had is sound.
        bind_all(bank, block, [None, one, two], [1.0] * 3)
        assert predict(bank, block, 3).isfinite().all()
        for row in range(3):
            block.clear(row)
        assert predict(bank, block, 3).isfinite().all()


def test_the_kept_outputs_are_what_the_layers_compute(unet: UNet2DConditionModel, make_weights: WeightsFactory) -> None:
    """Keys and values of the text, computed once, against the layers of a U-Net with PEFT that sees every call."""
    weights = make_weights(unet, targets="attention_ff")
    twin, seen = with_peft(unet, weights), dict[str, Tensor]()
    names = [n for n, _ in unet.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))]
    for name in names:
        twin.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: output})
        )
    twin(*inputs(2))
    with attached(unet) as bank:
        assert sorted(bank.text_side) == sorted(names)
        block = bank.block(4, 7)
        block.bind([3, 1], texts(2), (row_adapter(bank, weights),))
        for name in names:
            torch.testing.assert_close(block._kept[name][[3, 1]], seen[name], rtol=1e-5, atol=1e-5)


def test_moved_rows_go_on_and_free_ones_are_base_rows(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory
) -> None:
    one, two = (make_weights(one_unet, targets="attention_ff", seed=seed) for seed in (1, 2))
    x, t, text = inputs(3)
    with attached(one_unet) as bank:
        block = bank.block(3, 7)
        bind_all(bank, block, [one, None, two], [1.0, 1.0, 0.5])
        before = predict(bank, block, 3)
        assert block.adapters(1) == ()
        kept = block.adapters(2)
        assert len(kept) == 1
        block.move(2, 0)
        assert block.adapters(2) == ()
        assert not block._flat_BF[2].any()
        with block.call(1):
            moved = bank.unet(x[2:], t[2:], text[2:]).sample
        torch.testing.assert_close(moved[0], before[2], rtol=1e-4, atol=1e-5)
        # What `adapters` gave back makes the same row again: its strength is in it.
        block.bind([2], text[2:], kept)
        assert torch.equal(predict(bank, block, 3)[2], before[2])
        block.move(1, 0)
        assert block.adapters(0) == ()
        block.clear(2)
        assert not block._flat_BF.any()


def test_the_calls_of_two_blocks_do_not_mix(one_unet: UNet2DConditionModel, make_weights: WeightsFactory) -> None:
    one, two = (make_weights(one_unet, targets="attention_ff", seed=seed) for seed in (1, 2))
    with attached(one_unet) as bank:
        first, second = bank.block(2, 7), bank.block(2, 7)
        bind_all(bank, first, [one, None], [1.0, 1.0])
        before = predict(bank, first, 2)
        bind_all(bank, second, [two, two], [1.0, 1.0])
        assert not torch.equal(predict(bank, second, 2)[0], before[0])
        assert torch.equal(predict(bank, first, 2), before)


def test_detach_restores_and_an_exception_unbinds(one_unet: UNet2DConditionModel, make_weights: WeightsFactory) -> None:
    before, bare = dict(one_unet.named_modules()), one_unet(*inputs(2)).sample
    with attached(one_unet) as bank:
        block = bank.block(2, 7)
        bind_all(bank, block, [make_weights(one_unet), None], [1.0, 1.0])
        with pytest.raises(ZeroDivisionError), block.call(2):
            raise ZeroDivisionError
        assert torch.equal(one_unet(*inputs(2)).sample, bare), "outside of a call it is the bare U-Net"
    after = dict(one_unet.named_modules())
    assert after.keys() == before.keys()
    assert all(after[name] is module for name, module in before.items())


@pytest.mark.slow
def test_compiled_blocks_give_the_same_rows_and_swapping_adapters_compiles_nothing(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory
) -> None:
    one, two, three = (make_weights(one_unet, targets="attention_ff", seed=seed) for seed in (1, 2, 3))

    def rows(block: RowBlock, adapters: Sequence[AdapterWeights | None]) -> Tensor:
        bind_all(bank, block, adapters, [1.0, 0.5, 2.0])
        return predict(bank, block, 3)

    with torch.inference_mode(), attached(one_unet) as bank:  # as in the engine
        block, mixes = bank.block(4, 7), ([one, None, two], [three, two, None], [None, one, one])
        plain = [rows(block, mix) for mix in mixes]
        with compiled_blocks(one_unet.mid_block):  # compiling all takes minutes
            first = rows(block, mixes[0])
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert before > 0
            others = [rows(block, mix) for mix in mixes[1:]]
            block.move(2, 0)
            predict(bank, block, 3)
            other_block = bank.block(4, 7)
            others.append(rows(other_block, mixes[0]))
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    for found, expected in zip([first, *others], [*plain, plain[0]], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# -- stacks --------------------------------------------------------------------------------------------------------

WIDE = 8  # the ranks of the stacks below add up to at most this


def bound(bank: RowBank, stacks: Sequence[Sequence[RowAdapter]]) -> RowBlock:
    block = bank.block(len(stacks), 7)
    for row, stack in enumerate(stacks):
        block.bind([row], texts(len(stacks))[row : row + 1], stack)
    return block


def test_a_row_of_several_adapters_is_the_sum_of_their_changes(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory
) -> None:
    ranks: list[tuple[int, ...]] = [(2,), (1, 3), (3,)]
    members = [
        make_weights(one_unet, ranks=own, targets=targets, convolutions=number == 1, seed=number)
        for number, (own, targets) in enumerate(zip(ranks, ("attention_ff", "attention_ff", "attention"), strict=True))
    ]
    strengths = (0.75, -0.5, 1.25)
    x, t, text = inputs(2)
    summed = copy.deepcopy(one_unet)
    for weights, strength in zip(members, strengths, strict=True):
        for name, layer in weights.layers.items():
            weight = summed.get_submodule(name).weight
            weight += (strength * layer.up @ layer.down).view_as(weight)
    expected, bare = summed(x, t, text).sample, one_unet(x, t, text).sample
    with attached(one_unet, rank=WIDE) as bank:
        stack = [row_adapter(bank, w, s) for w, s in zip(members, strengths, strict=True)]
        found = predict(bank, bound(bank, [stack, ()]), 2)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], bare[1], rtol=1e-5, atol=1e-6)


def test_a_stack_is_the_flat_vector_of_its_adapters_in_one_file(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory
) -> None:
    one, two = (make_weights(one_unet, ranks=(rank,), targets="attention_ff", seed=rank) for rank in (3, 2))
    with attached(one_unet, rank=WIDE) as bank:
        block = bound(bank, [[row_adapter(bank, one), row_adapter(bank, two, 0.5)], [row_adapter(bank, one)]])
        assert torch.equal(block._flat_BF[0], bank.layout.pack(stack_weights([(one, 1.0), (two, 0.5)])))
        assert torch.equal(block._flat_BF[1], bank.layout.pack(one)), "a stack of one is its adapter, to the bit"


def test_rows_hold_nothing_of_what_was_bound_before(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory
) -> None:
    one, two = (make_weights(one_unet, ranks=(3,), targets="attention_ff", seed=seed) for seed in (1, 2))
    with attached(one_unet, rank=WIDE) as bank:
        block, text = bank.block(1, 7), texts(1)
        block.bind([0], text, [row_adapter(bank, one), row_adapter(bank, two)])
        block.bind([0], text, [row_adapter(bank, two)])
        assert torch.equal(block._flat_BF[0], bank.layout.pack(two))
        block.bind([0], text)
        assert not block._flat_BF.any()


def test_ranks_that_add_up_to_more_than_a_row_holds_are_refused(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory
) -> None:
    one, two = (make_weights(one_unet, ranks=(3,), targets="attention_ff", seed=seed) for seed in (1, 2))
    with (
        attached(one_unet, rank=5) as bank,
        pytest.raises(AdapterMismatchError, match=r"ranks 3 \+ 3 are more than the 5"),
    ):
        bound(bank, [[row_adapter(bank, one), row_adapter(bank, two)]])
