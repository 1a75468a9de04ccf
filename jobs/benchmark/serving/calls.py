"""The engine's U-Net call beside the bare one and beside PEFT's mixed batch, call by call; and calls of many sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cat_cluster.lora.bank import served_layers
from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.lora.row_bank import AdapterLayout, RowAdapter, RowBank, RowBlock
from cat_cluster.models.base_model import BaseModel, compiled_blocks
from cat_cluster.models.conditioning import Conditioning, Sizes
from cat_cluster.models.image_start import start_from_noise
from cat_cluster.models.samplers import sampler_table
from jobs.benchmark.serving.baselines import PeftLoop
from jobs.benchmark.serving.workbench import GUIDANCE, Request, Workbench, take_turns_for
from jobs.benchmark.timing import RANK, seconds_of, synchronise
from serve.denoise.rows import ImageRows, Rows

Call = Callable[[], None]
BARE = "bare U-Net"
PEFT_ADAPTERS = 8


class Inputs:
    """What a call of guided images takes: latents, a timestep of its own for each row, texts."""

    def __init__(self, base: BaseModel, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (rows, base.latent_channels, base.latent_size, base.latent_size)
        self.latents = torch.randn(shape, generator=generator).to(base.device, base.dtype)
        self.timesteps = torch.randint(0, 1000, (rows,), generator=generator).to(base.device)
        # An image's rows are prompt and empty prompt.
        texts = base.text_encoders.encode([f"a photo of a sks cup {n}" if n % 2 == 0 else "" for n in range(rows)])
        self.conditioning = Conditioning.of(texts, [Sizes.drawn(base.resolution, base.resolution)] * rows)
        self.texts = self.conditioning.states

    def through(self, base: BaseModel) -> Tensor:
        """Return the U-Net's output of all rows."""
        arguments = self.conditioning.arguments()
        output: Tensor = base.unet(self.latents, self.timesteps, **arguments, return_dict=False)[0]
        synchronise(base)
        return output


def bound_call(bench: Workbench, base: BaseModel, bank: RowBank, inputs: Inputs, adapters: int) -> Call:
    """Return the engine's call: rows bound to `adapters` adapters, row by row or, where fewer, image by image."""
    rows, each = len(inputs.texts), [bench.adapters[name] for name in bench.ids[:adapters]]
    block = bank.block(rows, inputs.texts.shape[1])
    alike = 1 if adapters >= rows else 2  # rows of one image share its adapter
    for row in range(0, rows, alike):
        chosen = range(row, min(row + alike, rows))
        adapter = packed(base, bank, each[row // alike % adapters])
        block.bind(list(chosen), inputs.texts[list(chosen)], (adapter,))
    return call_of_all_rows(base, block, inputs)


def call_of_all_rows(base: BaseModel, block: RowBlock, inputs: Inputs) -> Call:
    """Return the engine's call of a block whose rows are bound."""

    def call() -> None:
        with block.call(len(inputs.texts)):
            inputs.through(base)

    return call


def whole_step(bench: Workbench, base: BaseModel, bank: RowBank, rows: int, adapters: int) -> Call:
    """Return a whole step of the engine: gather, U-Net call, guidance, samplers."""
    lane = Rows(base, bank, rows, (rows,), (base.latent_size, base.latent_size))
    table = sampler_table("ddim", base.schedule, bench.scale.steps)
    for n, request in enumerate(bench.requests(rows // 2, adapters=adapters)):
        adapter = packed(base, bank, bench.adapters[request.adapter])
        texts, latents = base.text_encoders.encode([request.prompt, ""]), start_from_noise(base, n, table).latents
        lane.join(ImageRows(texts=tuple(texts), table=table, guidance=GUIDANCE, latents=latents, adapters=(adapter,)))

    def step() -> None:
        lane.step()
        synchronise(base)
        for image in lane.images:
            image.step = 0

    return step


def banked(bench: Workbench, cleanup: ExitStack, rank: int) -> tuple[BaseModel, RowBank]:
    """Return a base of its own with a bank of this rank in it."""
    return attached(bench, cleanup, bench.load(), rank)


def attached(bench: Workbench, cleanup: ExitStack, base: BaseModel, rank: int) -> tuple[BaseModel, RowBank]:
    """Return a base and the bank of this rank that is put in it."""
    bank = RowBank(base.unet, AdapterLayout(base.unet, served_layers(base.unet, "all"), rank))
    cleanup.callback(bank.detach)
    if bench.compile:
        cleanup.enter_context(compiled_blocks(base.unet))
    return base, bank


def measure(bench: Workbench) -> dict[str, Any]:
    """Return the cost of adapters in one call at each number of threads, and the curve over rows."""
    with ExitStack() as cleanup, torch.inference_mode():
        bare = bench.load()
        if bench.compile:
            cleanup.enter_context(compiled_blocks(bare.unet))
        peft = PeftLoop(bench, PEFT_ADAPTERS)
        banks = {rank: banked(bench, cleanup, rank) for rank in (RANK, 2 * RANK)}
        mixes = _mixes(bench, bare, peft, banks, bench.scale.rows)
        threads, before = {}, torch.get_num_threads()
        cleanup.callback(torch.set_num_threads, before)
        for count in bench.scale.threads:
            torch.set_num_threads(count)
            threads[str(count)] = _compare(mixes, bench.seconds / 2)
        torch.set_num_threads(before)
        curve = _curve(bench, bare, banks[RANK], bench.scale.call_rows)
        return {
            "rows": bench.scale.rows,
            "rank": RANK,
            "calls": threads,
            "curve": curve,
            "limit": _limit(bench, curve),
            "difference": _difference(bench, bare, banks[RANK], peft),
        }


def _mixes(
    bench: Workbench, bare: BaseModel, peft: PeftLoop, banks: dict[int, tuple[BaseModel, RowBank]], rows: int
) -> dict[str, Call]:
    inputs = Inputs(bare, rows)
    names = [request.adapter for request in bench.requests(rows // 2, adapters=PEFT_ADAPTERS) for _ in range(2)]

    def by_peft() -> None:
        peft.call(inputs.latents, inputs.timesteps, inputs.conditioning, names)
        synchronise(bare)

    base, bank = banks[RANK]
    return {
        BARE: bare_call(bare, inputs),
        **{f"{n} adapters": bound_call(bench, base, bank, inputs, n) for n in (8, 16)},
        "16 adapters in slots of twice the rank": bound_call(bench, *banks[2 * RANK], inputs, 16),
        "no adapter, text kept": _base_rows(base, bank, inputs),
        "whole step, 8 adapters": whole_step(bench, base, bank, rows, 8),
        "PEFT adapter_names, 8 adapters": by_peft,
    }


def bare_call(base: BaseModel, inputs: Inputs) -> Call:
    """Return the U-Net's call with whatever its layers are."""

    def call() -> None:
        inputs.through(base)

    return call


def _base_rows(base: BaseModel, bank: RowBank, inputs: Inputs) -> Call:
    block = bank.block(len(inputs.texts), inputs.texts.shape[1])
    block.bind(list(range(len(inputs.texts))), inputs.texts)
    return call_of_all_rows(base, block, inputs)


def _compare(calls: dict[str, Call], seconds: float) -> dict[str, Any]:
    times = take_turns_for(once_each(calls), seconds)
    return {
        name: {"ms": 1e3 * timed.median, "to_bare": timed.ratio(times[BARE]), "calls": len(timed.turns)}
        for name, timed in times.items()
    }


def once_each(calls: Mapping[str, Call]) -> dict[str, Callable[[], float]]:
    """Return of each call a function that makes it once and says how many seconds it took."""
    return {name: partial(seconds_of, call, 1) for name, call in calls.items()}


def _curve(
    bench: Workbench, bare: BaseModel, banked_base: tuple[BaseModel, RowBank], counts: Sequence[int]
) -> dict[str, Any]:
    """Milliseconds of a call over its rows, bare and with as many adapters as images: what a batch gains."""
    base, bank = banked_base
    curve = {}
    for rows in counts:
        inputs = Inputs(bare, rows)
        calls = {BARE: bare_call(bare, inputs)}
        for adapters in bench.scale.mixes:
            calls[_named(adapters)] = bound_call(bench, base, bank, inputs, adapters)
        found = _compare(calls, bench.seconds / len(counts))
        curve[str(rows)] = {name: {"ms": one["ms"], "ms_per_row": one["ms"] / rows} for name, one in found.items()}
    return curve


def _limit(bench: Workbench, curve: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """The images per second that the bare U-Net alone allows, at the number of rows that is best for it."""
    per_row, rows = min((calls[BARE]["ms_per_row"], int(rows)) for rows, calls in curve.items())
    return {"rows": rows, "images_per_s": 1e3 / (2 * bench.scale.steps * per_row)}


def packed(base: BaseModel, bank: RowBank, weights: AdapterWeights) -> RowAdapter:
    """Return an adapter as a slot of the service holds it."""
    return RowAdapter(bank.layout.pack(weights).to(base.device, base.dtype), weights.rank)


def _named(adapters: int) -> str:
    return "1 adapter" if adapters == 1 else f"up to {adapters} adapters"


def _difference(
    bench: Workbench, bare: BaseModel, banked_base: tuple[BaseModel, RowBank], peft: PeftLoop
) -> dict[str, float]:
    """The largest difference of the outputs to PEFT's and to the bare U-Net's, and what an adapter changes."""
    base, bank = banked_base
    inputs = Inputs(bare, PEFT_ADAPTERS)
    block = bank.block(PEFT_ADAPTERS, inputs.texts.shape[1])
    requests: list[Request] = bench.requests(PEFT_ADAPTERS, adapters=PEFT_ADAPTERS)
    for row, request in enumerate(requests):
        adapter = packed(base, bank, bench.adapters[request.adapter])
        block.bind([row], inputs.texts[row : row + 1], (adapter,))
    with block.call(len(requests)):
        ours = inputs.through(base).float()
    theirs = peft.call(
        inputs.latents, inputs.timesteps, inputs.conditioning, [request.adapter for request in requests]
    ).float()
    plain = inputs.through(bare).float()
    return {"to_peft": float((ours - theirs).abs().max()), "to_bare": float((ours - plain).abs().max())}
