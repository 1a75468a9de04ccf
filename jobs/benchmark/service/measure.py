"""The parts that a training service is measured by, and their result files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.benchmark.record import Start, write_result
from jobs.benchmark.service.latency import measure_defaults, measure_latency
from jobs.benchmark.service.stream import measure_stream


def run(
    start: Start,
    console: Console,
    parts: Sequence[str],
    *,
    submissions: int,
    steps: int,
    concepts: int,
    stream_steps: tuple[int, int],
) -> list[Path]:
    """Measure the parts and write a result file for each."""
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "latency": lambda: measure_latency(console, submissions, steps),
        "defaults": lambda: measure_defaults(console),
        "stream": lambda: measure_stream(console, concepts, stream_steps),
    }
    paths = []
    for part in parts:
        console.print(f"measuring {part}")
        paths.append(write_result(f"service-{part}", measures[part](), start))
    return paths
