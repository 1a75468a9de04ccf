"""Stacks: what several adapters on an image cost beside one of their summed rank, and beside diffusers' ways.

One adapter of the summed rank is made of the same adapters, so that it draws the same image. Room for stacks is
`max_rank`, and costs calls whose rows hold one small adapter too: that is measured beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.lora.row_bank import RowAdapter, RowBank, RowBlock
from cat_cluster.lora.stacks import stack_weights
from cat_cluster.models.base_model import BaseModel, compiled_blocks
from cat_cluster.registry.stacks import stack_name
from jobs.benchmark.serving.baselines import PIPELINES, state
from jobs.benchmark.serving.calls import (
    BARE,
    Call,
    Inputs,
    attached,
    bare_call,
    call_of_all_rows,
    once_each,
    packed,
)
from jobs.benchmark.serving.rates import compare_one_by_one
from jobs.benchmark.serving.workbench import Workbench, take_turns_for
from jobs.benchmark.timing import RANK, seconds_of, synchronise

ADAPTERS = 4  # of a stack
ROOM = ADAPTERS * RANK
MAX_RANKS = (2 * RANK, ROOM, 2 * ROOM)
STACK, ONE, SMALL = f"{ADAPTERS} of rank {RANK}", f"1 of rank {ROOM}", f"1 of rank {RANK}"
BANK, ACTIVE, FUSED = "engine's call", "set_adapters", "fused weights"
Models = dict[int, tuple[BaseModel, RowBank]]  # by max_rank
Stacks = list[list[AdapterWeights]]


def measure(bench: Workbench) -> dict[str, Any]:
    """Return what stacks cost in a call and to bind, what room for them costs, and what diffusers takes for the same.

    Of the time, half goes to calls, a sixth each to binding and to one image's call; images take as much again.
    """
    few = replace(bench, scale=replace(bench.scale, adapters=2 * ADAPTERS))  # PEFT loads them slowly
    names = [[few.ids[(n + m) % len(few.ids)] for m in range(ADAPTERS)] for n in range(len(few.ids))]
    return {
        "adapters": ADAPTERS,
        "rank": RANK,
        **_of_calls(few, [[few.adapters[name] for name in own] for own in names]),
        "images": compare_one_by_one(
            few,
            {name: PIPELINES[name] for name in ("set_adapters", "fuse and unfuse")},
            [stack_name(own) for own in names],
            -(-bench.scale.serial_images // 2),
            max_rank=ROOM,
        ),
    }


def _of_calls(bench: Workbench, stacks: Stacks) -> dict[str, Any]:
    with ExitStack() as cleanup, torch.inference_mode():
        bare = bench.load()
        models = {rank: attached(bench, cleanup, _twin(bare), rank) for rank in MAX_RANKS}
        if bench.compile:
            cleanup.enter_context(compiled_blocks(bare.unet))
        rows, seconds = bench.scale.stack_rows, bench.seconds / (2 * len(bench.scale.stack_rows))
        return {
            "calls": {str(count): _calls(bare, models, stacks, count, seconds) for count in rows},
            "bytes": {str(rank): bank.layout.size * bench.dtype.itemsize for rank, (_, bank) in models.items()},
            "bind_ms": _binding(bench, models[ROOM], stacks[0]),
            **_one_image(bench, cleanup, bare, models[ROOM], stacks[0]),
        }


def _calls(bare: BaseModel, models: Models, stacks: Stacks, rows: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of a call of `rows` rows, and the ratios that are asked about."""
    inputs = Inputs(bare, rows)
    alone, summed = [own[:1] for own in stacks], [[_as_one(own)] for own in stacks]

    def call(rank: int, adapters: Stacks) -> Call:
        base, bank = models[rank]
        return call_of_all_rows(base, _bound(base, bank, inputs, adapters), inputs)

    # Every other turn goes backwards, so the first and the last of them find their own memory in the caches at times:
    # these are not compared.
    calls = {BARE: bare_call(bare, inputs)}
    for rank in MAX_RANKS:
        calls[_in(rank, SMALL)] = call(rank, alone)
    for name, adapters in ((ONE, summed), (STACK, stacks)):
        calls[_in(ROOM, name)] = call(ROOM, adapters)
    calls["no adapter"] = call(MAX_RANKS[0], [[]])
    times = take_turns_for(once_each(calls), seconds)
    least = times[_in(MAX_RANKS[0], SMALL)]
    return {
        "ms": {name: 1e3 * timed.median for name, timed in times.items()},
        "stack_over_one": times[_in(ROOM, STACK)].ratio(times[_in(ROOM, ONE)]),
        "room_over_least": {str(rank): times[_in(rank, SMALL)].ratio(least) for rank in MAX_RANKS[1:]},
        "turns": len(least.turns),
    }


def _binding(bench: Workbench, model: tuple[BaseModel, RowBank], stack: Sequence[AdapterWeights]) -> dict[str, Any]:
    """Milliseconds of binding a row, and the two rows of a guided image, their texts' keys and values included."""
    (base, bank), inputs = model, Inputs(model[0], 2)
    block = bank.block(2, inputs.texts.shape[1])
    choices = {STACK: stack, ONE: [_as_one(stack)], SMALL: stack[:1]}

    def bind(rows: int, adapters: Sequence[RowAdapter]) -> None:
        block.bind(list(range(rows)), inputs.texts[:rows], adapters)
        synchronise(base)

    binds: dict[str, Call] = {}
    for name, weights in choices.items():
        adapters = [packed(base, bank, one) for one in weights]
        binds |= {f"{name}, rows {rows}": partial(bind, rows, adapters) for rows in (1, 2)}
    times = take_turns_for(once_each(binds), bench.seconds / 6)
    return {name: {str(rows): 1e3 * times[f"{name}, rows {rows}"].median for rows in (1, 2)} for name in choices}


def _one_image(
    bench: Workbench,
    cleanup: ExitStack,
    bare: BaseModel,
    model: tuple[BaseModel, RowBank],
    stack: Sequence[AdapterWeights],
) -> dict[str, Any]:
    """The call of one image's two rows beside diffusers', and the largest differences of their outputs."""
    (base, bank), inputs = model, Inputs(bare, 2)
    block = _bound(base, bank, inputs, [stack])
    active, fused = (_by_diffusers(bench, cleanup, stack, fused=fused) for fused in (False, True))
    calls = {
        BANK: call_of_all_rows(base, block, inputs),
        ACTIVE: bare_call(active, inputs),
        FUSED: bare_call(fused, inputs),
        BARE: bare_call(bare, inputs),
    }
    # Each has weights of its own: a call is timed after another of its kind, as in an image's steps.
    times = take_turns_for({name: partial(_again, call) for name, call in calls.items()}, bench.seconds / 6)
    ours = _output(base, block, inputs)
    summed = _output(base, _bound(base, bank, inputs, [[_as_one(stack)]]), inputs)
    others = {"one": summed, "diffusers": inputs.through(active).float(), "bare": inputs.through(bare).float()}
    return {
        "one_image": {
            name: {"ms": 1e3 * timed.median, "to_bank": timed.ratio(times[BANK]), "calls": len(timed.turns)}
            for name, timed in times.items()
        },
        "difference": {f"to_{name}": float((ours - other).abs().max()) for name, other in others.items()},
    }


def _by_diffusers(bench: Workbench, cleanup: ExitStack, stack: Sequence[AdapterWeights], *, fused: bool) -> BaseModel:
    """Return a base whose U-Net has these adapters active as diffusers has them, or in its weights."""
    base, names = bench.load(), [f"member-{n}" for n in range(len(stack))]
    for name, weights in zip(names, stack, strict=True):
        base.unet.load_lora_adapter(dict(state(weights)), prefix=None, adapter_name=name)
    base.unet.to(base.device, base.dtype)
    base.unet.set_adapters(names)
    if fused:
        base.unet.fuse_lora(adapter_names=names)
    if bench.compile:
        cleanup.enter_context(compiled_blocks(base.unet))
    return base


def _bound(base: BaseModel, bank: RowBank, inputs: Inputs, stacks: Sequence[Sequence[AdapterWeights]]) -> RowBlock:
    """Return a block of guided images, of two rows each, with these stacks in turn."""
    rows = len(inputs.texts)
    block = bank.block(rows, inputs.texts.shape[1])
    for n, row in enumerate(range(0, rows, 2)):
        adapters = [packed(base, bank, one) for one in stacks[n % len(stacks)]]
        block.bind([row, row + 1], inputs.texts[row : row + 2], adapters)
    return block


def _twin(base: BaseModel) -> BaseModel:
    """Return a base with another U-Net of the very same weights in memory: calls differ in what is attached alone."""
    tensors = [*base.unet.parameters(), *base.unet.buffers()]
    return replace(base, unet=deepcopy(base.unet, {id(one): one for one in tensors}))


def _again(call: Call) -> float:
    call()
    return seconds_of(call, 1)


def _output(base: BaseModel, block: RowBlock, inputs: Inputs) -> Tensor:
    with block.call(len(inputs.texts)):
        return inputs.through(base).float()


def _as_one(stack: Sequence[AdapterWeights]) -> AdapterWeights:
    return stack_weights([(weights, 1.0) for weights in stack])


def _in(max_rank: int, adapters: str) -> str:
    return f"{adapters}, max_rank {max_rank}"
