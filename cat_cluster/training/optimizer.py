"""One optimiser for a pack: update rule, learning rate, clipping and failure of a slot are its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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


class SlotOptimizer(torch.optim.Optimizer):
    """Moves each slot by its own rule; clips a slot by its own norm and drops one whose gradient is not finite.

    slots: the parameters by name and the settings of each. A dropped slot is never updated again and its reason is
    kept in `dropped`; the other slots do the same arithmetic as if they were alone. Each slot is at a step of its own
    (`steps_done`) and is not updated beyond its last (`ends`). An engine that shards the
    groups puts its shards in the place of their parameters and gives `sum_over_shards` and, of a slot whose learning
    rate is not one, in `runs` how many elements of the shard have which factor; whoever takes steps calls
    `step` (once, or once per group) and then `finish_step`. numbers: what the rule keeps of each slot as a whole.
    """

    def __init__(self, slots: Sequence[tuple[Mapping[str, nn.Parameter], TrainingSpec]]) -> None:
        groups = [
            {"params": list(parameters.values()), "lr": training.learning_rate, "slot": slot}
            for slot, (parameters, training) in enumerate(slots)
        ]
        super().__init__(groups, {"lr": 0.0})
        self._trainings = [training for _, training in slots]
        self._rules = [RULES[training.optimizer] for _, training in slots]
        self.numbers = [rule.new_numbers() for rule in self._rules]
        self._factors = {
            parameter: rate_factor(training, name)
            for parameters, training in slots
            for name, parameter in parameters.items()
        }
        self.runs: dict[int, list[tuple[int, float]]] = {}
        self.steps_done = [0] * len(slots)
        self.ends = [training.steps for training in self._trainings]
        self.dropped: dict[int, str] = {}
        self._dropped_before: frozenset[int] = frozenset()
        self.sum_over_shards: Callable[[Tensor], Tensor] | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the active slots among the present groups; a closure is not supported."""
        if closure is not None:
            raise ValueError("SlotOptimizer takes no closure: compute the gradients before step()")
        for group in self.param_groups:
            if self.trains(group["slot"]):
                self._step_slot(group["slot"], group)

    def finish_step(self) -> None:
        """Count the step of each slot that had one, also of those that it dropped: every group has been updated."""
        for slot, (done, end) in enumerate(zip(self.steps_done, self.ends, strict=True)):
            if done < end and slot not in self._dropped_before:
                self.steps_done[slot] = done + 1
        self._dropped_before = frozenset(self.dropped)

    def trains(self, slot: int) -> bool:
        """Say whether a slot is updated in the next step: it was not dropped and is not at its end."""
        return slot not in self.dropped and self.steps_done[slot] < self.ends[slot]

    @property
    def places(self) -> list[int | None]:
        """The step that each slot is at, from 0; None for one that trains no more."""
        return [done if self.trains(slot) else None for slot, done in enumerate(self.steps_done)]

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
            self.drop(slot, f"gradient not finite at step {self.steps_done[slot]}")
            return
        training = self._trainings[slot]
        if training.max_grad_norm is not None and norm > training.max_grad_norm:
            gradients = list(torch._foreach_mul(gradients, training.max_grad_norm / norm))
        group["lr"] = learning_rate_at(training, self.steps_done[slot])
        values: list[Tensor] = list(parameters)
        states = [self.state_of(slot, parameter) for parameter in parameters]
        factors = [self._factors.get(parameter, 1.0) for parameter in parameters]
        if slot in self.runs:
            values, gradients, states, factors = _cut(self.runs[slot], values[0], gradients[0], states[0])
        step = SlotStep(
            values=values,
            gradients=gradients,
            states=states,
            rates=[group["lr"] * factor for factor in factors],
            weight_decay=training.weight_decay,
            count=self.steps_done[slot] + 1,
            numbers=self.numbers[slot],
            total=self._total,
        )
        self._rules[slot].update(step)
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
            state.update(self._rules[slot].new_state(parameter.detach()))
            if self._trainings[slot].ema is not None:
                state["average"] = parameter.detach().clone(memory_format=torch.preserve_format)
        return state

    def resume(self, slot: int, steps_done: int, dropped: str | None, numbers: Mapping[str, float]) -> None:
        """Go on with a slot after `steps_done` steps, unless it was dropped, with the numbers that were kept of it.

        The tensors are the engine's to set. Numbers that are not given are as the rule begins.
        """
        self.steps_done[slot] = steps_done
        if dropped is not None:
            self.dropped[slot] = dropped
            self._dropped_before |= {slot}
        self.numbers[slot].update(numbers)


def _cut(
    runs: Sequence[tuple[int, float]], value: Tensor, gradient: Tensor, state: Mapping[str, Tensor]
) -> tuple[list[Tensor], list[Tensor], list[dict[str, Tensor]], list[float]]:
    """Return views of a shard, its gradient and what is kept of it, one for each run of elements, and its factor."""
    sizes, factors = [size for size, _ in runs], [factor for _, factor in runs]
    values, gradients, *kept = (list(torch.split(tensor, sizes)) for tensor in (value, gradient, *state.values()))
    states = [dict(zip(state, parts, strict=True)) for parts in zip(*kept, strict=True)]
    return values, gradients, states, factors
