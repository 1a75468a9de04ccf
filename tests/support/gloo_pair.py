"""Two workers of one pack as gloo processes: `python -m tests.support.gloo_pair RANK PORT FOLDER laws|kills|text`.

Writes FOLDER/<rank>.pt; tests/integration/test_zero.py starts the pair and holds the results to the laws.
"""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from cat_cluster.lora.bank import LoraBank, adapted_layers
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.spec.sections import TextEncoderSpec
from cat_cluster.training.engine import EngineFactory, Slots, SlotState, TorchEngine
from cat_cluster.training.loop import Pack, PackMember, TrainedAdapter, train_pack
from cat_cluster.training.step_report import StepReport
from tests.unit.training.test_loop import STEPS, Killed, member, members, other_optimisers, series, train, with_text
from tests.unit.training.test_step import concept, task, with_training

STAGES: tuple[int | None, ...] = (None, 0, 1, 2, 3)
# What the stages do apart from each other: nothing sharded; moments; gradients too; the base too.
STAGES_OF_XL: tuple[int | None, ...] = (None, 2, 3)
STAGES_OF_OPTIMISERS: tuple[int | None, ...] = (0, 1, 3)
STAGES_OF_PARTS: tuple[int | None, ...] = (0, 1, 2)  # at 3 all rows ride in one call
STAGES_OF_TEXT: tuple[int | None, ...] = (1, 2, 3)  # without shards texts are trained as the rest is
RESUMPTIONS = ((3, 2), (1, 3), (None, 3), (2, None), (0, 1))  # from one stage to another
FEW = 6  # steps, enough to tell a slot that is off from one that is not
DIE_AT, RESUMED = 8, 11  # steps: the last checkpoint before a kill is that of step 6, and the run goes on to the end


def engine(stage: int | None) -> EngineFactory:
    """Plain torch, or a ZeRO stage."""
    from cat_cluster.cluster.zero import zero_engine

    return TorchEngine if stage is None else zero_engine(stage)


def weights(trained: dict[str, TrainedAdapter]) -> dict[str, Any]:
    """Adapter -> why it was dropped, or its layers."""
    return {
        name: one.dropped or {layer: (pair.down, pair.up) for layer, pair in one.weights.layers.items()}
        for name, one in trained.items()
        if one.weights is not None or one.dropped is not None
    }


def gradients(base: BaseModel, pack: list[PackMember], make: EngineFactory) -> dict[str, list[torch.Tensor]]:
    """The whole gradient of the first step: AdamW's mean after it is (1 - beta_1) times the unclipped gradient."""
    found: dict[str, list[torch.Tensor]] = {}

    def remember(base: BaseModel, slots: Slots, saved: Sequence[SlotState | None], bf16: bool) -> Any:
        made = make(
            base, [(p, training.model_copy(update={"max_grad_norm": None})) for p, training in slots], saved, bf16
        )
        held.append(made)
        return made

    held: list[Any] = []
    bank = LoraBank.attach(base.unet, layers=adapted_layers(base.unet, "attention"))

    def read(_: StepReport) -> None:
        for slot, one in enumerate(pack):
            found[one.adapter_id] = [state["mean"].clone() / 0.1 for state in held[0].slot_state(slot)]

    train_pack(base, bank, pack, steps=1, make_engine=remember, on_step=read)
    return found


def poisoned(base: BaseModel) -> list[PackMember]:
    """A pack whose second adapter has photos of NaN."""
    bad = concept(base, "zwx", alpha=1.0)
    bad.moments[1][:] = float("nan")
    return [members(base)[0], member(base, task("bad", (bad,))), members(base)[2]]


def optimisers(base: BaseModel, stage: int | None) -> list[PackMember]:
    """The pack of several optimisers, without the one that needs whole matrices where they are sharded."""
    return [one for one in other_optimisers(base) if not stage or one.task.training.optimizer != "adafactor"]


def parted(base: BaseModel) -> list[PackMember]:
    """The pack with rows with and without the token in calls of their own."""
    return [replace(one, task=with_training(one.task, joint_rows=False)) for one in members(base)]


def one_row(base: BaseModel) -> list[PackMember]:
    """A pack with fewer rows than workers."""
    return [member(base, task("single", (concept(base, "sks", alpha=5.0),), rows_per_concept=1))]


def die(report: StepReport) -> None:
    """End the run as a kill would, on both workers."""
    if report.step == DIE_AT:
        raise Killed


@contextmanager
def counted_invalidations() -> Iterator[list[str]]:
    """Collect what DeepSpeed prints of traces that did not repeat."""
    lines: list[str] = []
    printed = io.StringIO()
    with redirect_stdout(printed):
        yield lines
    lines += [line for line in printed.getvalue().splitlines() if "Invalidate trace" in line]


def fresh_base(folder: Path, name: str = "base") -> BaseModel:
    """Load the base; what ZeRO-3 has sharded stays sharded, so each turn has one of its own."""
    gc.collect()
    return load_base_model(str(folder / name))


def try_laws(folder: Path) -> dict[str, Any]:
    """What each engine makes of a pack, of a bad one, and of one with too few rows."""
    results: dict[str, Any] = {}
    fresh = partial(fresh_base, folder)
    for stage in STAGES:
        make, base = engine(stage), fresh()
        with counted_invalidations() as lines:
            results["trained", stage] = weights(train(base, members(base), make_engine=make))
        results["invalidations", stage] = len(lines)
        base = fresh()
        results["gradients", stage] = gradients(base, members(base), make)
        base = fresh()
        results["poisoned", stage] = weights(train(base, poisoned(base), steps=FEW, make_engine=make))
        base = fresh()
        results["one row", stage] = weights(train(base, one_row(base), steps=FEW, make_engine=make))
        base = fresh()
        results["joined", stage] = weights(come_and_go(base, folder / f"joined-{stage}", make))
    for stage in STAGES_OF_XL:
        base = fresh("xl")
        results["xl", stage] = weights(train(base, members(base), steps=FEW, make_engine=engine(stage)))
    for stage in STAGES_OF_OPTIMISERS:
        base = fresh()
        pack = optimisers(base, stage)
        results["optimisers", stage] = weights(train(base, pack, steps=FEW, make_engine=engine(stage)))
    for stage in STAGES_OF_PARTS:
        base = fresh()
        results["parted", stage] = weights(train(base, parted(base), steps=FEW, make_engine=engine(stage)))
    with counted_invalidations() as lines:
        base = fresh()
        pack = members(base)
        bank = LoraBank.attach(base.unet, layers=adapted_layers(base.unet, "attention"))
        train_pack(base, bank, pack, steps=6, make_engine=_changing_calls)
    results["control"] = len(lines)
    return results


def few_steps(base: BaseModel) -> list[PackMember]:
    """Two adapters of as many steps as are needed to see a difference."""
    return [replace(one, task=with_training(one.task, steps=FEW)) for one in members(base)[:2]]


def come_and_go(base: BaseModel, folder: Path, make: EngineFactory) -> dict[str, TrainedAdapter]:
    """The second joins after two steps of the first, which is then parked for two steps."""
    first, second = few_steps(base)
    [stored] = series(folder, [first])
    layers = adapted_layers(base.unet, "attention")
    bank = LoraBank.attach(base.unet, layers=layers)
    first = replace(first, checkpoints=stored)
    with Pack(base, bank, [first], make_engine=make) as pack:
        for step in range(1, FEW + 5):
            if step == 3:
                pack.change(join=[second])
            if step == 4:
                pack.change(leave=[first.adapter_id])
            if step == 6:
                pack.change(join=[first])
            if pack.training:
                pack.step()
        return {one.task.adapter_id: pack.result(one.task.adapter_id) for one in (first, second)}


def sparse_text(base: BaseModel) -> list[PackMember]:
    """A pack in which a single row's text is adapted: one of two workers encodes none."""
    words = task("words", (concept(base, "zwx", alpha=5.0),), rows_per_concept=1, text_encoder=TextEncoderSpec())
    return [member(base, words), member(base, task("plain", (concept(base, "sks", alpha=5.0),)))]


def try_text(folder: Path) -> dict[str, Any]:
    """What each engine makes of packs that train text encoders."""
    results: dict[str, Any] = {}
    fresh = partial(fresh_base, folder)
    for stage in STAGES_OF_TEXT:
        make, base = engine(stage), fresh()
        with counted_invalidations() as lines:
            results["text", stage] = weights(train(base, with_text(base), steps=FEW, make_engine=make))
        results["invalidations", stage] = len(lines)
        for parts in (False, True) if stage in STAGES_OF_PARTS else (False,):
            base = fresh()
            pack = [replace(one, task=with_training(one.task, joint_rows=not parts)) for one in sparse_text(base)]
            results["sparse", stage, parts] = weights(train(base, pack, steps=FEW, make_engine=make))
    base = fresh("xl")
    results["xl"] = weights(train(base, with_text(base), steps=FEW, make_engine=engine(3)))
    return results


def try_kills(folder: Path) -> dict[str, Any]:
    """What becomes of runs that are killed at one stage and go on at another."""
    results: dict[str, Any] = {}
    fresh = partial(fresh_base, folder)
    base = fresh()
    for before, after in RESUMPTIONS:
        checkpoints = series(folder / f"resumed-{before}-{after}", members(base))
        try:
            base = fresh()
            train(base, members(base), checkpoints=checkpoints, on_step=die, make_engine=engine(before))
        except Killed:
            distributed.barrier()
        base = fresh()
        seen: list[int] = []
        note = partial(_note, seen)
        resumed = partial(train, checkpoints=checkpoints, on_step=note, make_engine=engine(after))
        results["resumed", before, after] = weights(resumed(base, members(base), steps=RESUMED))
        results["first step", before, after] = seen[0]
    # A pair dies half way and leaves its checkpoints to one process alone.
    base = fresh()
    try:
        train(
            base, members(base), checkpoints=series(folder / "alone", members(base)), on_step=die, make_engine=engine(2)
        )
    except Killed:
        distributed.barrier()
    return results


def _note(seen: list[int], report: StepReport) -> None:
    seen.append(report.step)


def _changing_calls(base: BaseModel, slots: Slots, saved: Sequence[SlotState | None], bf16: bool) -> Any:
    """ZeRO-3 with the teacher in a call of its own after three steps: a control, to see that the count counts."""
    made: Any = engine(3)(base, slots, saved, bf16)
    step = made.step

    def step_and_change() -> None:
        step()
        made.joined_teacher = made.optimizer.slots[0].steps_done < 3

    made.step = step_and_change
    return made


def main() -> None:
    """Be one worker of the pair."""
    rank, port, folder, what = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        DS_ACCELERATOR="cpu", PATH="",
    )  # fmt: skip
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.save({"laws": try_laws, "kills": try_kills, "text": try_text}[what](folder), folder / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    assert STEPS == 20
    main()
