"""The training loop of one pack on one machine. It knows no Ray, no registry and no screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cat_cluster.base_model import BaseModel
from cat_cluster.batches import AdapterTask, draw_batch
from cat_cluster.latents import TextCache
from cat_cluster.lora.bank import LoraBank
from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.training.checkpoint import AdapterState, CheckpointStore, load_newest
from cat_cluster.training.history import ConceptLoss, History
from cat_cluster.training.optimizer import SlotAdamW, SlotSettings
from cat_cluster.training.step import StepSettings, train_step


@dataclass(frozen=True, eq=False)
class PackMember:
    """One adapter of a pack: its draws, its optimiser settings and the weights it starts from."""

    task: AdapterTask
    optimiser: SlotSettings
    initial: AdapterWeights
    min_snr_gamma: float | None = None


@dataclass(frozen=True)
class LoopSettings:
    """What all adapters of a pack share. checkpoint_every counts steps."""

    steps: int
    checkpoint_every: int
    joint_rows: bool = True
    bf16: bool = False
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class StepReport:
    """Progress after a step: losses[adapter id][token]; seconds is this step's wall time."""

    step: int
    steps: int
    seconds: float
    rows: int
    losses: dict[str, dict[str, ConceptLoss]]
    dropped: dict[str, str]


@dataclass(frozen=True, eq=False)
class TrainedAdapter:
    """The result of one adapter. dropped gives the reason when training was given up; weights are then None.

    history: {"steps": [...], token: {"identity": [...], "cat": [...]}}, at most 100 points of bin means.
    """

    adapter_id: str
    weights: AdapterWeights | None
    dropped: str | None
    history: dict[str, Any]


def train_pack(
    base: BaseModel,
    bank: LoraBank,
    members: Sequence[PackMember],
    settings: LoopSettings,
    *,
    checkpoints: Sequence[CheckpointStore] = (),
    on_step: Callable[[StepReport], None] | None = None,
) -> list[TrainedAdapter]:
    """Train every adapter of a pack in one U-Net forward per step and leave each in its slot (member i in i + 1).

    checkpoints: one series per member, or none. An interrupted run continues from the newest step that all members
    have and ends with the same adapters. Raises CheckpointError when there is no such step.
    """
    tasks = [member.task for member in members]
    optimizer = _open_slots(bank, members)
    history = History(tasks, settings.steps)
    states = load_newest(checkpoints)
    if states is not None:
        _restore(states, tasks, optimizer, history)
    if settings.gradient_checkpointing:
        base.unet.train()  # diffusers checkpoints only in training mode; an SD U-Net has no dropout to wake up
        base.unet.enable_gradient_checkpointing()
    encode_text = TextCache(base)
    step_settings = StepSettings([m.min_snr_gamma for m in members], settings.joint_rows, settings.bf16)
    while optimizer.steps_done < settings.steps and len(optimizer.dropped) < len(members):
        started = time.perf_counter()
        active = [slot not in optimizer.dropped for slot in range(len(members))]
        batch = draw_batch(tasks, optimizer.steps_done, base.schedule.num_timesteps, active)
        optimizer.zero_grad(set_to_none=True)
        losses = train_step(base, bank, encode_text, batch, step_settings)
        optimizer.step()
        recorded = history.record(optimizer.steps_done, batch, losses)
        if on_step is not None:
            dropped = _dropped_by_id(tasks, optimizer)
            seconds = time.perf_counter() - started
            rows = len(batch.prompts) + len(batch.prior_prompts)
            on_step(StepReport(optimizer.steps_done, settings.steps, seconds, rows, recorded, dropped))
        if _due(optimizer.steps_done, settings):
            for slot, series in enumerate(checkpoints):
                series.save(_state(slot, tasks[slot].adapter_id, optimizer, history))
    if settings.gradient_checkpointing:
        base.unet.disable_gradient_checkpointing()
        base.unet.eval()
    return _results(bank, tasks, optimizer, history)


def _open_slots(bank: LoraBank, members: Sequence[PackMember]) -> SlotAdamW:
    for index, member in enumerate(members):
        bank.new_trainable(index + 1, member.initial)
    return SlotAdamW([(bank.parameters(i + 1), member.optimiser) for i, member in enumerate(members)])


def _due(step: int, settings: LoopSettings) -> bool:
    return step % settings.checkpoint_every == 0 or step == settings.steps


def _dropped_by_id(tasks: Sequence[AdapterTask], optimizer: SlotAdamW) -> dict[str, str]:
    return {tasks[slot].adapter_id: reason for slot, reason in optimizer.dropped.items()}


def _state(slot: int, adapter_id: str, optimizer: SlotAdamW, history: History) -> AdapterState:
    moments = zip(optimizer.param_groups[slot]["params"], optimizer.slot_state(slot), strict=True)
    return AdapterState(
        step=optimizer.steps_done,
        parameters=tuple((value.detach(), mean, square) for value, (mean, square) in moments),
        dropped=optimizer.dropped.get(slot),
        history=history.to_json(adapter_id),
    )


def _restore(
    states: Sequence[AdapterState], tasks: Sequence[AdapterTask], optimizer: SlotAdamW, history: History
) -> None:
    dropped = {slot: state.dropped for slot, state in enumerate(states) if state.dropped is not None}
    optimizer.restore(states[0].step, [state.parameters for state in states], dropped)
    for task, state in zip(tasks, states, strict=True):
        history.restore(task.adapter_id, state.history)


def _results(
    bank: LoraBank, tasks: Sequence[AdapterTask], optimizer: SlotAdamW, history: History
) -> list[TrainedAdapter]:
    return [
        TrainedAdapter(
            adapter_id=task.adapter_id,
            weights=None if slot in optimizer.dropped else bank.export(slot + 1),
            dropped=optimizer.dropped.get(slot),
            history=history.of(task.adapter_id),
        )
        for slot, task in enumerate(tasks)
    ]
