"""The runs of a storage: what became of each, and their ids alone."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import ValidationError

from cat_cluster.errors import ObjectNotFoundError
from cat_cluster.runs.progress import RunProgress
from cat_cluster.runs.run import RUN_ID, last_records
from cat_cluster.store import ObjectStore


def list_runs(store: ObjectStore) -> tuple[list[RunProgress], list[str]]:
    """Return the progress of each run of a store, newest first, and the ids of those whose record cannot be read."""
    runs, damaged = [], []
    for run_id, record in last_records(store, "runs/run-").items():
        try:
            runs.append(RunProgress.model_validate_json(store.get(record.key)))
        except ObjectNotFoundError:
            continue  # removed after it was listed
        except ValidationError:
            damaged.append(run_id)
    return sorted(runs, key=lambda run: (run.started, run.run_id), reverse=True), damaged


def run_ids(store: ObjectStore, after: str = "") -> Iterator[str]:
    """Yield the ids of a store's runs in their order, those behind the id `after`; the store is read as far as needed.

    A run costs what its objects take in a listing.
    """
    last = after
    for entry in store.entries("runs/run-", after=f"runs/{after}/~" if after else ""):
        run_id = entry.key.split("/")[1]
        if run_id != last and RUN_ID.fullmatch(run_id):
            last = run_id
            yield run_id
