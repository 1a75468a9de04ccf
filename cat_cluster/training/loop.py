"""The training loop of one pack, the same on one worker and on many. It knows no Ray, no registry and no screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import nn

from cat_cluster.data.draws import AdapterTask, Batch, draw_batch
from cat_cluster.data.latents import TextCache
from cat_cluster.data.parts import Shard, step_parts
from cat_cluster.lora.bank import LoraBank, weights_of
from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.models.base_model import BaseModel, compiled_blocks
from cat_cluster.spec.sections import TrainingSpec
from cat_cluster.training.checkpoint import AdapterState, CheckpointStore, CheckpointWriter, load_newest, tensor_names
from cat_cluster.training.drift_budget import DriftBudget
from cat_cluster.training.engine import EngineFactory, SlotState, TorchEngine, TrainingEngine, autocast
from cat_cluster.training.loss_curves import ConceptLoss, LossCurves
from cat_cluster.training.optimizer import state_names
from cat_cluster.training.step import RowLosses, train_step
from cat_cluster.training.teacher import TeacherPool

KEPT_CHUNKS = 512  # of texts, where captions change from row to row


@dataclass(frozen=True, eq=False)
class PackMember:
    """One adapter of a pack: its concepts and settings, and the weights it starts from."""

    task: AdapterTask
    initial: AdapterWeights


@dataclass(frozen=True)
class StepReport:
    """Progress after a step: losses[adapter id][token]; seconds is this step's wall time.

    done, steps: how many steps each adapter that had one in this step has done of its own, and how many it will do.
    alpha_scales: adapter id -> token -> the factor a drift budget puts on alpha; adapters without one are absent.
    teacher_known, teacher_asked: predictions of the base that came from a pool, and those computed in this step.
    """

    done: Mapping[str, int]
    steps: Mapping[str, int]
    seconds: float
    rows: int
    losses: dict[str, dict[str, ConceptLoss]]
    dropped: dict[str, str]
    alpha_scales: dict[str, dict[str, float]] = field(default_factory=dict)
    teacher_known: int = 0
    teacher_asked: int = 0

    @property
    def step(self) -> int:
        """The step of the adapter that is farthest."""
        return max(self.done.values())

    @property
    def ended(self) -> tuple[str, ...]:
        """The adapters that train no more after this step."""
        return tuple(name for name, done in self.done.items() if done >= self.steps[name] or name in self.dropped)

    @property
    def notable(self) -> bool:
        """Whether it is the first step of an adapter, or the last."""
        return 1 in self.done.values() or bool(self.ended)


@dataclass(frozen=True, eq=False)
class TrainedAdapter:
    """The result of one adapter. dropped gives the reason when training was given up; weights are then None.

    weights: the last ones or, with `ema`, their average.
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
    *,
    steps: int | None = None,
    checkpoints: Sequence[CheckpointStore] = (),
    checkpoint_every: int = 50,
    on_step: Callable[[StepReport], None] | None = None,
    make_engine: EngineFactory = TorchEngine,
) -> list[TrainedAdapter]:
    """Train every adapter of a pack in one U-Net forward per step and leave each in its slot (member i in i + 1).

    The settings that shape the U-Net call are those of the first member, and all must agree on them. Each adapter is
    at a step of its own and has rows until its last; when `on_step` is told of that one, it is stored. steps: the last
    step of all, if not that of their settings. checkpoints: one series per member, or none; checkpoint_every: the most
    steps that an interruption may cost. An interrupted run goes on from there (`load_newest`) and ends with the same
    adapters, on any number of workers and with any engine. Called by all workers of a pack together; on_step is called
    on each, checkpoints are written by the first.
    Raises CheckpointError where an adapter's checkpoints are damaged, StoreError where one cannot be stored.
    """
    pack = _PackState.open(base, bank, members, steps, checkpoints, make_engine)
    engine, optimizer, tasks = pack.engine, pack.engine.optimizer, pack.tasks
    trainings = [task.training for task in tasks]
    accumulate = [training.accumulate for training in trainings]
    # Captions that change are new texts in every step; a chunk is 0.24 MB in Stable Diffusion 1, 0.63 MB in XL.
    changing = any(training.changes_captions for training in trainings)
    most = KEPT_CHUNKS // trainings[0].prompt_chunks if changing else None
    encode_text, pool = TextCache(base, trainings[0].prompt_chunks, most), TeacherPool()
    cat_apart = not trainings[0].joint_rows and not engine.joined_teacher
    writer = CheckpointWriter(checkpoints if engine.rank == 0 else (), checkpoint_every)
    with writer, _training_mode(base, trainings[0]):
        pool.fill(base, bank, encode_text, tasks, partial(autocast, base, bf16=trainings[0].bf16))
        for taken in count(1):
            places = optimizer.places
            if all(place is None for place in places):
                break
            started = time.perf_counter()
            drawn = draw_batch(tasks, places, base.schedule.num_timesteps)
            batch = pack.drift_budget.weigh(drawn)
            parts = step_parts(batch, accumulate, engine.rank, engine.world_size, cat_apart=cat_apart)
            losses = [train_step(base, bank, encode_text, part.batch, trainings, engine, pool) for part in parts]
            engine.step()
            report = pack.record(batch, _all_losses(engine, batch, parts, losses), started)
            kept = report.done if writer.due(taken) else report.ended
            if checkpoints and kept:
                writer.save({slot: pack.state(slot) for slot, task in enumerate(tasks) if task.adapter_id in kept})
                if report.ended:
                    writer.wait()  # whoever hears of an end finds the last checkpoint
            if on_step is not None:
                on_step(report)
    return pack.results()


def _all_losses(engine: TrainingEngine, batch: Batch, parts: Sequence[Shard], losses: Sequence[RowLosses]) -> RowLosses:
    """Return the losses of all workers' rows in all calls of a step, in the order of the whole batch, on the CPU."""
    count = len(batch.prompts)
    values = torch.zeros(count + len(batch.prior_prompts), device=losses[0].identity_B.device)
    for part, own in zip(parts, losses, strict=True):
        places = torch.cat([part.rows_B, count + part.cat_M]).to(values.device)
        values[places] = torch.cat([own.identity_B[: len(part.rows_B)], own.cat_M[: len(part.cat_M)]])
    values = engine.sum(values).cpu()
    return RowLosses(identity_B=values[:count], cat_M=values[count:])


@dataclass(frozen=True, eq=False)
class _PackState:
    """What changes from step to step, and is saved and restored together."""

    tasks: list[AdapterTask]
    bank: LoraBank
    engine: TrainingEngine
    loss_curves: LossCurves
    drift_budget: DriftBudget

    @classmethod
    def open(
        cls,
        base: BaseModel,
        bank: LoraBank,
        members: Sequence[PackMember],
        steps: int | None,
        checkpoints: Sequence[CheckpointStore],
        make_engine: EngineFactory,
    ) -> _PackState:
        """Start every member in its slot, or where its newest common checkpoint left it."""
        for slot, member in enumerate(members, start=1):
            bank.new_trainable(slot, member.initial)
        parameters = [bank.named_parameters(slot + 1) for slot in range(len(members))]
        tasks = [member.task for member in members]
        slots = [(own, task.training) for own, task in zip(parameters, tasks, strict=True)]
        names = [tensor_names(own, state_names(task.training)) for own, task in zip(parameters, tasks, strict=True)]
        ends = [task.training.steps if steps is None else steps for task in tasks]
        states = load_newest(checkpoints, names, ends) if checkpoints else [None] * len(tasks)
        # An engine may shard what it is given: the values must be in place before, the rest goes in with it.
        saved = list(map(_restore, parameters, states))
        engine = make_engine(base, slots, saved, tasks[0].training.bf16)
        engine.optimizer.ends = ends
        tokens = [[concept.token for concept in task.concepts] for task in tasks]
        drift_budget = DriftBudget([task.training.drift_budget for task in tasks], tokens)
        pack = cls(tasks, bank, engine, LossCurves(tasks, ends), drift_budget)
        for slot, (task, state) in enumerate(zip(tasks, states, strict=True)):
            if state is not None:
                engine.optimizer.resume(slot, state.step, state.dropped, state.numbers)
                pack.loss_curves.restore(task.adapter_id, state.loss_curves)
                pack.drift_budget.restore(slot, state.drift_budget)
        return pack

    def record(self, batch: Batch, losses: RowLosses, started: float) -> StepReport:
        """Record the losses of the step that was just done and return its report."""
        optimizer, trained = self.engine.optimizer, sorted(set(batch.adapter_B.tolist()))
        done = {self.tasks[slot].adapter_id: optimizer.steps_done[slot] for slot in trained}
        recorded = self.loss_curves.record(done, batch, losses)
        for adapter, task in enumerate(self.tasks):
            self.drift_budget.update(adapter, recorded.get(task.adapter_id, {}))
        return StepReport(
            done=done,
            steps={self.tasks[slot].adapter_id: optimizer.ends[slot] for slot in trained},
            seconds=time.perf_counter() - started,
            rows=len(batch.prompts) + int((~batch.outside_M).sum()),
            losses=recorded,
            dropped={self.tasks[slot].adapter_id: reason for slot, reason in optimizer.dropped.items()},
            alpha_scales={
                self.tasks[slot].adapter_id: scales for slot in trained if (scales := self.drift_budget.scales(slot))
            },
            teacher_known=sum(key is not None for key in batch.pool_keys),
            teacher_asked=sum(key is None for key in batch.pool_keys),
        )

    def state(self, slot: int) -> AdapterState:
        """Return all that one adapter needs to go on from here."""
        return AdapterState(
            step=self.engine.optimizer.steps_done[slot],
            parameters=dict(
                zip(self.bank.named_parameters(slot + 1), self.engine.slot_state(slot), strict=True),
            ),
            dropped=self.engine.optimizer.dropped.get(slot),
            loss_curves=self.loss_curves.to_json(self.tasks[slot].adapter_id),
            drift_budget=self.drift_budget.to_json(slot),
            numbers=dict(self.engine.optimizer.numbers[slot]),
        )

    def results(self) -> list[TrainedAdapter]:
        """Return each adapter's weights, or why it was dropped."""
        dropped = self.engine.optimizer.dropped
        return [
            TrainedAdapter(
                adapter_id=task.adapter_id,
                weights=None if slot in dropped else self._weights(slot),
                dropped=dropped.get(slot),
                history=self.loss_curves.of(task.adapter_id),
            )
            for slot, task in enumerate(self.tasks)
        ]

    def _weights(self, slot: int) -> AdapterWeights:
        if self.tasks[slot].training.ema is None:
            return self.bank.export(slot + 1)
        states = zip(self.bank.named_parameters(slot + 1), self.engine.slot_state(slot), strict=True)
        return weights_of({name: state["average"] for name, state in states})


@contextmanager
def _training_mode(base: BaseModel, training: TrainingSpec) -> Iterator[None]:
    """Compile the U-Net's blocks and checkpoint its activations inside, where the settings ask for it."""
    with compiled_blocks(base.unet) if training.compile else nullcontext():
        if not training.gradient_checkpointing:
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
def _restore(parameters: Mapping[str, nn.Parameter], state: AdapterState | None) -> SlotState | None:
    """Put a checkpoint's values into the parameters and return all that it has of them, in their order."""
    if state is None:
        return None
    for name, parameter in parameters.items():
        parameter.copy_(state.parameters[name]["value"])
    return [state.parameters[name] for name in parameters]
