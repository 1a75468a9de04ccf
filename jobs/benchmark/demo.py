"""The figures of `make demo` as a result file, which the README's table is held to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from cat_cluster.cli.demo import run_demo
from cat_cluster.cli.job_bars import JobBars
from cat_cluster.evaluation.results import Evaluation
from cat_cluster.settings import load_settings
from jobs.benchmark.record import Start, write_result


def run(start: Start, folder: Path, console: Console) -> Path:
    """Run the demo into `folder`, or read back what it published there, and write its figures."""
    with JobBars(console) as bars:
        result = run_demo(folder, load_settings(), bars)
    return write_result("demo", {"methods": {"lora": _figures(result.lora), "cat": _figures(result.cat)}}, start)


def _figures(evaluation: Evaluation) -> dict[str, Any]:
    """The scores of every judge with what a decoy word brings, and the shares of recognised images."""
    recognition = evaluation.to_json()["recognition"]
    judges = {
        judge.name: {
            "metrics": judge.metrics,
            "intervals": {metric: found.ends() for metric, found in judge.intervals.items()},
            "decoy_gain": judge.leaks.decoy_gain,
        }
        for judge in evaluation.judges
    }
    return {"judges": judges, "recognition": {name: recognition[name] for name in ("rate", "rate_without_token")}}
