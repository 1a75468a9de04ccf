"""AdamW with one group per slot: learning rate, clipping and failure of an adapter are its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cat_cluster.spec.sections import TrainingSpec


def learning_rate_at(training: TrainingSpec, step: int) -> float:
    """Return the learning rate of step `step` (from 0): linear warm-up, then constant, linear or cosine to 0."""
    warmup = training.warmup
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, training.steps - warmup)
    match training.lr_schedule:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1.0 - done
        case "cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * done))
    return training.learning_rate * factor


def state_names(training: TrainingSpec) -> tuple[str, ...]:
    """Return the names of the tensors that are kept of each parameter beside its value."""
    return ("mean", "square") if training.ema is None else ("mean", "square", "average")


def average_decay(ema: float, step: int) -> float:
    """Return the decay of the average at step `step` (from 1), as diffusers' EMAModel warms it up.

    0 at the first step, so that the start counts for nothing, then min(ema, step / (step + 9)).
    """
    return 0.0 if step == 1 else min(ema, step / (step + 9.0))


class SlotAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) that clips each group by its own norm and drops a group whose gradient is not finite.

    slots: the parameters and the settings of each. A dropped group is never updated again and its reason is
    kept in `dropped`; the other groups do the same arithmetic as if they were alone. An engine that shards the
    groups puts its shards in the place of their parameters and gives `sum_over_shards`; whoever takes steps calls
    `step` (once, or once per group) and then `finish_step`.
    """

    def __init__(
        self,
        slots: Sequence[tuple[Sequence[nn.Parameter], TrainingSpec]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        groups = [
            {"params": list(parameters), "lr": training.learning_rate, "slot": slot}
            for slot, (parameters, training) in enumerate(slots)
        ]
        super().__init__(groups, {"lr": 0.0})
        self._trainings = [training for _, training in slots]
        self.betas = betas
        self.eps = eps
        self.steps_done = 0
        self.dropped: dict[int, str] = {}
        self.sum_over_shards: Callable[[Tensor], Tensor] | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the active slots among the present groups; a closure is not supported."""
        if closure is not None:
            raise ValueError("SlotAdamW takes no closure: compute the gradients before step()")
        for group in self.param_groups:
            if group["slot"] not in self.dropped:
                self._step_slot(group["slot"], group)

    def finish_step(self) -> None:
        """Count the step: every group has been updated."""
        self.steps_done += 1

    def drop(self, slot: int, reason: str) -> None:
        """Stop updating a slot for good and keep the reason."""
        self.dropped.setdefault(slot, reason)

    def _step_slot(self, slot: int, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        gradients = [p.grad for p in parameters]
        norm = self._norm(gradients)
        if not math.isfinite(norm):
            self.drop(slot, f"gradient not finite at step {self.steps_done}")
            return
        training = self._trainings[slot]
        if training.max_grad_norm is not None and norm > training.max_grad_norm:
            gradients = list(torch._foreach_mul(gradients, training.max_grad_norm / norm))
        group["lr"] = learning_rate_at(training, self.steps_done)
        states = [self.state_of(slot, parameter) for parameter in parameters]
        self._update(parameters, gradients, states, group["lr"], training.weight_decay)
        if training.ema is not None:
            decay = average_decay(training.ema, self.steps_done + 1)
            torch._foreach_lerp_([state["average"] for state in states], list(parameters), 1.0 - decay)

    def _norm(self, gradients: list[Tensor]) -> float:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        return float(norm if self.sum_over_shards is None else self.sum_over_shards(norm.square()).sqrt())

    def _update(
        self,
        parameters: list[nn.Parameter],
        gradients: list[Tensor],
        states: list[dict[str, Tensor]],
        lr: float,
        weight_decay: float,
    ) -> None:
        beta1, beta2 = self.betas
        count = self.steps_done + 1
        means, squares = ([state[name] for state in states] for name in ("mean", "square"))
        torch._foreach_lerp_(means, gradients, 1.0 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1.0 - beta2)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, math.sqrt(1.0 - beta2**count))
        torch._foreach_add_(denominators, self.eps)
        values: list[Tensor] = list(parameters)
        torch._foreach_mul_(values, 1.0 - lr * weight_decay)
        torch._foreach_addcdiv_(values, means, denominators, -lr / (1.0 - beta1**count))

    def state_of(self, slot: int, parameter: Tensor) -> dict[str, Tensor]:
        """Return the tensors kept of a slot's parameter, or of the shard in its place, by name.

        Before the first update the moments are zeros and the average is the parameter's value.
        """
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            for name in state_names(self._trainings[slot]):
                like = torch.clone if name == "average" else torch.zeros_like
                state[name] = like(parameter.detach(), memory_format=torch.preserve_format)
        return state

    def resume(self, steps_done: int, dropped: Mapping[int, str]) -> None:
        """Continue after `steps_done` steps with the slots that were dropped; the tensors are the engine's to set."""
        self.steps_done = steps_done
        self.dropped = dict(dropped)
