"""The training loop of one pack, the same on one worker and on many. It knows no Ray, no registry and no screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cat_cluster.data.draws import AdapterTask, Batch, Shard, draw_batch, shard_batch
from cat_cluster.data.latents import TextCache
from cat_cluster.lora.bank import LoraBank
from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.models.base_model import BaseModel, compiled_blocks
from cat_cluster.training.checkpoint import AdapterState, CheckpointStore, CheckpointWriter, load_newest
from cat_cluster.training.drift_budget import DriftBudget
from cat_cluster.training.engine import EngineFactory, TorchEngine, TrainingEngine, autocast
from cat_cluster.training.loss_curves import ConceptLoss, LossCurves
from cat_cluster.training.optimizer import SlotSettings
from cat_cluster.training.step import RowLosses, StepSettings, train_step
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
    """What all adapters of a pack share. checkpoint_every: the most steps that an interruption may cost."""

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
    teacher_known, teacher_asked: predictions of the base that came from a pool, and that it was asked for.
    """

    step: int
    steps: int
    seconds: float
    rows: int
    losses: dict[str, dict[str, ConceptLoss]]
    dropped: dict[str, str]
    alpha_scales: dict[str, dict[str, float]] = field(default_factory=dict)
    teacher_known: int = 0
    teacher_asked: int = 0


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
    make_engine: EngineFactory = TorchEngine,
) -> list[TrainedAdapter]:
    """Train every adapter of a pack in one U-Net forward per step and leave each in its slot (member i in i + 1).

    checkpoints: one series per member, or none. An interrupted run continues from the newest step that all members
    have and ends with the same adapters, on any number of workers and with any engine. Called by all workers of a
    pack together; on_step is called on each, checkpoints are written by the first.
    Raises CheckpointError when there is no common step, StoreError when a checkpoint cannot be stored.
    """
    run = _Run.open(base, bank, members, settings, checkpoints, make_engine)
    engine, optimizer, tasks = run.engine, run.engine.optimizer, run.tasks
    encode_text, pool = TextCache(base), TeacherPool()
    step_settings = StepSettings([m.min_snr_gamma for m in members], settings.joint_rows, settings.bf16)
    writer = CheckpointWriter(checkpoints if engine.rank == 0 else (), settings.checkpoint_every)
    with writer, _prepared(base, settings):
        pool.fill(base, bank, encode_text, tasks, partial(autocast, base, bf16=settings.bf16))
        while not run.finished:
            started = time.perf_counter()
            active = [slot not in optimizer.dropped for slot in range(len(members))]
            batch = run.balance.weigh(draw_batch(tasks, optimizer.steps_done, base.schedule.num_timesteps, active))
            part = shard_batch(batch, engine.rank, engine.world_size)
            losses = train_step(base, bank, encode_text, part.batch, step_settings, engine, pool)
            engine.step()
            report = run.record(batch, _all_losses(engine, batch, part, losses), started)
            if checkpoints and (writer.due(report.step) or run.finished):
                writer.save([run.state(slot) for slot in range(len(members))])
            if on_step is not None:
                on_step(report)
    return run.results(bank)


def _all_losses(engine: TrainingEngine, batch: Batch, part: Shard, losses: RowLosses) -> RowLosses:
    """Return the losses of all workers' rows, in the order of the whole batch, on the CPU."""
    count = len(batch.prompts)
    values = torch.zeros(count + len(batch.prior_prompts), device=losses.identity_B.device)
    places = torch.cat([part.rows_B, count + part.cat_M]).to(values.device)
    values[places] = torch.cat([losses.identity_B[: len(part.rows_B)], losses.cat_M])
    values = engine.sum(values).cpu()
    return RowLosses(identity_B=values[:count], cat_M=values[count:])


@dataclass(frozen=True, eq=False)
class _Run:
    """What changes from step to step, and is saved and restored together."""

    tasks: list[AdapterTask]
    steps: int
    engine: TrainingEngine
    history: LossCurves
    balance: DriftBudget

    @classmethod
    def open(
        cls,
        base: BaseModel,
        bank: LoraBank,
        members: Sequence[PackMember],
        settings: LoopSettings,
        checkpoints: Sequence[CheckpointStore],
        make_engine: EngineFactory,
    ) -> _Run:
        """Start every member in its slot, or where its newest common checkpoint left it."""
        states = load_newest(checkpoints)
        for index, member in enumerate(members):
            bank.new_trainable(index + 1, member.initial)
            if states is not None:
                _set_values(bank, index + 1, [value for value, _, _ in states[index].parameters])
        # An engine may shard what it is given: the values must be in place before, the moments go in with it.
        slots = [(bank.parameters(i + 1), member.optimiser) for i, member in enumerate(members)]
        moments = None if states is None else [[parts[1:] for parts in state.parameters] for state in states]
        engine = make_engine(base, slots, moments, settings.bf16)
        tasks = [member.task for member in members]
        tokens = [[concept.token for concept in task.concepts] for task in tasks]
        balance = DriftBudget([member.drift_budget for member in members], tokens)
        run = cls(tasks, settings.steps, engine, LossCurves(tasks, settings.steps), balance)
        if states is not None:
            dropped = {slot: state.dropped for slot, state in enumerate(states) if state.dropped is not None}
            engine.optimizer.resume(states[0].step, dropped)
            for slot, (task, state) in enumerate(zip(tasks, states, strict=True)):
                run.history.restore(task.adapter_id, state.history)
                run.balance.restore(slot, state.balance)
        return run

    @property
    def finished(self) -> bool:
        """True when all steps are done, or no adapter is left to train."""
        optimizer = self.engine.optimizer
        return optimizer.steps_done >= self.steps or len(optimizer.dropped) == len(self.tasks)

    def record(self, batch: Batch, losses: RowLosses, started: float) -> StepReport:
        """Take in the losses of the step that was just done and report it."""
        done = self.engine.optimizer.steps_done
        recorded = self.history.record(done, batch, losses)
        for adapter, task in enumerate(self.tasks):
            self.balance.update(adapter, recorded.get(task.adapter_id, {}))
        return StepReport(
            step=done,
            steps=self.steps,
            seconds=time.perf_counter() - started,
            rows=len(batch.prompts) + len(batch.prior_prompts),
            losses=recorded,
            dropped={self.tasks[slot].adapter_id: reason for slot, reason in self.engine.optimizer.dropped.items()},
            alpha_scales={
                task.adapter_id: scales for i, task in enumerate(self.tasks) if (scales := self.balance.scales(i))
            },
            teacher_known=sum(key is not None for key in batch.pool_keys),
            teacher_asked=sum(key is None for key in batch.pool_keys),
        )

    def state(self, slot: int) -> AdapterState:
        """Return all that one adapter needs to go on from here."""
        return AdapterState(
            step=self.engine.optimizer.steps_done,
            parameters=tuple(self.engine.slot_state(slot)),
            dropped=self.engine.optimizer.dropped.get(slot),
            history=self.history.to_json(self.tasks[slot].adapter_id),
            balance=self.balance.to_json(slot),
        )

    def results(self, bank: LoraBank) -> list[TrainedAdapter]:
        """Return what became of each adapter."""
        dropped = self.engine.optimizer.dropped
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


@torch.no_grad()
def _set_values(bank: LoraBank, slot: int, values: Sequence[Tensor]) -> None:
    for parameter, value in zip(bank.parameters(slot), values, strict=True):
        parameter.copy_(value)
