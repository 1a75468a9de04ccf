"""The training loop of one pack, the same on one worker and on many. It knows no Ray, no registry and no screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from cat_cluster.data.draws import AdapterTask, Batch, draw_batch
from cat_cluster.data.latents import TextCache
from cat_cluster.data.parts import Shard, step_parts
from cat_cluster.lora.bank import LoraBank, parameter_names, weights_of
from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.models.base_model import BaseModel, checkpointed_activations, compiled_blocks
from cat_cluster.training.checkpoint import AdapterState, CheckpointStore, CheckpointWriter, load_newest, tensor_names
from cat_cluster.training.drift_budget import DriftBudget, weigh
from cat_cluster.training.engine import EngineFactory, SlotState, TorchEngine, TrainingEngine, autocast
from cat_cluster.training.loss_curves import LossCurves, step_sums
from cat_cluster.training.optimizer import Slot, state_names
from cat_cluster.training.step import RowLosses, train_step
from cat_cluster.training.step_report import StepReport
from cat_cluster.training.teacher import TeacherPool

MOST_CHUNKS = 2048  # of texts that are kept: adapters come and go in a pack that may never end
KEPT_CHUNKS = 512  # where captions change from row to row


@dataclass(frozen=True, eq=False)
class PackMember:
    """One adapter of a pack: its concepts and settings, the weights it starts from, and where it is stored."""

    task: AdapterTask
    initial: AdapterWeights
    checkpoints: CheckpointStore | None = None

    @property
    def adapter_id(self) -> str:
        """The adapter's id."""
        return self.task.adapter_id


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
    checkpoint_every: int = 50,
    on_step: Callable[[StepReport], None] | None = None,
    make_engine: EngineFactory = TorchEngine,
) -> list[TrainedAdapter]:
    """Train every adapter of a pack to its end and leave each in its slot (member i in i + 1).

    steps: the last step of all, if not that of their settings. checkpoint_every: the most steps that an interruption
    may cost. An interrupted run goes on from the checkpoints (`load_newest`) and ends with the same adapters, on any
    number of workers and with any engine. Called by all workers of a pack together; on_step is called on each.
    Raises as `Pack` does.
    """
    with Pack(base, bank, members, steps=steps, checkpoint_every=checkpoint_every, make_engine=make_engine) as pack:
        while pack.training:
            report = pack.step()
            if on_step is not None:
                on_step(report)
        return [pack.result(member.adapter_id) for member in members]


class Pack:
    """Adapters that train in one U-Net forward per step, each at a step of its own; between two steps they come and go.

    The settings that shape the U-Net call are those of the first member, and all must agree on them. An adapter has
    rows until its last step; when `step` tells of that one, it is stored. A context manager, inside of which steps are
    taken and which ends with all checkpoints stored. All workers of a pack make the same calls; the first writes.
    Raises CheckpointError where an adapter's checkpoints are damaged, StoreError where one cannot be stored.
    """

    def __init__(
        self,
        base: BaseModel,
        bank: LoraBank,
        members: Sequence[PackMember],
        *,
        steps: int | None = None,
        checkpoint_every: int = 50,
        make_engine: EngineFactory = TorchEngine,
    ) -> None:
        """Start every member in its slot, member i in i + 1, or where its newest checkpoint left it.

        steps: the last step of all of them, if not that of their settings.
        """
        self._base, self._bank, self._make_engine = base, bank, make_engine
        self._shape = members[0].task.training
        self._open(_stored([_Seat.of(slot, member, steps) for slot, member in enumerate(members, start=1)]))
        chunks = self._shape.prompt_chunks
        self._encode_text, self._pool = TextCache(base, chunks, most=MOST_CHUNKS // chunks), TeacherPool()
        self._writer, self._taken = CheckpointWriter(checkpoint_every), 0
        self._inside = ExitStack()
        self._welcome([member.task for member in members])

    def _open(self, seats: Sequence[tuple[_Seat, AdapterState | None]]) -> None:
        """Begin with an engine that has these seats, each at its state or at its start."""
        for seat, _ in seats:
            self._bank.new_trainable(seat.slot, seat.initial)
        parameters = [self._bank.named_parameters(seat.slot) for seat, _ in seats]
        # An engine may shard what it is given: the values must be in place before, the rest goes in with it.
        saved = [_restore(own, state) for own, (_, state) in zip(parameters, seats, strict=True)]
        slots = [(own, seat.task.training) for own, (seat, _) in zip(parameters, seats, strict=True)]
        self._engine = self._make_engine(self._base, slots, saved, self._shape.bf16)
        self._seats = {}
        for place, (seat, state) in enumerate(seats):
            optimizer = self._engine.optimizer
            optimizer.slots[place].end = seat.end
            if state is not None:
                optimizer.resume(place, state.step, state.dropped, state.numbers)
                seat.curves.restore(state.loss_curves)
                seat.budget.restore(state.drift_budget)
            self._seats[seat.adapter_id] = replace(seat, place=place)

    def __enter__(self) -> Self:
        self._inside.enter_context(self._writer)
        if self._shape.compile:
            self._inside.enter_context(compiled_blocks(self._base.unet))
        if self._shape.gradient_checkpointing:
            self._inside.enter_context(checkpointed_activations(self._base.unet))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._inside.__exit__(kind, error, trace)
        finally:
            self._engine.close()

    @property
    def slots(self) -> dict[str, int]:
        """The slot of the bank of each adapter that is here, whether it trains or has ended."""
        return {name: seat.slot for name, seat in self._seats.items()}

    @property
    def refused(self) -> frozenset[str]:
        """The adapters whose run another driver has taken over, as this worker found when it stored them."""
        return frozenset(name for name, seat in self._seats.items() if seat.series in self._writer.refused)

    @property
    def training(self) -> tuple[str, ...]:
        """The adapters that have a step to take."""
        return tuple(name for name, seat in self._seats.items() if self._slot(seat).trains)

    def change(self, *, leave: Collection[str] = (), join: Sequence[PackMember] = ()) -> None:
        """Let adapters go and take others in, each at its start or where its newest checkpoint left it.

        Who leaves before its end is stored first. Raises ValueError where one is not in the pack, or there already,
        and where nobody would be left: end the pack instead.
        """
        staying = [seat for name, seat in self._seats.items() if name not in leave]
        here = {seat.adapter_id for seat in staying}
        if unknown := sorted(set(leave) - self._seats.keys()):
            raise ValueError(f"{unknown[0]} cannot leave: it is not in the pack")
        if twice := sorted(here & {member.adapter_id for member in join}):
            raise ValueError(f"{twice[0]} cannot join: it is there already")
        if not staying and not join:
            raise ValueError("nobody would be left: end the pack")
        self.park(leave)
        taken = {seat.slot for seat in staying}
        free = (slot for slot in count(1) if slot not in taken)
        arriving = _stored([_Seat.of(next(free), member) for member in join])
        going_on = [(seat, self._state(seat)) for seat in staying]
        # An engine of its own for each set of adapters, as DeepSpeed takes no other way.
        self._engine.close()
        for name in leave:
            self._bank.clear(self._seats[name].slot)
            self._pool.forget(name)
        self._open([*going_on, *arriving])
        self._welcome([member.task for member in join])

    def park(self, adapter_ids: Collection[str] | None = None) -> None:
        """Store adapters, all that train unless others are given; no worker goes on before they are stored."""
        parked = [name for name in self.training if adapter_ids is None or name in adapter_ids]
        if parked:
            self._save(parked)
            self._writer.wait()
            self._engine.sum(torch.zeros(1, device=self._base.device))

    def step(self) -> StepReport:
        """Take one step with every adapter that trains, and store what is due.

        Raises ValueError where none trains.
        """
        started = time.perf_counter()
        seats = [seat for seat in self._seats.values() if self._slot(seat).trains]
        tasks, slots = [seat.task for seat in seats], [self._slot(seat) for seat in seats]
        trainings = [task.training for task in tasks]
        drawn = draw_batch(tasks, [slot.steps_done for slot in slots], self._base.schedule.num_timesteps)
        batch = weigh(drawn, [seat.budget for seat in seats])
        engine, in_bank = self._engine, [seat.slot for seat in seats]
        parts = step_parts(
            batch,
            [training.accumulate for training in trainings],
            engine.rank,
            engine.world_size,
            cat_apart=not self._shape.joint_rows and not engine.joined_teacher,
        )
        losses = [
            train_step(
                self._base, self._bank, self._encode_text, part.batch, trainings, engine, self._pool, slots=in_bank
            )
            for part in parts
        ]
        engine.step()
        sums = step_sums(tasks, batch, _all_losses(engine, batch, parts, losses))
        recorded = {}
        for seat, slot, own in zip(seats, slots, sums, strict=True):
            recorded[seat.adapter_id] = means = seat.curves.record(slot.steps_done, own)
            seat.budget.update(means)
        report = StepReport(
            done={seat.adapter_id: slot.steps_done for seat, slot in zip(seats, slots, strict=True)},
            steps={seat.adapter_id: slot.end for seat, slot in zip(seats, slots, strict=True)},
            seconds=time.perf_counter() - started,
            rows=len(batch.prompts) + int((~batch.outside_M).sum()),
            losses=recorded,
            dropped={
                name: slot.dropped
                for name, seat in self._seats.items()
                if (slot := self._slot(seat)).dropped is not None
            },
            alpha_scales={seat.adapter_id: scales for seat in seats if (scales := seat.budget.scales())},
            teacher_known=sum(key is not None for key in batch.pool_keys),
            teacher_asked=sum(key is None for key in batch.pool_keys),
        )
        self._taken += 1
        self._save(list(report.done) if self._writer.due(self._taken) else report.ended)
        if report.ended:
            self._writer.wait()  # whoever hears of an end finds the last checkpoint
        return report

    def result(self, adapter_id: str) -> TrainedAdapter:
        """Return an adapter's weights as they are, or why it was dropped."""
        seat = self._seats[adapter_id]
        dropped = self._slot(seat).dropped
        weights = None if dropped is not None else self._weights(seat)
        return TrainedAdapter(adapter_id, weights, dropped, seat.curves.curves())

    def _slot(self, seat: _Seat) -> Slot:
        return self._engine.optimizer.slots[seat.place]

    def _welcome(self, tasks: Sequence[AdapterTask]) -> None:
        """Make ready what adapters need that come in."""
        if any(task.training.changes_captions for task in tasks):
            # They have new texts in every step; a chunk is 0.24 MB in Stable Diffusion 1, 0.63 MB in XL.
            self._encode_text = replace(self._encode_text, most=KEPT_CHUNKS // self._shape.prompt_chunks)
        arithmetic = partial(autocast, self._base, bf16=self._shape.bf16)
        self._pool.fill(self._base, self._bank, self._encode_text, tasks, arithmetic)

    def _save(self, adapter_ids: Sequence[str]) -> None:
        """Store adapters as they are. Every worker has a part in each state; the first writes them."""
        seats = [self._seats[adapter_id] for adapter_id in adapter_ids]
        states = [(seat.series, self._state(seat)) for seat in seats if seat.series is not None]
        if states and self._engine.rank == 0:
            self._writer.save(states)

    def _state(self, seat: _Seat) -> AdapterState:
        """Return all that an adapter needs to go on from here."""
        slot = self._slot(seat)
        parameters = self._bank.named_parameters(seat.slot)
        return AdapterState(
            step=slot.steps_done,
            parameters=dict(zip(parameters, self._engine.slot_state(seat.place), strict=True)),
            dropped=slot.dropped,
            loss_curves=seat.curves.to_json(),
            drift_budget=seat.budget.to_json(),
            numbers=dict(slot.numbers),
        )

    def _weights(self, seat: _Seat) -> AdapterWeights:
        if seat.task.training.ema is None:
            return self._bank.export(seat.slot)
        states = zip(self._bank.named_parameters(seat.slot), self._engine.slot_state(seat.place), strict=True)
        return weights_of({name: state["average"] for name, state in states})


@dataclass(frozen=True, eq=False)
class _Seat:
    """An adapter in a pack. slot: of the bank; place: among those of the engine; end: its last step."""

    slot: int
    task: AdapterTask
    initial: AdapterWeights
    series: CheckpointStore | None
    end: int
    curves: LossCurves
    budget: DriftBudget
    place: int = 0

    @classmethod
    def of(cls, slot: int, member: PackMember, end: int | None = None) -> _Seat:
        """Return the seat of an adapter that has taken no step. end: its last one, if not that of its settings."""
        task, tokens = member.task, [concept.token for concept in member.task.concepts]
        end = task.training.steps if end is None else end
        budget = DriftBudget(task.training.drift_budget, tokens)
        return cls(slot, task, member.initial, member.checkpoints, end, LossCurves(tokens, end), budget)

    @property
    def adapter_id(self) -> str:
        """Whose it is."""
        return self.task.adapter_id

    def tensor_names(self) -> list[str]:
        """Return the names of the tensors in its checkpoints."""
        return tensor_names(parameter_names(self.initial.layers), state_names(self.task.training))


def check_checkpoints(member: PackMember) -> None:
    """Raise CheckpointError where an adapter has checkpoints and none is whole, before others wait for it."""
    _stored([_Seat.of(1, member)])


def _stored(seats: Sequence[_Seat]) -> list[tuple[_Seat, AdapterState | None]]:
    """Return seats of adapters that come in, with where their checkpoints left them; None is the start."""
    kept = [(seat, seat.series) for seat in seats if seat.series is not None]
    states = load_newest([own for _, own in kept], [seat.tensor_names() for seat, _ in kept], [s.end for s, _ in kept])
    found = {seat.slot: state for (seat, _), state in zip(kept, states, strict=True)}
    return [(seat, found.get(seat.slot)) for seat in seats]


def _all_losses(engine: TrainingEngine, batch: Batch, parts: Sequence[Shard], losses: Sequence[RowLosses]) -> RowLosses:
    """Return the losses of all workers' rows in all calls of a step, in the order of the whole batch, on the CPU."""
    count = len(batch.prompts)
    values = torch.zeros(count + len(batch.prior_prompts), device=losses[0].identity_B.device)
    for part, own in zip(parts, losses, strict=True):
        places = torch.cat([part.rows_B, count + part.cat_M]).to(values.device)
        values[places] = torch.cat([own.identity_B[: len(part.rows_B)], own.cat_M[: len(part.cat_M)]])
    values = engine.sum(values).cpu()
    return RowLosses(identity_B=values[:count], cat_M=values[count:])


@torch.no_grad()
def _restore(parameters: Mapping[str, nn.Parameter], state: AdapterState | None) -> SlotState | None:
    """Put a checkpoint's values into the parameters and return all that it has of them, in their order."""
    if state is None:
        return None
    for name, parameter in parameters.items():
        parameter.copy_(state.parameters[name]["value"])
    return [state.parameters[name] for name in parameters]
