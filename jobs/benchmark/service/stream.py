"""A stream of concepts, each with its own number of steps, into a training service and into batch jobs."""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from cat_cluster.runs.entering import enter_run
from cat_cluster.runs.progress import AdapterProgress
from cat_cluster.spec.job import load_spec
from cat_cluster.store import ObjectStore
from jobs.benchmark.cluster.measure import write_spec
from jobs.benchmark.service.processes import await_end, train, training_service

SLOTS, LOAD, ROWS, SEED = 4, 0.8, 1, 7
SHARED: dict[str, Any] = {"evaluation": {"enabled": False}}


@dataclass(frozen=True)
class Arrival:
    """A concept that comes in `at` seconds after the first."""

    number: int
    at: float
    steps: int

    def sections(self) -> dict[str, Any]:
        """Return the sections of its spec."""
        return {**SHARED, "training": {"steps": self.steps, "rows_per_concept": ROWS}}


@dataclass(frozen=True)
class Served:
    """When a concept came in, had its first step and was published, in Unix time; and its job's number."""

    came: float
    began: float
    ended: float
    job: int

    @property
    def seconds(self) -> float:
        """The time to its adapter."""
        return self.ended - self.came


def measure_stream(console: Console, concepts: int, steps: tuple[int, int]) -> dict[str, Any]:
    """Send a stream to a warm service, then the same one to batch jobs, each of all that have come in meanwhile."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with training_service(folder, "--max-pack", str(SLOTS)) as store:
            step_s = _full_step(folder / "full", store, sum(steps) // 2)
            arrivals = poisson(concepts, steps, step_s)
            console.print({"full_step_s": step_s, "last_arrival_s": arrivals[-1].at})
            service = through_service(arrivals, folder / "service", store)
        console.print(summary(service))
        batches = through_batches(arrivals, folder / "batches", console)
    result = {"service": summary(service), "batches": summary(batches)}
    return {
        "concepts": concepts,
        "steps": list(steps),
        "slots": SLOTS,
        "rows_per_concept": ROWS,
        "load": LOAD,
        "full_step_s": step_s,
        **result,
        "throughput_ratio": result["service"]["per_hour"] / result["batches"]["per_hour"],
        "p95_ratio": result["service"]["p95_s"] / result["batches"]["p95_s"],
        "arrivals": [[one.at, one.steps] for one in arrivals],
    }


def poisson(concepts: int, steps: tuple[int, int], step_s: float) -> list[Arrival]:
    """Return arrivals of LOAD times what SLOTS adapters of a full pack, whose step takes step_s, get through."""
    draw = random.Random(SEED)
    own = [draw.randint(*steps) for _ in range(concepts)]
    rate = LOAD * SLOTS / (step_s * sum(own) / len(own))
    gaps = [0.0, *(draw.expovariate(rate) for _ in own[1:])]
    return [Arrival(number, sum(gaps[: number + 1]), count) for number, count in enumerate(own)]


def through_service(arrivals: Sequence[Arrival], folder: Path, store: ObjectStore) -> list[Served]:
    """Enter each concept as a run of its own when it comes in, and return how each was served."""
    specs = [write_spec(folder / str(one.number), 1, first=one.number, **one.sections()) for one in arrivals]
    jobs, began = [load_spec(spec) for spec in specs], time.time()
    runs = []
    for one, job in zip(arrivals, jobs, strict=True):
        time.sleep(max(0.0, began + one.at - time.time()))
        runs.append(enter_run(job, store, owner="benchmark")[0])
    ends = [await_end(run).adapters[0] for run in runs]
    return [_served(began + one.at, end, one.number) for one, end in zip(arrivals, ends, strict=True)]


def through_batches(arrivals: Sequence[Arrival], folder: Path, console: Console) -> list[Served]:
    """Train all that have come in as one job, again and again; a Ray is started for each job."""
    specs = [write_spec(folder / str(one.number), 1, first=one.number, **one.sections()) for one in arrivals]
    began = time.time()
    served: list[Served] = []
    for number in range(len(arrivals)):
        if len(served) == len(arrivals):
            break
        time.sleep(max(0.0, began + arrivals[len(served)].at - time.time()))
        batch = [one for one in arrivals[len(served) :] if began + one.at <= time.time()]
        spec = merged([specs[one.number] for one in batch], folder / f"batch-{number}.yaml")
        progress = train(spec, folder)
        ends = [progress.adapter(f"concept-{one.number}") for one in batch]
        served += [_served(began + one.at, end, number) for one, end in zip(batch, ends, strict=True)]
        console.print(f"batch {number}: {len(batch)} concepts")
    return served


def summary(served: Sequence[Served]) -> dict[str, Any]:
    """Return the figures of a stream: throughput, times to an adapter, and how far the slots were occupied.

    occupied: the share of slot seconds from the first arrival to the last end; while_waiting: the same over the moments
    in which some adapter had come in and not begun, None where there were none.
    """
    first, last = min(one.came for one in served), max(one.ended for one in served)
    times = sorted(one.seconds for one in served)
    moments = sorted({moment for one in served for moment in (one.came, one.began, one.ended)})
    spans = [
        (
            end - start,
            sum(one.began <= start < one.ended for one in served) / SLOTS,
            any(one.came <= start < one.began for one in served),
        )
        for start, end in pairwise(moments)
    ]
    waiting = [(span, share) for span, share, waits in spans if waits]
    return {
        "seconds": last - first,
        "per_hour": 3600 * len(served) / (last - first),
        "median_s": times[len(times) // 2],
        "p95_s": times[math.ceil(0.95 * len(times)) - 1],
        "jobs": len({one.job for one in served}),
        "occupied": _share([(span, share) for span, share, _ in spans]),
        "while_waiting": _share(waiting) if waiting else None,
        "waiting_s": sum(span for span, _ in waiting),
    }


def _share(spans: Sequence[tuple[float, float]]) -> float:
    return sum(span * share for span, share in spans) / sum(span for span, _ in spans)


def _full_step(folder: Path, store: ObjectStore, steps: int) -> float:
    """Return the seconds of a step of SLOTS adapters, after one that warms the service up."""
    _train_together(folder / "warm", store, Arrival(900, 0.0, 10), 1)
    full = _train_together(folder / "pack", store, Arrival(901, 0.0, steps), SLOTS)
    return (max(one.ended for one in full) - min(one.began for one in full)) / (steps - 1)


def _train_together(folder: Path, store: ObjectStore, one: Arrival, concepts: int) -> list[Served]:
    job = load_spec(write_spec(folder, concepts, first=one.number, **one.sections()))
    run, _ = enter_run(job, store, owner="benchmark")
    return [_served(0.0, adapter, 0) for adapter in await_end(run).adapters]


def merged(specs: Sequence[Path], path: Path) -> Path:
    """Write the job that has the adapters of all the specs, each with its own training."""
    jobs = [yaml.safe_load(spec.read_text()) for spec in specs]
    adapters = [{**job["adapters"][0], "training": job["training"]} for job in jobs]
    cluster = {"workers": 1, "max_pack": SLOTS}
    path.write_text(yaml.safe_dump({"name": "benchmark", "adapters": adapters, "cluster": cluster, **SHARED}))
    return path


def _served(came: float, adapter: AdapterProgress, job: int) -> Served:
    assert adapter.first_step is not None
    assert adapter.ended is not None
    began, ended = (datetime.fromisoformat(moment).astimezone(UTC) for moment in (adapter.first_step, adapter.ended))
    return Served(came, began.timestamp(), ended.timestamp(), job)
