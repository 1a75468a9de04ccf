"""The training loop of one pack on one machine. It knows no Ray, no registry and no screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cat_cluster.base_model import BaseModel, compiled_blocks
from cat_cluster.batches import AdapterTask, Batch, draw_batch
from cat_cluster.latents import TextCache
from cat_cluster.lora.bank import LoraBank
from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.training.balance import AlphaBalance
from cat_cluster.training.checkpoint import AdapterState, CheckpointStore, load_newest
from cat_cluster.training.history import ConceptLoss, History
from cat_cluster.training.optimizer import SlotAdamW, SlotSettings
from cat_cluster.training.step import RowLosses, StepSettings, autocast, train_step
from cat_cluster.training.teacher import TeacherPool


@dataclass(frozen=True, eq=False)
class PackMember:
    """One adapter of a pack: its draws, its optimiser settings and the weights it starts from."""

    task: AdapterTask
    optimiser: SlotSettings
    initial: AdapterWeights
    min_snr_gamma: float | None = None
    drift_budget: float | None = None


@dataclass(frozen=True)
class LoopSettings:
    """What all adapters of a pack share. checkpoint_every counts steps."""

    steps: int
    checkpoint_every: int
    joint_rows: bool = True
    bf16: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False


@dataclass(frozen=True)
class StepReport:
    """Progress after a step: losses[adapter id][token]; seconds is this step's wall time.

    alpha_scales: adapter id -> token -> the factor a drift budget puts on alpha; adapters without one are absent.
    """

    step: int
    steps: int
    seconds: float
    rows: int
    losses: dict[str, dict[str, ConceptLoss]]
    dropped: dict[str, str]
    alpha_scales: dict[str, dict[str, float]] = field(default_factory=dict)


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
    run = _Run.open(bank, members, settings, checkpoints)
    optimizer, tasks = run.optimizer, run.tasks
    encode_text, pool = TextCache(base), TeacherPool()
    step_settings = StepSettings([m.min_snr_gamma for m in members], settings.joint_rows, settings.bf16)
    with _prepared(base, settings):
        pool.fill(base, bank, encode_text, tasks, partial(autocast, base, bf16=settings.bf16))
        while optimizer.steps_done < settings.steps and len(optimizer.dropped) < len(members):
            started = time.perf_counter()
            active = [slot not in optimizer.dropped for slot in range(len(members))]
            batch = draw_batch(tasks, optimizer.steps_done, base.schedule.num_timesteps, active)
            optimizer.zero_grad(set_to_none=True)
            losses = train_step(base, bank, encode_text, run.balance.weigh(batch), step_settings, pool)
            optimizer.step()
            report = run.record(batch, losses, settings.steps, started)
            if on_step is not None:
                on_step(report)
            if _due(optimizer.steps_done, settings):
                for slot, series in enumerate(checkpoints):
                    series.save(run.state(slot))
    return run.results(bank)


@dataclass(frozen=True, eq=False)
class _Run:
    """What changes from step to step, and is saved and restored together."""

    tasks: list[AdapterTask]
    optimizer: SlotAdamW
    history: History
    balance: AlphaBalance

    @classmethod
    def open(
        cls,
        bank: LoraBank,
        members: Sequence[PackMember],
        settings: LoopSettings,
        checkpoints: Sequence[CheckpointStore],
    ) -> _Run:
        """Start every member in its slot, or where its newest common checkpoint left it."""
        for index, member in enumerate(members):
            bank.new_trainable(index + 1, member.initial)
        optimizer = SlotAdamW([(bank.parameters(i + 1), member.optimiser) for i, member in enumerate(members)])
        tasks = [member.task for member in members]
        tokens = [[concept.token for concept in task.concepts] for task in tasks]
        balance = AlphaBalance([member.drift_budget for member in members], tokens)
        run = cls(tasks, optimizer, History(tasks, settings.steps), balance)
        states = load_newest(checkpoints)
        if states is not None:
            run._restore(states)
        return run

    def record(self, batch: Batch, losses: RowLosses, steps: int, started: float) -> StepReport:
        """Take in the losses of the step that was just done and report it."""
        done = self.optimizer.steps_done
        recorded = self.history.record(done, batch, losses)
        for adapter, task in enumerate(self.tasks):
            self.balance.update(adapter, recorded.get(task.adapter_id, {}))
        return StepReport(
            step=done,
            steps=steps,
            seconds=time.perf_counter() - started,
            rows=len(batch.prompts) + len(batch.prior_prompts),
            losses=recorded,
            dropped={self.tasks[slot].adapter_id: reason for slot, reason in self.optimizer.dropped.items()},
            alpha_scales={
                task.adapter_id: scales for i, task in enumerate(self.tasks) if (scales := self.balance.scales(i))
            },
        )

    def state(self, slot: int) -> AdapterState:
        """Return all that one adapter needs to go on from here."""
        moments = zip(self.optimizer.param_groups[slot]["params"], self.optimizer.slot_state(slot), strict=True)
        return AdapterState(
            step=self.optimizer.steps_done,
            parameters=tuple((value.detach(), mean, square) for value, (mean, square) in moments),
            dropped=self.optimizer.dropped.get(slot),
            history=self.history.to_json(self.tasks[slot].adapter_id),
            balance=self.balance.to_json(slot),
        )

    def _restore(self, states: Sequence[AdapterState]) -> None:
        dropped = {slot: state.dropped for slot, state in enumerate(states) if state.dropped is not None}
        self.optimizer.restore(states[0].step, [state.parameters for state in states], dropped)
        for slot, (task, state) in enumerate(zip(self.tasks, states, strict=True)):
            self.history.restore(task.adapter_id, state.history)
            self.balance.restore(slot, state.balance)

    def results(self, bank: LoraBank) -> list[TrainedAdapter]:
        """Return what became of each adapter."""
        dropped = self.optimizer.dropped
        return [
            TrainedAdapter(
                adapter_id=task.adapter_id,
                weights=None if slot in dropped else bank.export(slot + 1),
                dropped=dropped.get(slot),
                history=self.history.of(task.adapter_id),
            )
            for slot, task in enumerate(self.tasks)
        ]


@contextmanager
def _prepared(base: BaseModel, settings: LoopSettings) -> Iterator[None]:
    """Switch on what the U-Net needs for these settings, and off again."""
    with compiled_blocks(base.unet) if settings.compile else nullcontext():
        if not settings.gradient_checkpointing:
            yield
            return
        base.unet.train()  # diffusers checkpoints only in training mode; an SD U-Net has no dropout to wake up
        base.unet.enable_gradient_checkpointing()
        try:
            yield
        finally:
            base.unet.disable_gradient_checkpointing()
            base.unet.eval()


def _due(step: int, settings: LoopSettings) -> bool:
    return step % settings.checkpoint_every == 0 or step == settings.steps
