"""Aspect buckets: what a step of photos of several shapes costs beside one of square crops, for each pixel of it.

like: every adapter of a pack has the same shapes, and they share calls. unlike: each has one shape, and its neighbours
others, so that every step has as many calls as there are shapes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cat_cluster.data.crops import Size, bucket_of
from cat_cluster.models.base_model import BaseModel, load_base_model
from jobs.benchmark.record import Start, write_result
from jobs.benchmark.timing import (
    PHOTOS,
    StepOptions,
    concept_task,
    pack_step,
    sd15_sized_base,
    seconds_of,
    take_turns,
)

# Six photos of a phone that was held both ways, two of them cropped by hand, as width and height.
SHAPES = ((3024, 4032), (3024, 4032), (4032, 3024), (4032, 3024), (2000, 2000), (1080, 1920))
ROWS = 4
PACKS = (1, 4, 8)
STEPS = PHOTOS // 2  # in which a concept's four rows are each photo twice
SQUARES, LIKE, UNLIKE = "squares", "like", "unlike"
BASES: dict[str, tuple[str, Callable[[], BaseModel], StepOptions]] = {
    "pocket": ("buckets", lambda: load_base_model("pocket"), StepOptions(joint_rows=True, fraction=0.5)),
    "sd15": ("buckets-gpu", sd15_sized_base, StepOptions(joint_rows=True, fraction=0.5, bf16=True)),
}


def run(start: Start, console: Console, size_name: str = "pocket", *, turns: int = 7) -> Path:
    """Time steps of 1, 4 and 8 adapters on squares and on buckets, in turns, and write the result file."""
    result, load, options = BASES[size_name]
    base = load()
    packs = {}
    for adapters in PACKS:
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
    shares = {kind: sum(map(pixels, own)) / sum(map(pixels, kinds[SQUARES])) for kind, own in kinds.items()}
    return {
        "step_ms": {kind: timed.median * 1e3 for kind, timed in times.items()},
        "time_per_pixel": {kind: times[kind].ratio(times[SQUARES]) / shares[kind] for kind in (LIKE, UNLIKE)},
    }


def bucket_sizes(base: BaseModel) -> list[Size]:
    """Return the bucket of each photo."""
    return [bucket_of(Size(*shape), base.resolution, base.bucket_step) for shape in SHAPES]


def pixels(sizes: Sequence[Size]) -> int:
    """Return how many pixels all crops have together."""
    return sum(size.width * size.height for size in sizes)


def _steps(base: BaseModel, options: StepOptions, sizes: Sequence[Sequence[Size]]) -> Callable[[], float]:
    tasks = [concept_task(base, f"adapter-{n}", ROWS, options, own) for n, own in enumerate(sizes)]

    def measure() -> float:
        with pack_step(base, tasks, options) as step:
            for _ in range(STEPS):  # text embeddings and allocations of every size
                step()
            return seconds_of(step, STEPS)

    return measure
