"""What each optimisation does to the time of a step, beside plain LoRA at equal identity rows, in turns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cat_cluster.data.latents import TextCache
from cat_cluster.lora.bank import LoraBank, adapted_layers
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.conditioning import Conditioning, Sizes
from cat_cluster.spec.sections import TrainingSpec
from cat_cluster.training.methods import initial_weights
from cat_cluster.training.teacher import TeacherPool
from jobs.benchmark.record import Start, write_result
from jobs.benchmark.timing import (
    PLAIN_LORA,
    RANK,
    StepOptions,
    Timed,
    concept_task,
    pack_step,
    seconds_of,
    synchronise,
    take_turns,
)
from jobs.benchmark.training.peft_loop import peft_step

POOL = TrainingSpec().pool_size
LORA = "plain LoRA"
VARIANTS: dict[str, StepOptions] = {
    LORA: PLAIN_LORA,
    "CAT, not optimised: two student calls, teacher on every row": StepOptions(),
    "[y_T; y] in one call": StepOptions(joint_rows=True),
    "one call, half the rows": StepOptions(joint_rows=True, fraction=0.5),
    "one call, a quarter of the rows": StepOptions(joint_rows=True, fraction=0.25),
    "one call, pool": StepOptions(joint_rows=True, pool_size=POOL),
    "one call, pool, half the rows": StepOptions(joint_rows=True, fraction=0.5, pool_size=POOL),
    "one call, pool, a quarter of the rows": StepOptions(joint_rows=True, fraction=0.25, pool_size=POOL),
    "one call, half the rows, middle and up blocks": StepOptions(joint_rows=True, fraction=0.5, blocks="mid_up"),
    "one call, half the rows, up blocks": StepOptions(joint_rows=True, fraction=0.5, blocks="up"),
    "plain LoRA, up blocks": StepOptions(alpha=0.0, blocks="up"),
    "plain LoRA, bf16": StepOptions(alpha=0.0, bf16=True),
    "one call, half the rows, bf16": StepOptions(joint_rows=True, fraction=0.5, bf16=True),
}


def run(start: Start, console: Console, *, rows: int = 4, steps: int = 2, turns: int = 5) -> Path:
    """Time every variant with 1 and with 8 adapters, the LoRA layers themselves, and the fill of a pool."""
    base = load_base_model("pocket")
    packs = {}
    for adapters in (1, 8):
        times = take_turns({name: _variant(base, adapters, rows, one, steps) for name, one in VARIANTS.items()}, turns)
        packs[str(adapters)] = {
            name: {"step_ms": timed.median * 1e3, "to_lora": timed.ratio(times[LORA])} for name, timed in times.items()
        }
        console.print(f"{adapters} adapters done")
    return write_result(
        "optimisations",
        {
            "rows_per_concept": rows,
            "steps_per_turn": steps,
            "turns": turns,
            "adapters": packs,
            "pool_fill_ms": _fill(base, rows) * 1e3,
            "pool_entries": POOL * 6,
            "layers": _layers(base, turns),
        },
        start,
    )


def _variant(base: BaseModel, adapters: int, rows: int, options: StepOptions, steps: int) -> Callable[[], float]:
    tasks = [concept_task(base, f"adapter-{n}", rows, options) for n in range(adapters)]

    pool = TeacherPool()

    def measure() -> float:
        with pack_step(base, tasks, options, pool) as step:
            step()  # text embeddings and allocations
            return seconds_of(step, steps)

    return measure


def _fill(base: BaseModel, rows: int) -> float:
    """Seconds to open a pack of one adapter with a pool, less those without."""
    task = concept_task(base, "adapter", rows, StepOptions(pool_size=POOL))
    plain = concept_task(base, "adapter", rows, StepOptions())

    def opened(one: Any, options: StepOptions) -> float:
        def work() -> None:
            with pack_step(base, [one], options):
                pass

        return seconds_of(work, 1)

    times = take_turns(
        {"pool": lambda: opened(task, StepOptions(pool_size=POOL)), "none": lambda: opened(plain, StepOptions())}, 3
    )
    return times["pool"].median - times["none"].median


def _layers(base: BaseModel, turns: int) -> dict[str, Any]:
    """The bank itself: 16 rows of 8 adapters beside the bare U-Net, and 4 training rows of one beside PEFT."""
    forward = take_turns({"bare": lambda: _forward(base, 0), "bank": lambda: _forward(base, 8)}, turns)
    with pack_step(base, [concept_task(base, "one", 4, PLAIN_LORA)], PLAIN_LORA) as step:
        step()
        ours = Timed(tuple(seconds_of(step, 3) for _ in range(turns)))
    step, _ = peft_step(base, 4, PLAIN_LORA)
    step()
    theirs = Timed(tuple(seconds_of(step, 3) for _ in range(turns)))
    return {
        "forward_to_bare": forward["bank"].ratio(forward["bare"]),
        "training_step_to_peft": ours.median / theirs.median,
    }


@torch.no_grad()
def _forward(base: BaseModel, adapters: int, rows: int = 16) -> float:
    generator = torch.Generator().manual_seed(0)
    size = base.latent_size
    noisy = torch.randn(rows, base.latent_channels, size, size, generator=generator).to(base.device)
    timestep = torch.randint(0, 1000, (rows,), generator=generator).to(base.device)
    sizes = [Sizes.drawn(base.resolution, base.resolution)] * rows
    conditioning = Conditioning.of(TextCache(base)(["a photo of a cup"] * rows), sizes).arguments()

    def call() -> None:
        base.unet(noisy, timestep, **conditioning, return_dict=False)
        synchronise(base)

    if not adapters:
        return seconds_of(call, 4)
    layers = adapted_layers(base.unet, "attention_ff")
    bank = LoraBank.attach(base.unet, layers=layers)
    try:
        for slot in range(1, adapters + 1):
            bank.load(slot, initial_weights(base.unet, layers, rank=RANK, seed=slot, draw_key="layers"))

        def bound() -> None:
            with bank.rows([1 + row % adapters for row in range(rows)]):
                call()

        bound()
        return seconds_of(bound, 4)
    finally:
        bank.detach()
