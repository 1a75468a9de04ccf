"""How soon a warm service begins with a job, and how long until it is published, beside its bare work."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from cat_cluster.store import ObjectStore
from jobs.benchmark.cluster.measure import write_spec
from jobs.benchmark.service.processes import alone, await_end, submit, training_service

EVALUATION = {"images_per_prompt": 1, "steps": 10, "prompts": ["a photo of a {}", "a photo of a {} on grass"]}
WARM_STEPS = 10
MAX_PACK = "4"


def measure_latency(console: Console, submissions: int, steps: int) -> dict[str, Any]:
    """Submit jobs one after the other, short ones, and do each one's bare work right after it, in a warm process."""
    sections = {"training": {"steps": steps}, "evaluation": EVALUATION}
    turns = _turns(console, [sections] * submissions)
    return {"steps": steps, "evaluation": EVALUATION, **_medians(turns), "submissions": turns}


def measure_defaults(console: Console) -> dict[str, Any]:
    """The same for one job at the defaults of the spec."""
    turns = _turns(console, [{}])
    return {**_medians(turns), "submissions": turns}


def _turns(console: Console, jobs: list[dict[str, Any]]) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with training_service(folder, "--max-pack", MAX_PACK) as store, alone(folder / "alone") as measure:
            warm = {"training": {"steps": WARM_STEPS}, "evaluation": EVALUATION}
            found = []
            for number, sections in enumerate([warm, *jobs]):
                spec = write_spec(folder / f"job-{number}", 1, first=number, **sections)
                found.append(_turn(spec, store, measure))
                console.print(found[-1])
    return found[1:]


def _turn(spec: Path, store: ObjectStore, measure: Callable[[Path], Mapping[str, float]]) -> dict[str, float]:
    started = datetime.now(UTC)
    run = submit(spec, store)
    submitted = datetime.now(UTC)
    [adapter] = await_end(run).adapters
    assert adapter.first_step is not None
    assert adapter.ended is not None
    bare = measure(spec)
    published = (datetime.fromisoformat(adapter.ended) - started).total_seconds()
    return {
        "submit_s": (submitted - started).total_seconds(),
        "first_step_s": (datetime.fromisoformat(adapter.first_step) - started).total_seconds(),
        "published_s": published,
        **bare,
        "to_bare": published / sum(bare.values()),
        "beyond_s": published - sum(bare.values()),
    }


def _medians(turns: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
