"""Each update rule in a slot is the library's own optimiser alone: torch's AdamW and Adafactor, prodigyopt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from prodigyopt import Prodigy
from torch import nn

from cat_cluster.spec.choices import OptimizerName
from cat_cluster.spec.sections import TrainingSpec
from cat_cluster.training.optimizer import learning_rate_at
from cat_cluster.training.update_rules import RULES
from tests.unit.training.test_optimizer import optimizer_of, set_gradients, settings, take_step

RATES: Mapping[OptimizerName, float] = {"adamw": 1e-2, "adafactor": 0.3, "prodigy": 1.0}
ORACLES: Mapping[OptimizerName, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adafactor": torch.optim.Adafactor,
    "prodigy": lambda parameters, **options: Prodigy(
        parameters, use_bias_correction=True, safeguard_warmup=True, **options
    ),
}


def matrices(seed: int) -> list[nn.Parameter]:
    """As of one layer of an adapter: A [R, in], and B [out, R], which begins at zero."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(0.1 * torch.randn(4, 9, generator=generator)), nn.Parameter(torch.zeros(6, 4))]


def pull(slot: list[nn.Parameter], step: int) -> None:
    """Gradients of a quadratic around ones with noise: those along which Prodigy's step size grows."""
    set_gradients(slot, step, scale=0.1)
    for parameter in slot:
        assert parameter.grad is not None
        parameter.grad += parameter.detach() - 1.0


def setting(optimizer: OptimizerName, **changes: object) -> TrainingSpec:
    return settings(optimizer=optimizer, learning_rate=RATES[optimizer], steps=120, **changes)


def equal(one: list[nn.Parameter], other: list[nn.Parameter]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_each_slot_is_the_librarys_optimiser_alone(
    weight_decay: float, max_grad_norm: float | None, schedule: str
) -> None:
    """All three in one pack, with a warm-up, clipped by their own norms."""
    changes = {
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "lr_schedule": schedule,
        "warmup_steps": 5,
    }
    trainings = {name: setting(name, **changes) for name in RULES}
    slots = {name: matrices(seed) for seed, name in enumerate(RULES)}
    twins = {name: matrices(seed) for seed, name in enumerate(RULES)}
    ours = optimizer_of(*((slots[name], trainings[name]) for name in RULES))
    theirs = {name: ORACLES[name](twins[name], lr=RATES[name], weight_decay=weight_decay) for name in RULES}
    for step in range(120):
        for name in RULES:
            pull(slots[name], step)
            pull(twins[name], step)
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(twins[name], max_grad_norm)
            theirs[name].param_groups[0]["lr"] = learning_rate_at(trainings[name], step)
            theirs[name].step()
        take_step(ours)
    for name in RULES:
        for a, b in zip(slots[name], twins[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert ours.slots[2].numbers["d"] == pytest.approx(theirs["prodigy"].param_groups[0]["d"], rel=1e-5)
    assert ours.slots[2].numbers["d"] > 1e-4, "the step size grew a hundredfold"


@pytest.mark.parametrize("name", RULES)
def test_a_resumed_slot_goes_on_to_the_bit(name: OptimizerName) -> None:
    first, second = matrices(1), matrices(9)
    whole, resumed = (optimizer_of((slot, setting(name, ema=0.9))) for slot in (first, second))
    for step in range(30):
        if step == 14:
            resumed.resume(0, 14, None, whole.slots[0].numbers)
            for parameter, own in zip(second, first, strict=True):
                parameter.data.copy_(own)
                state = whole.state_of(0, own)
                assert list(state) == [*RULES[name].names, "average"]
                for part, kept in resumed.state_of(0, parameter).items():
                    kept.copy_(state[part])
        if step >= 14:
            pull(second, step)
            take_step(resumed)
        pull(first, step)
        take_step(whole)
    assert equal(first, second)
    assert whole.slots[0].numbers == resumed.slots[0].numbers


@pytest.mark.parametrize("bad", RULES)
@pytest.mark.parametrize("good", RULES)
def test_a_dropped_slot_is_left_alone_and_its_neighbour_does_not_notice(
    good: OptimizerName, bad: OptimizerName
) -> None:
    slots, alone = [matrices(1), matrices(2)], matrices(1)
    ours = optimizer_of((slots[0], setting(good)), (slots[1], setting(bad)))
    twin = optimizer_of((alone, setting(good)))
    frozen: list[Any] = []
    for step in range(8):
        for slot in (*slots, alone):
            pull(slot, step)
        if step == 4:
            slots[1][1].grad[1, 2] = float("nan")  # type: ignore[index]
            frozen = [[p.detach().clone() for p in slots[1]], dict(ours.slots[1].numbers)]
        take_step(ours)
        take_step(twin)
    assert ours.dropped == {1: "gradient not finite at step 4"}
    assert equal(slots[0], alone)
    assert equal(slots[1], frozen[0])
    assert ours.slots[1].numbers == frozen[1]


def test_prodigy_without_a_gradient_does_not_divide_by_zero() -> None:
    slot = matrices(1)
    ours = optimizer_of((slot, setting("prodigy")))
    for parameter in slot:
        parameter.grad = torch.zeros_like(parameter)
    take_step(ours)
    assert equal(slot, matrices(1))


def test_adafactor_refuses_what_is_no_matrix() -> None:
    vector = nn.Parameter(torch.ones(3))
    vector.grad = torch.ones(3)
    with pytest.raises(ValueError, match="for matrices, and this parameter has the shape \\(3,\\)"):
        take_step(optimizer_of(([vector], setting("adafactor"))))
