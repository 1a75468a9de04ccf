"""What it costs a pack that trains when adapters come and go between two steps, in steps of that pack."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from cat_cluster.lora.bank import LoraBank, adapted_layers
from cat_cluster.models.base_model import BaseModel
from cat_cluster.training.engine import EngineFactory
from cat_cluster.training.loop import Pack, PackMember
from cat_cluster.training.methods import initial_weights
from jobs.benchmark.timing import RANK, SPEC_DEFAULTS, concept_task, synchronise

ROWS, TURNS = 4, 7
JOIN, SWAP, LEAVE = "one joins", "one leaves and another joins", "one leaves"


def changes(base: BaseModel, adapters: int, make: EngineFactory, turns: int = TURNS) -> dict[str, Any]:
    """Return the milliseconds of a step of a pack, and of each change of its adapters over that step, by turns.

    A change is counted with the step that follows it, which reads texts that are new, less a step of as many adapters
    before or after it; so it may come out below zero. The first turn warms up and is not counted.
    """
    layers = adapted_layers(base.unet, "attention_ff")
    bank = LoraBank.attach(base.unet, layers=layers)
    members = [_member(base, layers, f"c{n}") for n in range(adapters)]
    steps: list[float] = []
    found: dict[str, list[float]] = {JOIN: [], SWAP: [], LEAVE: []}
    try:
        with Pack(base, bank, members, make_engine=make) as pack:
            for turn in range(turns + 1):
                one, other = (_member(base, layers, f"{turn}-{name}") for name in ("one", "other"))
                works = {
                    JOIN: partial(pack.change, join=[one]),
                    SWAP: partial(pack.change, leave=[one.adapter_id], join=[other]),
                    LEAVE: partial(pack.change, leave=[other.adapter_id]),
                }
                before = _seconds(base, pack.step)
                for name, work in works.items():
                    changed = _seconds(base, work) + _seconds(base, pack.step)
                    usual = min(_seconds(base, pack.step) for _ in range(3))
                    if turn > 0:
                        found[name].append((changed - usual) / usual)
                if turn > 0:
                    steps.append(before)
    finally:
        bank.detach()
    return {
        "step_ms": 1e3 * statistics.median(steps),
        "steps": {name: statistics.median(ratios) for name, ratios in found.items()},
    }


def _member(base: BaseModel, layers: tuple[str, ...], name: str) -> PackMember:
    task = concept_task(base, name, ROWS, SPEC_DEFAULTS)
    return PackMember(task, initial_weights(base.unet, layers, rank=RANK, seed=0, draw_key=name))


def _seconds(base: BaseModel, work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    synchronise(base)
    return time.perf_counter() - started
