"""The LoRA bank: each row is what PEFT would make of it alone, and no row or slot notices another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from cat_cluster.errors import AdapterMismatchError
from cat_cluster.lora.bank import TARGETS, LoraBank, adapted_layers, served_layers
from cat_cluster.lora.formats import AdapterWeights, LoraLayer

WeightsFactory = Callable[..., AdapterWeights]


def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(rows, 4, 8, 8, generator=generator),
        torch.randint(0, 1000, (rows,), generator=generator),
        torch.randn(rows, 7, 16, generator=generator),
    )


def attach(unet: UNet2DConditionModel, adapters: Sequence[AdapterWeights]) -> LoraBank:
    bank = LoraBank.attach(unet, layers=list(adapters[0].layers))
    for slot, weights in enumerate(adapters, start=1):
        bank.load(slot, weights)
    return bank


def predict(bank: LoraBank, slots: Sequence[int]) -> Tensor:
    with torch.no_grad(), bank.rows(slots):
        output: Tensor = bank.network(*inputs(len(slots))).sample
    return output


def with_peft(unet: UNet2DConditionModel, weights: AdapterWeights) -> UNet2DConditionModel:
    """A copy of the U-Net with one adapter in it, put there by PEFT."""
    twin = UNet2DConditionModel.from_config(unet.config).eval()
    twin.load_state_dict(unet.state_dict())
    ranks = {name: len(layer.down) for name, layer in weights.layers.items()}
    rank = weights.rank
    others = {name: own for name, own in ranks.items() if own != rank}
    twin.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ranks), rank_pattern=others, alpha_pattern=dict(others))
    )
    for name, layer in weights.layers.items():
        module = twin.get_submodule(name)
        for side, values in ((module.lora_A, layer.down), (module.lora_B, layer.up)):
            side["default"].weight.data.copy_(values.reshape(side["default"].weight.shape))
    return twin


def loss_of(output: Tensor) -> Tensor:
    """Unequal weights per row, so that rows cannot stand in for each other."""
    rows = torch.arange(1.0, len(output) + 1)
    return (output.square().flatten(1).mean(1) * rows).sum()


def train(bank: LoraBank, slots: Sequence[int]) -> dict[int, list[Tensor]]:
    with bank.rows(slots):
        loss_of(bank.network(*inputs(len(slots))).sample).backward()
    found = {}
    for slot in sorted(set(slots) - {0}):
        gradients = [parameter.grad for parameter in bank.parameters(slot)]
        found[slot] = [gradient.clone() for gradient in gradients if gradient is not None]
        assert len(found[slot]) == len(gradients)
        for parameter in bank.parameters(slot):
            parameter.grad = None
    return found


def open_for_training(
    unet: UNet2DConditionModel, make_weights: WeightsFactory, ranks: Sequence[int], targets: str = "attention"
) -> LoraBank:
    adapters = [make_weights(unet, ranks=(r,), targets=targets, seed=i) for i, r in enumerate(ranks, start=1)]
    bank = LoraBank.attach(unet, layers=list(adapters[0].layers))
    for slot, weights in enumerate(adapters, start=1):
        bank.new_trainable(slot, weights)
    return bank


# -- against PEFT --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", list(TARGETS))
@pytest.mark.parametrize("ranks", [(1,), (4,), (2, 3)])
def test_each_row_is_what_peft_makes_of_its_adapter(
    unet: UNet2DConditionModel, make_weights: WeightsFactory, targets: str, ranks: tuple[int, ...]
) -> None:
    adapters = [make_weights(unet, ranks=ranks, targets=targets, seed=seed) for seed in (1, 2)]
    expected = [unet(*inputs(3)).sample, *(with_peft(unet, one)(*inputs(3)).sample.detach() for one in adapters)]
    found = predict(attach(unet, adapters), [2, 0, 1])
    for row, slot in enumerate([2, 0, 1]):
        torch.testing.assert_close(found[row], expected[slot][row], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], expected[0][0], atol=1e-3)


def test_1x1_convolutions_are_linears_at_each_pixel(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory
) -> None:
    """PEFT adapts them as convolutions; the rows, the base rows and a training slot are as for linears."""
    adapters = [
        make_weights(one_unet, ranks=(2, 4), targets="attention_ff", seed=seed, convolutions=True) for seed in (1, 2)
    ]
    assert any(layer.convolution for layer in adapters[0].layers.values())
    assert adapted_layers(one_unet, "attention_ff") == tuple(
        name for name in served_layers(one_unet, "attention_ff") if not adapters[0].layers[name].convolution
    )
    expected = [one_unet(*inputs(3)).sample, *(with_peft(one_unet, one)(*inputs(3)).sample for one in adapters)]
    bank = attach(one_unet, adapters)
    found = predict(bank, [2, 0, 1])
    for row, slot in enumerate([2, 0, 1]):
        torch.testing.assert_close(found[row], expected[slot][row].detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(found[1], expected[0][1])
    one_unet.to(memory_format=torch.channels_last)
    torch.testing.assert_close(predict(bank, [2, 0, 1]), found, rtol=1e-4, atol=1e-5)
    bank.new_trainable(1, adapters[0])
    assert all(bool(gradient.any()) for gradient in train(bank, [1, 1])[1])
    exported = bank.export(1)
    assert {name: layer.convolution for name, layer in exported.layers.items()} == {
        name: layer.convolution for name, layer in adapters[0].layers.items()
    }


@pytest.mark.parametrize("targets", ["attention", "attention_ff"])
def test_the_gradient_of_a_slot_is_pefts_at_its_own_rank(
    unet: UNet2DConditionModel, make_weights: WeightsFactory, targets: str
) -> None:
    slots, ranks = [1, 2, 0, 2, 1], (4, 1)
    twins = [with_peft(unet, make_weights(unet, ranks=(r,), targets=targets, seed=i)) for i, r in enumerate(ranks, 1)]
    bank = open_for_training(unet, make_weights, ranks, targets)
    found = train(bank, slots)
    x, t, text = inputs(5)
    for slot, (twin, rank) in enumerate(zip(twins, ranks, strict=True), start=1):
        own = [row for row, bound in enumerate(slots) if bound == slot]
        output = twin(x[own], t[own], text[own]).sample
        (output.square().flatten(1).mean(1) * (torch.tensor(own) + 1.0)).sum().backward()
        modules = [twin.get_submodule(name) for name in bank.layers]
        expected = [getattr(m, side)["default"].weight.grad for m in modules for side in ("lora_A", "lora_B")]
        for ours, theirs in zip(found[slot], expected, strict=True):
            assert rank in ours.shape
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-6)


def test_the_layers_of_each_target_are_the_ones_peft_finds(unet: UNet2DConditionModel) -> None:
    suffixes = {
        "attention": ["to_q", "to_k", "to_v", "to_out.0"],
        "cross_attention": ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"],
        "attention_ff": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"],
    }
    order = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear)]
    for targets, wanted in suffixes.items():
        twin = UNet2DConditionModel.from_config(unet.config)
        twin.add_adapter(LoraConfig(r=1, target_modules=wanted))
        theirs = {
            name.removesuffix(".lora_A.default") for name, _ in twin.named_modules() if name.endswith("A.default")
        }
        ours = adapted_layers(unet, targets)
        assert set(ours) == {name for name in theirs if isinstance(unet.get_submodule(name), nn.Linear)}
        assert list(ours) == [name for name in order if name in set(ours)]
        bank = LoraBank.attach(unet, layers=ours)
        assert adapted_layers(unet, targets) == ours
        bank.detach()
    with pytest.raises(ValueError, match="attention_ff"):
        adapted_layers(unet, "everything")


# -- laws, to the bit ----------------------------------------------------------------------------------------------


def test_slot_0_is_the_base_to_the_bit(unet: UNet2DConditionModel, make_weights: WeightsFactory) -> None:
    with torch.no_grad():
        bare = unet(*inputs(4)).sample
    bank = attach(unet, [make_weights(unet, targets="attention_ff")])
    assert torch.equal(predict(bank, [0, 0, 0, 0]), bare)
    mixed = predict(bank, [1, 0, 1, 0])
    assert torch.equal(mixed[1], bare[1])
    assert torch.equal(mixed[3], bare[3])
    assert not torch.equal(mixed[0], bare[0])


def test_a_row_does_not_notice_which_adapters_its_neighbours_use(
    unet: UNet2DConditionModel, make_weights: WeightsFactory
) -> None:
    bank = attach(unet, [make_weights(unet, ranks=(r,), seed=r) for r in (1, 2, 4)])
    alone_in_slot_2 = predict(bank, [2, 2, 2, 2])
    for neighbours in ([1, 1, 3], [0, 0, 0], [3, 2, 1], [2, 0, 2]):
        for place in range(4):
            slots = [*neighbours[:place], 2, *neighbours[place:]]
            assert torch.equal(predict(bank, slots)[place], alone_in_slot_2[place])


def test_a_row_does_not_notice_the_size_of_the_bank_or_its_other_slots(
    unet: UNet2DConditionModel, make_weights: WeightsFactory
) -> None:
    adapters = [make_weights(unet, ranks=(r,), seed=r) for r in (2, 4)]
    late = make_weights(unet, seed=9)
    bank = attach(unet, adapters)
    before = predict(bank, [1, 1, 2])
    bank.load(5, late)
    assert torch.equal(predict(bank, [1, 5, 2])[[0, 2]], before[[0, 2]])
    bank.clear(5)
    assert torch.equal(predict(bank, [1, 1, 2]), before)
    bank.detach()
    small = attach(unet, adapters)
    assert torch.equal(predict(small, [1, 1, 2]), before)


def test_a_slots_gradient_does_not_notice_its_neighbours_values(
    unet: UNet2DConditionModel, make_weights: WeightsFactory
) -> None:
    bank = open_for_training(unet, make_weights, (4, 2))
    first = train(bank, [1, 2, 1, 2, 0])
    for poison in (100.0, float("nan")):
        with torch.no_grad():
            for parameter in bank.parameters(2):
                parameter.mul_(poison)
        second = train(bank, [1, 2, 1, 2, 0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(first[2], second[2], strict=True))


def test_no_grad_and_grad_give_the_same_rows(unet: UNet2DConditionModel, make_weights: WeightsFactory) -> None:
    bank = open_for_training(unet, make_weights, (4, 2))
    with bank.rows([1, 2, 0]):
        trained = unet(*inputs(3)).sample
    assert trained.requires_grad
    assert torch.equal(predict(bank, [1, 2, 0]), trained.detach())


def test_gradient_checkpointing_gives_equal_gradients(unet: UNet2DConditionModel, make_weights: WeightsFactory) -> None:
    bank = open_for_training(unet, make_weights, (4, 2))
    plain = train(bank, [1, 2, 1])
    unet.train()
    unet.enable_gradient_checkpointing()
    again = train(bank, [1, 2, 1])
    for slot in (1, 2):
        for ours, theirs in zip(again[slot], plain[slot], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_rows_without_an_adapter_cost_no_gradient(unet: UNet2DConditionModel, make_weights: WeightsFactory) -> None:
    bank = open_for_training(unet, make_weights, (4,))
    with bank.rows([0, 0]):
        assert not unet(*inputs(2)).sample.requires_grad


# -- slots over time -----------------------------------------------------------------------------------------------


def test_training_steps_and_reloads_are_seen_by_the_next_forward(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory
) -> None:
    adapters = [make_weights(one_unet, seed=seed) for seed in (1, 2)]
    expected = [with_peft(one_unet, one)(*inputs(2)).sample.detach() for one in adapters]
    bank = attach(one_unet, adapters[:1])
    torch.testing.assert_close(predict(bank, [1, 1]), expected[0], rtol=1e-4, atol=1e-5)
    bank.load(1, adapters[1])
    torch.testing.assert_close(predict(bank, [1, 1]), expected[1], rtol=1e-4, atol=1e-5)
    bank.new_trainable(1, adapters[1])
    predict(bank, [1, 1])
    with torch.no_grad():
        for parameter, value in zip(
            bank.parameters(1),
            [side for layer in adapters[0].layers.values() for side in (layer.down, layer.up)],
            strict=True,
        ):
            parameter.copy_(value)
    torch.testing.assert_close(predict(bank, [1, 1]), expected[0], rtol=1e-4, atol=1e-5)


def test_export_returns_what_went_in_at_its_true_rank(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory
) -> None:
    weights = make_weights(one_unet, ranks=(1, 3))
    bank = LoraBank.attach(one_unet, layers=list(weights.layers))
    bank.new_trainable(2, weights)
    exported = bank.export(2)
    assert exported.digest() == weights.digest()
    with torch.no_grad():
        bank.parameters(2)[0].add_(1.0)
    assert exported.digest() == weights.digest()
    assert bank.export(2).digest() != weights.digest()
    names = [name for name in bank.layers for _ in ("down", "up")]
    assert len(bank.parameters(2)) == len(names)
    for name, parameter, side in zip(names, bank.parameters(2), ["down", "up"] * len(bank.layers), strict=True):
        assert parameter.requires_grad
        assert parameter.shape == getattr(weights.layers[name], side).shape


def test_parameters_are_named_by_the_paths_of_their_layers(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory
) -> None:
    weights = make_weights(one_unet, ranks=(1, 3))
    bank = LoraBank.attach(one_unet, layers=list(weights.layers))
    bank.new_trainable(1, AdapterWeights(dict(reversed(weights.layers.items()))))
    named = bank.named_parameters(1)
    assert all(one is other for one, other in zip(named.values(), bank.parameters(1), strict=True))
    assert len(named) == 2 * len(weights.layers)
    for path, layer in weights.layers.items():
        assert torch.equal(named[f"{path}.lora_A"], layer.down)
        assert torch.equal(named[f"{path}.lora_B"], layer.up)


@pytest.mark.parametrize("strength", [0.0, 0.5, -2.0])
def test_strength_scales_what_an_adapter_adds(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory, strength: float
) -> None:
    weights = make_weights(one_unet)
    twin = with_peft(one_unet, weights)
    twin.set_adapters(["default"], [strength])
    bank = attach(one_unet, [weights])
    bank.load(1, weights, strength=strength)
    torch.testing.assert_close(predict(bank, [1]), twin(*inputs(1)).sample.detach(), rtol=1e-4, atol=1e-5)


def test_an_adapter_of_some_layers_leaves_the_others_alone(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory
) -> None:
    whole = make_weights(one_unet)
    part = AdapterWeights({name: layer for name, layer in whole.layers.items() if "attn2" in name})
    expected = with_peft(one_unet, part)(*inputs(2)).sample.detach()
    bank = attach(one_unet, [whole, whole])
    bank.load(2, part)
    torch.testing.assert_close(predict(bank, [1, 2])[1], expected[1], rtol=1e-4, atol=1e-5)


def test_bf16_autocast_runs_and_stays_near(unet: UNet2DConditionModel, make_weights: WeightsFactory) -> None:
    bank = open_for_training(unet, make_weights, (4, 2), "attention_ff")
    plain = train(bank, [1, 2, 0])
    with torch.autocast("cpu", torch.bfloat16):
        low = train(bank, [1, 2, 0])
        assert predict(bank, [1, 2, 0]).dtype == torch.bfloat16
    for slot in (1, 2):
        for ours, _theirs in zip(low[slot], plain[slot], strict=True):
            assert ours.dtype == torch.float32
        norm = torch.stack([a.norm() for a in plain[slot]]).norm()
        assert torch.stack([(a - b).norm() for a, b in zip(low[slot], plain[slot], strict=True)]).norm() < 0.1 * norm


@pytest.mark.parametrize("shape", [(3, 8), (3, 5, 8)])
def test_rows_of_vectors_and_of_tokens_are_both_taken(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory, shape: tuple[int, ...]
) -> None:
    weights = make_weights(one_unet)
    name = next(n for n, layer in weights.layers.items() if layer.down.shape[1] == 8)
    linear, layer, x = one_unet.get_submodule(name), weights.layers[name], torch.randn(shape)
    expected = linear(x) + x @ layer.down.T @ layer.up.T
    bank = attach(one_unet, [weights])
    with torch.no_grad(), bank.rows([1, 0, 1]):
        found = one_unet.get_submodule(name)(x)
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]].detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(found[1], linear(x)[1].detach())


# -- refusals ------------------------------------------------------------------------------------------------------


def test_detach_restores_the_original_modules(unet: UNet2DConditionModel, make_weights: WeightsFactory) -> None:
    before = dict(unet.named_modules())
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    bank = attach(unet, [make_weights(unet, targets="attention_ff")])
    assert dict(unet.named_modules()).keys() != before.keys()
    bank.detach()
    after = dict(unet.named_modules())
    assert list(after) == list(before)
    assert all(after[name] is module for name, module in before.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in unet.state_dict().items())
    attach(unet, [make_weights(unet)])


def test_a_forward_needs_one_slot_per_row(one_unet: UNet2DConditionModel, make_weights: WeightsFactory) -> None:
    bank = attach(one_unet, [make_weights(one_unet)])
    with pytest.raises(RuntimeError, match="no rows are bound"):
        one_unet(*inputs(2))
    for slots in ([1, 1, 1], [0], [1]):
        with pytest.raises(ValueError, match=f"the call has 2 rows and {len(slots)} are bound"), bank.rows(slots):
            one_unet(*inputs(2))
    with bank.rows([1, 0]), pytest.raises(RuntimeError, match="already bound"), bank.rows([0, 0]):
        pass
    predict(bank, [1, 0])


@pytest.mark.parametrize("slots", [[2], [3], [-1], [9]])
def test_a_slot_without_an_adapter_is_refused(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory, slots: list[int]
) -> None:
    bank = attach(one_unet, [make_weights(one_unet)])
    with pytest.raises(ValueError, match="no adapter in slot"), bank.rows(slots):
        pass
    predict(bank, [1])


@pytest.mark.parametrize("slot", [0, -1])
def test_slots_that_cannot_be_are_refused(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory, slot: int
) -> None:
    weights = make_weights(one_unet)
    bank = attach(one_unet, [weights])
    calls: list[Callable[[], Any]] = [
        lambda: bank.load(slot, weights),
        lambda: bank.new_trainable(slot, weights),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"slot {slot} holds no adapter"):
            call()
    assert bank.slots == (1,)


def test_adapters_that_do_not_fit_the_bank_are_refused(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory
) -> None:
    weights = make_weights(one_unet, ranks=(4,))
    first = next(iter(weights.layers))
    with pytest.raises(AdapterMismatchError, match="conv_in is not a linear layer"):
        LoraBank.attach(one_unet, layers=["conv_in"])
    with pytest.raises(AdapterMismatchError, match="nowhere is not a linear layer"):
        LoraBank.attach(one_unet, layers=[first, "nowhere"])
    bank = LoraBank.attach(one_unet, layers=[first])
    with pytest.raises(RuntimeError, match="holds a bank already"):
        LoraBank.attach(one_unet, layers=[first])
    with pytest.raises(AdapterMismatchError, match="is not adapted by this bank"):
        bank.load(1, weights)
    with pytest.raises(AdapterMismatchError, match=first):
        bank.load(1, AdapterWeights({first: LoraLayer(torch.ones(1, 5), torch.ones(8, 1))}))
    with pytest.raises(ValueError, match="no adapter in slot"), bank.rows([1]):
        pass
