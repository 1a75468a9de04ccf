"""One optimiser for a pack: update rule, learning rate, clipping and failure of a slot are its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cat_cluster.lora.layers import in_text_encoder
from cat_cluster.spec.sections import TrainingSpec
from cat_cluster.training.update_rules import RULES, SlotStep


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
    return (*RULES[training.optimizer].names, *(() if training.ema is None else ("average",)))


def average_decay(ema: float, step: int) -> float:
    """Return the decay of the average at step `step` (from 1), as diffusers' EMAModel warms it up.

    0 at the first step, so that the start counts for nothing, then min(ema, step / (step + 9)).
    """
    return 0.0 if step == 1 else min(ema, step / (step + 9.0))


def rate_factor(training: TrainingSpec, parameter: str) -> float:
    """Return the factor on the learning rate of a parameter, named as by the bank: its block's, or text encoders'."""
    if in_text_encoder(parameter):
        own = None if training.text_encoder is None else training.text_encoder.learning_rate
        return 1.0 if own is None else own / training.learning_rate
    group = parameter.partition("_block")[0]  # of down_blocks.0..., mid_block... or up_blocks.1...
    return next((factor for name, factor in (training.block_lr_weights or {}).items() if name == group), 1.0)


@dataclass(eq=False)
class Slot:
    """An adapter as the optimiser has it, beside its tensors; it is not updated beyond its step `end`.

    numbers: what the rule keeps of the adapter as a whole. dropped: why it is given up.
    """

    training: TrainingSpec
    end: int
    numbers: dict[str, float]
    steps_done: int = 0
    dropped: str | None = None

    @property
    def trains(self) -> bool:
        """Whether it is updated in the next step."""
        return self.dropped is None and self.steps_done < self.end


class SlotOptimizer(torch.optim.Optimizer):
    """Moves each slot by its own rule; clips a slot by its own norm and drops one whose gradient is not finite.

    Each slot is at a step of its own. A dropped slot is never updated again, and the other slots do the same arithmetic
    as if they were alone. An engine that shards the
    groups puts its shards in the place of their parameters and gives `sum_over_shards` and, of a slot whose learning
    rate is not one, in `runs` how many elements of the shard have which factor; whoever takes steps calls
    `step` (once, or once per group) and then `finish_step`.
    """

    def __init__(self, slots: Sequence[tuple[Mapping[str, nn.Parameter], TrainingSpec]]) -> None:
        """slots: the parameters by name and the settings of slots 0, 1, ..."""
        self.slots = [Slot(training, training.steps, RULES[training.optimizer].new_numbers()) for _, training in slots]
        self._factors = {
            parameter: rate_factor(training, name)
            for parameters, training in slots
            for name, parameter in parameters.items()
        }
        self._counted: frozenset[int] = frozenset()  # dropped slots whose last step is counted
        self.runs: dict[int, list[tuple[int, float]]] = {}
        self.sum_over_shards: Callable[[Tensor], Tensor] | None = None
        groups = [
            {"params": list(parameters.values()), "lr": training.learning_rate, "slot": slot}
            for slot, (parameters, training) in enumerate(slots)
        ]
        super().__init__(groups, {"lr": 0.0})

    @property
    def dropped(self) -> dict[int, str]:
        """Why each dropped slot is given up."""
        return {number: slot.dropped for number, slot in enumerate(self.slots) if slot.dropped is not None}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the slots that train among the present groups; a closure is not supported."""
        if closure is not None:
            raise ValueError("SlotOptimizer takes no closure: compute the gradients before step()")
        for group in self.param_groups:
            if self.slots[group["slot"]].trains:
                self._step_slot(group["slot"], group)

    def finish_step(self) -> None:
        """Count the step of each slot that had one, also of those that it dropped: every group has been updated."""
        for number, slot in enumerate(self.slots):
            if slot.steps_done < slot.end and number not in self._counted:
                slot.steps_done += 1
        self._counted = frozenset(self.dropped)

    def drop(self, slot: int) -> None:
        """Stop updating a slot for good, since its gradient is not finite."""
        own = self.slots[slot]
        if own.dropped is None:
            own.dropped = f"gradient not finite at step {own.steps_done}"

    def _step_slot(self, number: int, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        slot, gradients = self.slots[number], [p.grad for p in parameters]
        training, norm = slot.training, self._norm(gradients)
        if not math.isfinite(norm):
            self.drop(number)
            return
        if training.max_grad_norm is not None and norm > training.max_grad_norm:
            gradients = list(torch._foreach_mul(gradients, training.max_grad_norm / norm))
        group["lr"] = learning_rate_at(training, slot.steps_done)
        values: list[Tensor] = list(parameters)
        states = [self.state_of(number, parameter) for parameter in parameters]
        factors = [self._factors.get(parameter, 1.0) for parameter in parameters]
        if number in self.runs:
            values, gradients, states, factors = _cut(self.runs[number], values[0], gradients[0], states[0])
        step = SlotStep(
            values=values,
            gradients=gradients,
            states=states,
            rates=[group["lr"] * factor for factor in factors],
            weight_decay=training.weight_decay,
            count=slot.steps_done + 1,
            numbers=slot.numbers,
            total=self._total,
        )
        RULES[training.optimizer].update(step)
        if training.ema is not None:
            decay = average_decay(training.ema, step.count)
            torch._foreach_lerp_(step.kept("average"), values, 1.0 - decay)

    def _norm(self, gradients: list[Tensor]) -> float:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        return float(norm if self.sum_over_shards is None else self.sum_over_shards(norm.square()).sqrt())

    def _total(self, values: Tensor) -> Tensor:
        return values if self.sum_over_shards is None else self.sum_over_shards(values)

    def state_of(self, slot: int, parameter: Tensor) -> dict[str, Tensor]:
        """Return the tensors kept of a slot's parameter, or of the shard in its place, by name.

        Before the first update the average is the parameter's value, and the rest is as the rule begins.
        """
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            training = self.slots[slot].training
            state.update(RULES[training.optimizer].new_state(parameter.detach()))
            if training.ema is not None:
                state["average"] = parameter.detach().clone(memory_format=torch.preserve_format)
        return state

    def resume(self, slot: int, steps_done: int, dropped: str | None, numbers: Mapping[str, float]) -> None:
        """Go on with a slot after `steps_done` steps, unless it was dropped, with the numbers that were kept of it.

        The tensors are the engine's to set. Numbers that are not given are as the rule begins.
        """
        own = self.slots[slot]
        own.steps_done, own.dropped = steps_done, dropped
        own.numbers.update(numbers)
        self._counted = frozenset(self.dropped)


def _cut(
    runs: Sequence[tuple[int, float]], value: Tensor, gradient: Tensor, state: Mapping[str, Tensor]
) -> tuple[list[Tensor], list[Tensor], list[dict[str, Tensor]], list[float]]:
    """Return views of a shard, its gradient and what is kept of it, one for each run of elements, and its factor."""
    sizes, factors = [size for size, _ in runs], [factor for _, factor in runs]
    values, gradients, *kept = (list(torch.split(tensor, sizes)) for tensor in (value, gradient, *state.values()))
    states = [dict(zip(state, parts, strict=True)) for parts in zip(*kept, strict=True)]
    return values, gradients, states, factors
