"""The slot optimiser: torch.optim.AdamW per slot, clipped and dropped alone."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from cat_cluster.spec.choices import OptimizerName
from cat_cluster.spec.sections import TrainingSpec
from cat_cluster.training.optimizer import SlotOptimizer, average_decay, learning_rate_at


def settings(**changes: object) -> TrainingSpec:
    values: dict[str, object] = {
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "lr_schedule": "constant",
        "warmup_steps": 0,
        "steps": 20,
    }
    return TrainingSpec.model_validate({**values, **changes})


def parameters(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(3, 4, generator=generator)), nn.Parameter(torch.randn(5, generator=generator))]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def set_gradients(slot: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in slot:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def optimizer_of(*slots: tuple[list[nn.Parameter], TrainingSpec]) -> SlotOptimizer:
    """The optimiser of slots, whose parameters lie in the blocks down, mid, up in turn."""
    groups = ("down_blocks.0", "mid_block", "up_blocks.1")
    return SlotOptimizer(
        [({f"{groups[i % 3]}.to_q.{i}": p for i, p in enumerate(own)}, training) for own, training in slots]
    )


def take_step(optimizer: SlotOptimizer) -> None:
    optimizer.step()
    optimizer.finish_step()


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_each_slot_does_what_torch_adamw_does_alone(max_grad_norm: float | None) -> None:
    slots, twins = [parameters(1), parameters(2)], [parameters(1), parameters(2)]
    rates = (1e-2, 3e-3)
    ours = optimizer_of(
        *(
            (slot, settings(learning_rate=rate, max_grad_norm=max_grad_norm))
            for slot, rate in zip(slots, rates, strict=True)
        )
    )
    theirs = [torch.optim.AdamW(twin, lr=rate, weight_decay=0.1) for twin, rate in zip(twins, rates, strict=True)]
    for step in range(10):
        for index in range(2):
            scale = 10.0 ** (index + 1 - 3 * (step % 2))  # above the clip in one step, below it in the next
            set_gradients(slots[index], 10 * step + index, scale=scale)
            set_gradients(twins[index], 10 * step + index, scale=scale)
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(twins[index], max_grad_norm)
            theirs[index].step()
        take_step(ours)
    for slot, twin in zip(slots, twins, strict=True):
        for a, b in zip(slot, twin, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_slot_with_a_bad_gradient_is_dropped_and_its_neighbour_does_not_notice(poison: float) -> None:
    slots, alone = [parameters(1), parameters(2)], parameters(1)
    ours = optimizer_of(*((slot, settings()) for slot in slots))
    twin = optimizer_of((alone, settings()))
    frozen: list[torch.Tensor] = []
    for step in range(6):
        set_gradients(slots[0], step)
        set_gradients(alone, step)
        set_gradients(slots[1], step, scale=1e4)
        if step == 3:
            slots[1][0].grad[1, 2] = poison  # type: ignore[index]
            frozen = [p.detach().clone() for p in slots[1]]
        take_step(ours)
        take_step(twin)
    assert ours.dropped == {1: "gradient not finite at step 3"}
    assert all(torch.equal(a, b) for a, b in zip(slots[0], alone, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(slots[1], frozen, strict=True))


def test_the_average_is_diffusers_and_stays_when_its_slot_is_dropped() -> None:
    slots = [parameters(1), parameters(2)]
    ours = optimizer_of((slots[0], settings(ema=0.5)), (slots[1], settings()))
    theirs = EMAModel(slots[0], decay=0.5)
    for step in range(14):
        for index, slot in enumerate(slots):
            set_gradients(slot, 10 * step + index)
        if step == 12:
            slots[0][0].grad[0, 0] = float("nan")  # type: ignore[index]
        take_step(ours)
        if step < 12:
            theirs.step(slots[0])
    assert list(ours.dropped) == [0]
    for parameter, shadow in zip(slots[0], theirs.shadow_params, strict=True):
        torch.testing.assert_close(ours.state_of(0, parameter)["average"], shadow.detach())
    assert [average_decay(0.9, step) for step in (1, 2, 11, 1000)] == pytest.approx([0.0, 2 / 11, 11 / 20, 0.9])
    assert "average" not in ours.state_of(1, slots[1][0])


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_blocks_with_factors_are_torchs_parameter_groups(optimizer: OptimizerName, max_grad_norm: float | None) -> None:
    """Clipped by the norm of the whole adapter, whatever the factors; groups without one have the learning rate."""
    factors = {"down": 0.25, "up": 3.0}
    mine, theirs = ([torch.randn(4, 5, generator=one) for _ in range(6)] for one in (seeded(1), seeded(1)))
    slot, twin = ([nn.Parameter(value) for value in values] for values in (mine, theirs))
    training = settings(optimizer=optimizer, max_grad_norm=max_grad_norm, block_lr_weights=factors)
    ours = optimizer_of((parameters(5)[:1], settings()), (slot, training))
    groups = [
        {"params": twin[i::3], "lr": training.learning_rate * factor} for i, factor in enumerate((0.25, 1.0, 3.0))
    ]
    oracle = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor}[optimizer](groups, weight_decay=0.1)
    for step in range(10):
        set_gradients(slot, step)
        set_gradients(twin, step)
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(twin, max_grad_norm)
        oracle.step()
        take_step(ours)
    for a, b in zip(slot, twin, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_shard_with_runs_of_factors_is_its_parameters() -> None:
    """As DeepSpeed has them: one flat parameter, of which runs of elements belong to other blocks."""
    factors = {"down": 0.25, "up": 3.0}
    training = settings(ema=0.5, block_lr_weights=factors)
    whole = [nn.Parameter(torch.randn(3, 4, generator=seeded(n))) for n in range(3)]
    flat = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in whole]))
    ours, sharded = optimizer_of((whole, training)), optimizer_of(([flat], training))
    sharded.runs = {0: [(12, 0.25), (12, 1.0), (12, 3.0)]}
    for step in range(6):
        set_gradients(whole, step)
        flat.grad = torch.cat([p.grad.reshape(-1) for p in whole if p.grad is not None])
        take_step(ours)
        take_step(sharded)
    torch.testing.assert_close(flat, torch.cat([p.reshape(-1) for p in whole]))
    for name, kept in sharded.state_of(0, flat).items():
        torch.testing.assert_close(kept, torch.cat([ours.state_of(0, p)[name].reshape(-1) for p in whole]))


def test_learning_rate_schedules() -> None:
    linear = settings(lr_schedule="linear", warmup_steps=5, steps=25, learning_rate=1.0)
    assert [learning_rate_at(linear, s) for s in (0, 4, 5, 15, 25)] == pytest.approx([0.2, 1.0, 1.0, 0.5, 0.0])
    cosine = settings(lr_schedule="cosine", steps=10, learning_rate=2.0)
    assert learning_rate_at(cosine, 5) == pytest.approx(1.0)
    assert learning_rate_at(cosine, 2) == pytest.approx(1.0 + math.cos(0.2 * math.pi))
    assert learning_rate_at(settings(learning_rate=0.3), 19) == 0.3


def test_restore_continues_bit_for_bit() -> None:
    first, second = parameters(1), parameters(9)
    whole, resumed = optimizer_of((first, settings())), optimizer_of((second, settings()))
    for step in range(8):
        if step == 4:
            saved = [(p.detach().clone(), {k: v.clone() for k, v in whole.state_of(0, p).items()}) for p in first]
            resumed.resume(0, 4, None, {})
            for parameter, (value, state) in zip(second, saved, strict=True):
                parameter.data.copy_(value)
                for name, kept in resumed.state_of(0, parameter).items():
                    kept.copy_(state[name])
        if step >= 4:
            set_gradients(second, step)
            take_step(resumed)
        set_gradients(first, step)
        take_step(whole)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_closures_are_refused() -> None:
    with pytest.raises(ValueError, match="closure"):
        optimizer_of((parameters(1), settings())).step(lambda: 0.0)
