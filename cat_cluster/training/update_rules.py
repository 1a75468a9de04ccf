"""The update rules of the slot optimiser: AdamW, Adafactor and Prodigy. A rule sees one slot, never its neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cat_cluster.spec.choices import OptimizerName

BETA1, BETA2 = 0.9, 0.999
EPS = 1e-8


@dataclass(frozen=True, eq=False)
class SlotStep:
    """What a rule is given of one slot in one step: its tensors side by side, parameters or this worker's shards.

    gradients: after clipping. states: what is kept of each tensor, by name. rates: the learning rate of each.
    count: the step, from 1. numbers: what is kept of the slot as a whole, to be changed in place. total: returns the
    sum of a tensor over the workers that hold shards of the slot.
    """

    values: list[Tensor]
    gradients: list[Tensor]
    states: list[dict[str, Tensor]]
    rates: list[float]
    weight_decay: float
    count: int
    numbers: dict[str, float]
    total: Callable[[Tensor], Tensor]

    def kept(self, name: str) -> list[Tensor]:
        """Return what is kept under a name of each tensor."""
        return [state[name] for state in self.states]


class UpdateRule(Protocol):
    """How an optimiser moves the parameters of a slot.

    names: of the tensors that it keeps of each parameter. on_shards: whether it can do with parts of the parameters.
    """

    names: tuple[str, ...]
    on_shards: bool

    def new_state(self, value: Tensor) -> dict[str, Tensor]:
        """Return what is kept of a parameter before its first step."""

    def new_numbers(self) -> dict[str, float]:
        """Return what is kept of a slot before its first step."""

    def update(self, step: SlotStep) -> None:
        """Take a step: change values, states and numbers in place."""


class AdamW:
    """AdamW, Adam with decoupled weight decay (arXiv 1711.05101), as torch.optim.AdamW."""

    names: tuple[str, ...] = ("mean", "square")
    on_shards = True

    def new_state(self, value: Tensor) -> dict[str, Tensor]:
        """Return both moments, zero."""
        return {name: _zeros(value) for name in self.names}

    def new_numbers(self) -> dict[str, float]:
        """Return nothing: AdamW keeps no number of a slot."""
        return {}

    def update(self, step: SlotStep) -> None:
        """Move against the mean gradient over the root of its mean square."""
        means, squares = step.kept("mean"), step.kept("square")
        torch._foreach_lerp_(means, step.gradients, 1.0 - BETA1)
        torch._foreach_mul_(squares, BETA2)
        torch._foreach_addcmul_(squares, step.gradients, step.gradients, 1.0 - BETA2)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, math.sqrt(1.0 - BETA2**step.count))
        torch._foreach_add_(denominators, EPS)
        torch._foreach_mul_(step.values, [1.0 - rate * step.weight_decay for rate in step.rates])
        scales = [-rate / (1.0 - BETA1**step.count) for rate in step.rates]
        torch._foreach_addcdiv_(step.values, means, denominators, scales)


class Adafactor:
    """Adafactor (arXiv 1804.04235) as torch.optim.Adafactor: it keeps row and column means of the squared gradient.

    The learning rate is relative to the root mean square of each matrix, at least EPS2. Matrices alone, whole.
    """

    names: tuple[str, ...] = ("row", "column")
    on_shards = False
    DECAY, EPS2, CLIP = -0.8, 1e-3, 1.0

    def new_state(self, value: Tensor) -> dict[str, Tensor]:
        """Return the mean squares of rows [rows, 1] and columns [1, columns], zero; ValueError for no matrix."""
        if value.ndim != 2:
            raise ValueError(f"Adafactor is for matrices, and this parameter has the shape {tuple(value.shape)}")
        return {"row": value.new_zeros(len(value), 1), "column": value.new_zeros(1, value.shape[1])}

    def new_numbers(self) -> dict[str, float]:
        """Return nothing: Adafactor keeps no number of a slot."""
        return {}

    def update(self, step: SlotStep) -> None:
        """Move against the gradient over the root of the product of its row and column means."""
        weight = step.count**self.DECAY
        for value, gradient, state, rate in zip(step.values, step.gradients, step.states, step.rates, strict=True):
            eps1 = torch.finfo(value.dtype).eps
            size = _root_mean_square(value).clamp(min=self.EPS2) * min(rate, 1.0 / math.sqrt(step.count))
            value.mul_(1.0 - rate * step.weight_decay)
            squared = gradient.square()
            row = state["row"].lerp_(squared.mean(dim=1, keepdim=True), weight)
            column = state["column"].lerp_(squared.mean(dim=0, keepdim=True), weight)
            variance = (row @ column).div_(row.mean().clamp(min=eps1))
            move = variance.clamp_(min=eps1 * eps1).rsqrt_().mul_(gradient)
            value.sub_(move.mul_(size / (_root_mean_square(move) / self.CLIP).clamp(min=1.0)))


class Prodigy:
    """Prodigy (arXiv 2306.06101, its Adam version), which finds the step size d of a slot; the learning rate scales it.

    With bias correction and with the learning rate left out of d's denominator, so that a warm-up does not inflate it:
    in the package prodigyopt `use_bias_correction` and `safeguard_warmup`.
    """

    names: tuple[str, ...] = ("mean", "square", "sum", "start")
    on_shards = True
    D0 = 1e-6

    def new_state(self, value: Tensor) -> dict[str, Tensor]:
        """Return both moments and the running sum of the gradients, zero, and the value that training starts from."""
        zeros = {name: _zeros(value) for name in ("mean", "square", "sum")}
        return {**zeros, "start": value.detach().clone(memory_format=torch.preserve_format)}

    def new_numbers(self) -> dict[str, float]:
        """Return the step size, the largest estimate of it so far, and the numerator of the estimate."""
        return {"d": self.D0, "d_max": self.D0, "numerator": 0.0}

    def update(self, step: SlotStep) -> None:
        """Estimate the distance to the solution from below, and take Adam's step of that size."""
        numbers, beta3 = step.numbers, math.sqrt(BETA2)
        d = numbers["d"]
        correction = math.sqrt(1.0 - BETA2**step.count) / (1.0 - BETA1**step.count)
        rate = d * step.rates[0] * correction
        means, squares, sums = step.kept("mean"), step.kept("square"), step.kept("sum")
        way = torch._foreach_mul(torch._foreach_sub(step.kept("start"), step.values), step.gradients)
        torch._foreach_mul_(means, BETA1)
        torch._foreach_add_(means, step.gradients, alpha=d * (1.0 - BETA1))
        torch._foreach_mul_(squares, BETA2)
        torch._foreach_addcmul_(squares, step.gradients, step.gradients, d * d * (1.0 - BETA2))
        torch._foreach_mul_(sums, beta3)
        torch._foreach_add_(sums, step.gradients, alpha=d / self.D0 * d)
        came = torch.stack([part.sum(dtype=torch.float64) for part in way]).sum()
        length = torch.stack([part.abs().sum(dtype=torch.float64) for part in sums]).sum()
        came_by, denominator = step.total(torch.stack([came, length])).tolist()
        if denominator == 0.0:
            return  # no gradient so far: there is nothing to estimate from
        numbers["numerator"] = beta3 * numbers["numerator"] + d / self.D0 * rate * came_by
        estimate = numbers["numerator"] / denominator
        if d == self.D0:
            d = max(d, estimate)
        numbers["d_max"] = max(numbers["d_max"], estimate)
        numbers["d"] = numbers["d_max"]
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_add_(denominators, numbers["d"] * EPS)
        # Not times (1 - a little): while d is small that is 1 in fp32, and d grows by what the values have moved.
        torch._foreach_add_(step.values, step.values, alpha=-rate * step.weight_decay)
        torch._foreach_addcdiv_(step.values, means, denominators, -rate)


RULES: Mapping[OptimizerName, UpdateRule] = {"adamw": AdamW(), "adafactor": Adafactor(), "prodigy": Prodigy()}


def _zeros(value: Tensor) -> Tensor:
    return torch.zeros_like(value, memory_format=torch.preserve_format)


def _root_mean_square(value: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(value)
    return norm / math.sqrt(value.numel())
