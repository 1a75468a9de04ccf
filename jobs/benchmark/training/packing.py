"""Packing: K adapters in one forward against K runs one after the other, and against a plain PEFT loop; peak memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.training.teacher import TeacherPool
from jobs.benchmark.random_bases import random_base
from jobs.benchmark.record import ROOT, Start, write_result
from jobs.benchmark.timing import StepOptions, concept_task, pack_step, seconds_of, take_turns
from jobs.benchmark.training.peft_loop import peft_step

TRAINING_STEPS = 300  # of the concepts per hour; every method does equally many
MEMORY_ROWS = 4
SMALL_POOL = 16  # the frontier's cat-pool16: a pool of 64 draws holds more entries than a short run has CAT rows


@dataclass(frozen=True)
class Size:
    """A base model and how it is trained: `same` has the reference's rows and loss, `optimised` fewer rows.

    adapters: how many are compared; rows: of each concept; largest: pack whose memory is measured.
    """

    result: str
    load: Callable[[], BaseModel]
    same: StepOptions
    optimised: StepOptions
    adapters: int = 8
    rows: tuple[int, ...] = (1, 2, 4)
    largest: int = 32


SIZES = {
    "pocket": Size(
        "packing",
        lambda: load_base_model("pocket"),
        StepOptions(joint_rows=True),
        StepOptions(joint_rows=True, fraction=0.5, pool_size=SMALL_POOL),
    ),
    "sd15": Size(
        "packing-gpu",
        random_base,
        StepOptions(joint_rows=True, bf16=True),
        StepOptions(joint_rows=True, fraction=0.5, pool_size=SMALL_POOL, bf16=True, compile=True),
    ),
    # By arithmetic a row of 1024 pixels keeps 6 GiB in bf16: eight rows, four with a CAT term each, fill half an H200.
    "sdxl": Size(
        "packing-sdxl",
        partial(random_base, "sdxl"),
        StepOptions(joint_rows=True, bf16=True),
        StepOptions(joint_rows=True, fraction=0.5, pool_size=SMALL_POOL, bf16=True),
        adapters=4,
        rows=(1,),
        largest=8,
    ),
}


def run(start: Start, console: Console, size_name: str = "pocket", *, steps: int = 2, turns: int = 3) -> Path:
    """Time the adapters of a size with every method, and measure the peak memory of packs up to its largest."""
    size = SIZES[size_name]
    base = size.load()
    rows = {}
    for count in size.rows:
        rows[str(count)] = compare_methods(base, size, count, steps, turns)
        console.print(f"{count} rows per concept: {json.dumps(rows[str(count)]['speed_up'])}")
    memory = {}
    for adapters in (k for k in (1, 2, 4, 8, 16, 32) if k <= size.largest):
        peak = _peak_mib(size_name, adapters)
        memory[str(adapters)] = {"peak_mib": peak, "per_concept_mib": peak / adapters}
        console.print(f"{adapters} adapters: {peak:.0f} MiB")
    return write_result(
        size.result,
        {
            "size": size_name,
            "adapters": size.adapters,
            "training_steps": TRAINING_STEPS,
            "rows": rows,
            "memory": memory,
        },
        start,
    )


def compare_methods(base: BaseModel, size: Size, rows: int, steps: int, turns: int) -> dict[str, Any]:
    """Seconds per step of all adapters by each method; a step counts for each of them where they run one by one."""
    count = size.adapters
    methods = {
        "reference": _reference(base, count, rows, size.same, steps),
        "sequential": _ours(base, 1, count, rows, size.same, steps),
        "packed": _ours(base, count, 1, rows, size.same, steps),
        "sequential, optimised": _ours(base, 1, count, rows, size.optimised, steps),
        "packed, optimised": _ours(base, count, 1, rows, size.optimised, steps),
    }
    times = take_turns(methods, turns)

    def faster(slow: str, fast: str) -> float:
        return times[slow].ratio(times[fast])

    # Filling the pool is part of training with it: counted into every step, 1/300 each.
    fill = count * _fill_seconds(base, rows, size.optimised) / TRAINING_STEPS
    with_fill = (times["packed, optimised"].median + fill) / times["packed, optimised"].median
    return {
        "step_seconds": {name: timed.median for name, timed in times.items()},
        "pool_fill_seconds_per_step": fill,
        "concepts_per_hour": {name: count * 3600 / (TRAINING_STEPS * timed.median) for name, timed in times.items()},
        "speed_up": {
            "packed over sequential": faster("sequential", "packed"),
            "packed over reference": faster("reference", "packed"),
            "packed and optimised over reference": faster("reference", "packed, optimised") / with_fill,
        },
    }


def _ours(
    base: BaseModel, adapters: int, times: int, rows: int, options: StepOptions, steps: int
) -> Callable[[], float]:
    tasks = [concept_task(base, f"adapter-{n}", rows, options) for n in range(adapters)]

    pool = TeacherPool()

    def measure() -> float:
        with pack_step(base, tasks, options, pool) as step:
            step()
            return seconds_of(step, steps) * times

    return measure


def _reference(base: BaseModel, times: int, rows: int, options: StepOptions, steps: int) -> Callable[[], float]:
    def measure() -> float:
        step, _ = peft_step(base, rows, options)
        step()
        return seconds_of(step, steps) * times

    return measure


def _fill_seconds(base: BaseModel, rows: int, options: StepOptions) -> float:
    options = replace(options, compile=False)
    task = concept_task(base, "adapter", rows, options)

    def work() -> None:
        with pack_step(base, [task], options):
            pass

    return seconds_of(work, 1)


def _peak_mib(size_name: str, adapters: int) -> float:
    """The peak memory of a process of its own that trains a pack for two steps, MiB."""
    command = [sys.executable, "-m", "jobs.benchmark.training.packing", size_name, str(adapters)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _peak_resident_mib() -> float:
    """The high-water mark of this process. Not getrusage's: that one begins at the parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return float(status.partition("VmHWM:")[2].split()[0]) / 2**10


def _train_two_steps(size_name: str, adapters: int) -> float:
    base, options = SIZES[size_name].load(), replace(SIZES[size_name].optimised, compile=False, pool_size=None)
    tasks = [concept_task(base, f"adapter-{n}", MEMORY_ROWS, options) for n in range(adapters)]
    with pack_step(base, tasks, options) as step:
        step()
        step()
    if base.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return _peak_resident_mib()


if __name__ == "__main__":
    sys.stdout.write(f"{_train_two_steps(sys.argv[1], int(sys.argv[2]))}\n")
