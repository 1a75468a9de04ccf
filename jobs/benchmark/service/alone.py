"""Jobs in one warm process, timed: `python -m jobs.benchmark.service.alone STORAGE` reads the path of a spec per line.

For each it prints a line of JSON: the seconds of the adapter's bare steps, and of measuring and publishing it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

from cat_cluster.evaluation.evaluate import EvaluationMemory
from cat_cluster.pipeline.job import finish_adapter, train_adapters
from cat_cluster.pipeline.prepare import Preparation
from cat_cluster.registry import Registry
from cat_cluster.settings import load_settings
from cat_cluster.spec.job import load_spec
from cat_cluster.store import ObjectStore, open_store

THREADS = os.cpu_count() or 1  # as a group has that is alone on the machine


class Alone:
    """Trains and measures adapters one after the other, with what it has loaded and found for those before."""

    def __init__(self, store: ObjectStore) -> None:
        self._store, self._settings = store, load_settings()
        self._preparation, self._memory = Preparation(self._settings), EvaluationMemory()

    def time(self, spec: Path) -> dict[str, float]:
        """Return the seconds of the only adapter of a spec; its threads are those it has in a service of its own."""
        job, registry = load_spec(spec), Registry(self._store)
        adapter = self._preparation.adapter(job.resolved()[0], registry)
        steps: list[float] = []
        torch.set_num_threads(THREADS)
        [trained] = train_adapters(
            [adapter], job, self._store, self._settings, on_step=lambda report: steps.append(report.seconds)
        )
        torch.set_num_threads(1)  # as a task has that measures
        started = time.perf_counter()
        result = finish_adapter(adapter, trained, registry, sum(steps), lambda *_: None, self._memory)
        if result.outcome != "published":
            raise SystemExit(f"{spec}: {result.outcome}: {result.reason}")
        return {"steps_s": sum(steps), "evaluation_s": time.perf_counter() - started}


if __name__ == "__main__":
    alone = Alone(open_store(sys.argv[1]))
    for line in sys.stdin:
        sys.stdout.write(json.dumps(alone.time(Path(line.strip()))) + "\n")
        sys.stdout.flush()
