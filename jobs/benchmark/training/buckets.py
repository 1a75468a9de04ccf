"""Aspect buckets: what a step of photos of several shapes costs beside one of square crops, for each pixel of it.

like: every adapter of a pack has the same shapes, and they share calls. unlike: each has one shape, and its neighbours
others, so that every step has as many calls as there are shapes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from cat_cluster.data.crops import Size, bucket_of
from cat_cluster.data.views import views_of_step
from cat_cluster.models.base_model import BaseModel, load_base_model
from jobs.benchmark.random_bases import random_base
from jobs.benchmark.record import Start, write_result
from jobs.benchmark.timing import (
    PHOTOS,
    StepOptions,
    concept_task,
    pack_step,
    seconds_of,
    take_turns,
)

# Six photos of a phone that was held both ways, two of them cropped by hand, as width and height.
SHAPES = ((3024, 4032), (3024, 4032), (4032, 3024), (4032, 3024), (2000, 2000), (1080, 1920))
ROWS = 4
PACKS = {"pocket": (1, 4, 8), "sd15": (1, 4, 8), "sdxl": (1, 2)}
WARM_UP = STEPS = 6  # in which every size is shown
SQUARES, LIKE, UNLIKE = "squares", "like", "unlike"
BASES: dict[str, tuple[str, Callable[[], BaseModel], StepOptions]] = {
    "pocket": ("buckets", lambda: load_base_model("pocket"), StepOptions(joint_rows=True, fraction=0.5)),
    "sd15": ("buckets-gpu", random_base, StepOptions(joint_rows=True, fraction=0.5, bf16=True)),
    "sdxl": ("buckets-sdxl", partial(random_base, "sdxl"), StepOptions(joint_rows=True, fraction=0.5, bf16=True)),
}


def run(start: Start, console: Console, size_name: str = "pocket", *, turns: int = 5) -> Path:
    """Time steps of packs of a size on squares and on buckets, in turns, and write the result file."""
    result, load, options = BASES[size_name]
    base = load()
    packs = {}
    for adapters in PACKS[size_name]:
        packs[str(adapters)] = compare_sizes(base, adapters, options, turns)
        console.print(f"{adapters} adapters: {json.dumps(packs[str(adapters)]['time_per_pixel'])}")
    sizes = bucket_sizes(base)
    return write_result(
        result,
        {
            "photos": [list(shape) for shape in SHAPES],
            "sizes": [list(size) for size in sizes],
            "resolution": base.resolution,
            "pixels": pixels(sizes) / pixels([Size.square(base.resolution)] * PHOTOS),
            "rows_per_concept": ROWS,
            "steps_per_turn": STEPS,
            "turns": turns,
            "adapters": packs,
        },
        start,
    )


def compare_sizes(base: BaseModel, adapters: int, options: StepOptions, turns: int) -> dict[str, Any]:
    """Return milliseconds of a step by kind of crop, and the time per pixel of buckets over that of squares."""
    sizes, square = bucket_sizes(base), Size.square(base.resolution)
    shapes = list(dict.fromkeys(sizes))
    kinds = {
        SQUARES: [[square] * PHOTOS] * adapters,
        LIKE: [sizes] * adapters,
        UNLIKE: [[shapes[n % len(shapes)]] * PHOTOS for n in range(adapters)],
    }
    times = take_turns({kind: _steps(base, options, own) for kind, own in kinds.items()}, turns)
    shown = {kind: sum(map(_pixels_shown, own)) for kind, own in kinds.items()}
    return {
        "step_ms": {kind: timed.median * 1e3 for kind, timed in times.items()},
        "time_per_pixel": {
            kind: times[kind].ratio(times[SQUARES]) * shown[SQUARES] / shown[kind] for kind in (LIKE, UNLIKE)
        },
    }


def bucket_sizes(base: BaseModel) -> list[Size]:
    """Return the bucket of each photo."""
    return [bucket_of(Size(*shape), base.resolution, base.size_unit) for shape in SHAPES]


def pixels(sizes: Sequence[Size]) -> int:
    """Return how many pixels all crops have together."""
    return sum(size.width * size.height for size in sizes)


def _pixels_shown(sizes: Sequence[Size]) -> int:
    """Return the pixels of a concept's rows in the steps that are timed."""
    shapes = [(size.height, size.width) for size in sizes]
    views = (views_of_step((), step, ROWS, shapes) for step in range(WARM_UP, WARM_UP + STEPS))
    return pixels([sizes[view] for own in views for view in own])


def _steps(base: BaseModel, options: StepOptions, sizes: Sequence[Sequence[Size]]) -> Callable[[], float]:
    tasks = [concept_task(base, f"adapter-{n}", ROWS, options, own) for n, own in enumerate(sizes)]

    def measure() -> float:
        with pack_step(base, tasks, options) as step:
            for _ in range(WARM_UP):  # texts and allocations of every size
                step()
            return seconds_of(step, STEPS)

    return measure
