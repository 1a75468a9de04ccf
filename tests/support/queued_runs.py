"""Runs for tests of the queue: a small job, and entries written in a moment."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cat_cluster.runs.progress import RunProgress, RunState
from cat_cluster.runs.queue import QueueEntry
from cat_cluster.runs.run import Run
from cat_cluster.spec.job import JobSpec

NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)


def small_job(**changes: Any) -> JobSpec:
    """A job of two adapters, with other fields where they are given."""
    concepts = [{"token": "sks", "class_noun": "cup", "images": "photos"}]
    adapters = [{"id": "cup", "concepts": concepts}, {"id": "tea", "concepts": concepts, "training": {"rank": 4}}]
    return JobSpec.model_validate({"name": "spring", "adapters": adapters, "training": {"steps": 9}, **changes})


def record(run: Run, attempt: int, state: RunState) -> None:
    """Write the record of an attempt as its driver does."""
    run.write_progress(RunProgress.begin(run.run_id, small_job(), state=state, attempt=attempt))


def entry_of(number: int, **changes: Any) -> QueueEntry:
    """The entry of a run that is named by the number and was submitted that many milliseconds after NOON."""
    fields: dict[str, Any] = {
        "run_id": f"run-{number:012x}",
        "name": "spring",
        "owner": "ann",
        "submitted": NOON + timedelta(milliseconds=number),
        "adapters": 2,
    }
    return QueueEntry(**fields | changes)


def fill_queue(folder: Path, entries: Iterable[QueueEntry]) -> None:
    """Write entries into the folder of a store, not synced to disk as a store does it."""
    for entry in entries:
        path = folder / entry.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(entry.model_dump_json().encode())
