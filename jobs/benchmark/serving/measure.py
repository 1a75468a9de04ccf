"""Serving many adapters: what they cost, and what the engine gains over what one would do without it.

`python -m jobs.benchmark serving` (about half an hour on 2 cores) measures every part; all of a part's backends take
short turns in one process. `--size sd15 --device cuda` does so on a GPU with a random base of that size, which it makes
itself: no hub, no Ray. So does `--size sdxl`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cat_cluster.models.device import choose_device
from jobs.benchmark.random_bases import write_random_base
from jobs.benchmark.record import RESULTS, Start, machine, read_result, write_result
from jobs.benchmark.serving import between_steps, calls, rates, stacks
from jobs.benchmark.serving.workbench import Scale, Workbench, open_workbench

PARTS: dict[str, Callable[[Workbench], dict[str, Any]]] = {
    "overhead": calls.measure,
    "adapters": rates.measure_adapters,
    "serial": rates.measure_serial,
    "peft": rates.measure_peft,
    "stacks": stacks.measure,
    "poisson": rates.measure_poisson,
    "join": between_steps.measure_join,
    "probes": between_steps.measure_probes,
}


@dataclass(frozen=True)
class Size:
    """A base, given by name or written into a folder; how much is measured; and the parts it can be measured in."""

    result: str
    base: Callable[[Path], str]
    scale: Scale
    parts: tuple[str, ...] = tuple(PARTS)


_WITHOUT_JUDGE = tuple(part for part in PARTS if part != "probes")  # none knows a random base's images
SIZES = {
    "pocket": Size("serving", lambda folder: "pocket", Scale()),
    "sd15": Size(
        "serving-gpu",
        lambda folder: write_random_base(folder / "base"),
        Scale(
            rows=64,
            concurrency=32,
            mixes=(1, 8, 32),
            slots=(32,),
            threads=(4,),
            call_rows=(1, 2, 4, 8, 16, 32, 64),
            stack_rows=(2, 16, 64),
            images=64,
            serial_images=4,
            arrivals=128,
        ),
        parts=_WITHOUT_JUDGE,
    ),
    "sdxl": Size(
        "serving-sdxl",
        lambda folder: write_random_base(folder / "base", "sdxl"),
        Scale(
            adapters=16,
            concurrency=16,
            mixes=(1, 16),
            slots=(16,),
            threads=(4,),
            call_rows=(1, 2, 4, 8, 16),
            stack_rows=(2, 8, 16),
            images=32,
            serial_images=4,
            arrivals=64,
        ),
        parts=_WITHOUT_JUDGE,
    ),
}


def run(
    start: Start,
    console: Console,
    only: Sequence[str] = (),
    size: str = "pocket",
    device: str = "auto",
    seconds: float = 60.0,
    *,
    compile: bool = False,
    threads: int | None = None,
    own_processes: bool = True,
    results: Path = RESULTS,
) -> Path:
    """Measure the named parts (none: all of the size), each for about `seconds`; keep what others said before.

    Raises SpecError for a device that is not there.
    """
    known, where = SIZES[size], choose_device(device)
    scale = replace(known.scale, threads=_threads(known.scale))
    if threads is not None:
        torch.set_num_threads(threads)
    path = results / f"{known.result}.json"
    with tempfile.TemporaryDirectory(prefix="cat-serving-") as place:
        base = known.base(Path(place))
        bench = open_workbench(Path(place), base, where, scale, seconds, compile=compile, own_processes=own_processes)
        for part in only or known.parts:
            console.print(f"{part} ...")
            found = measured(bench, part, start)
            before = (read_result(known.result, results) or {}).get("parts", {})
            ordered = {name: one for name in PARTS if (one := {**before, part: found}.get(name)) is not None}
            path = write_result(known.result, {"size": size, "parts": ordered}, start, results)
    return path


def measured(bench: Workbench, part: str, start: Start) -> dict[str, Any]:
    """Measure a part: what it found, with where and when, and how busy the machine was."""
    head = {
        **asdict(start),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "device": bench.device,
        "compiled": bench.compile,
        "seconds": bench.seconds,
    }
    before = os.getloadavg()[0]
    found = PARTS[part](bench)
    return {**head, "load_before": before, "load_after": os.getloadavg()[0], **found}


def _threads(scale: Scale) -> tuple[int, ...]:
    cores = os.cpu_count() or 1
    return tuple(dict.fromkeys(min(count, cores) for count in scale.threads))
