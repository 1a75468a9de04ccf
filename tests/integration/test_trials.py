"""Trials of the study run through the real workflow, are kept, and are not trained twice."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from cat_cluster.errors import CatClusterError
from jobs.benchmark.record import Start
from jobs.benchmark.study.compare import compare
from jobs.benchmark.study.trials import Trial, TrialRunner, pocket_subject, starts_of

TRAINING = {"steps": 4, "rank": 2, "rows_per_concept": 1}
EVALUATION = {"images_per_prompt": 1, "steps": 2}
START = Start("2026-11-25T06:03:30+00:00", "3e808594ebfb", dirty=False)
LATER = Start("2026-11-26T06:03:30+00:00", "db7e22781cda", dirty=False)


def kept_files(folder: Path) -> dict[Path, int]:
    """When each kept trial was written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/measured/*")}


def test_trials_are_trained_measured_and_kept(tmp_path: Path) -> None:
    runner = TrialRunner(START, tmp_path, TRAINING, EVALUATION)
    trials = [Trial("lora", "lora"), Trial("cat", alpha=3.0, training={"teacher": "pool", "pool_size": 2})]
    subjects = [pocket_subject("striped-cup")]
    console = Console(stderr=True, quiet=True)
    first = runner.run(trials, subjects, [0], console)
    assert set(first) == {(trial.name, "striped-cup", 0) for trial in trials}
    kept = kept_files(tmp_path)
    assert len(kept) == 2
    again = TrialRunner(LATER, tmp_path, TRAINING, EVALUATION).run(trials, subjects, [0], console)
    assert kept_files(tmp_path) == kept
    assert starts_of(again.values()) == [asdict(START)], "what was read back says when it was trained"
    table = compare(again, [trial.name for trial in trials], subjects, [0], against="lora")
    assert set(table) == {"pocket", "pocket-classifier", "recognition", "prompts_followed"}
    assert table["pocket"]["cat"]["base_drift"]["estimate"] > 0
    assert table == compare(first, [trial.name for trial in trials], subjects, [0], against="lora")


def test_a_trial_that_fails_says_which(tmp_path: Path) -> None:
    runner = TrialRunner(START, tmp_path, TRAINING, EVALUATION)
    with pytest.raises(CatClusterError, match="wild-striped-cup-s0"):
        runner.run(
            [Trial("wild", training={"learning_rate": 1e30})], [pocket_subject("striped-cup")], [0], Console(quiet=True)
        )
