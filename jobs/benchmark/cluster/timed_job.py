"""A job on its own Ray, its steps timed: `python -m jobs.benchmark.cluster.timed_job SPEC STORAGE` prints them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from cat_cluster.cluster.driver import run_on_ray
from cat_cluster.pipeline.job import AdapterResult
from cat_cluster.settings import load_settings
from cat_cluster.spec.job import load_spec
from cat_cluster.training.step_report import StepReport


class StepTimes:
    """A JobListener that keeps the seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def message(self, text: str) -> None:
        """Not kept."""

    def started(self, steps: Mapping[str, int], together: int) -> None:
        """Not kept."""

    def step(self, report: StepReport) -> None:
        """Keep a step's seconds."""
        self.seconds.append(report.seconds)

    def images(self, adapter_id: str, done: int, total: int) -> None:
        """Not kept."""

    def finished(self, result: AdapterResult) -> None:
        """Not kept."""


if __name__ == "__main__":
    times = StepTimes()
    run_on_ray(load_spec(Path(sys.argv[1])), sys.argv[2], load_settings(), times)
    sys.stdout.write(json.dumps(times.seconds) + "\n")
