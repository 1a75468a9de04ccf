"""The processes that the measurements of a training service start: the service, a job alone, a batch job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cat_cluster.errors import CatClusterError
from cat_cluster.runs.listing import list_runs
from cat_cluster.runs.progress import RunProgress
from cat_cluster.runs.run import Run
from cat_cluster.store import ObjectStore, open_store

PATIENCE_SECONDS = 1800.0
_COMMAND = (sys.executable, "-W", "ignore", "-m")


@contextmanager
def training_service(folder: Path, *options: str) -> Iterator[ObjectStore]:
    """Run a training service of the pocket base as a user does, and give its storage; what it says goes to a file."""
    store = open_store(str(folder / "store"))
    command = [*_COMMAND, "cat_cluster.cli", "train-service", "--storage", store.url, "--base", "pocket", *options]
    with (folder / "service.log").open("w") as log, own_ray() as own:
        environment = {**os.environ, **own, "CAT_CACHE_DIR": str(folder / "cache")}
        service = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            yield store
        finally:
            service.terminate()
            service.wait(60)


@contextmanager
def alone(folder: Path) -> Iterator[Callable[[Path], dict[str, float]]]:
    """Start a process that trains and measures jobs by themselves, and give what times the job of a spec there."""
    command = [*_COMMAND, "jobs.benchmark.service.alone", str(folder / "store")]
    # Ray starts its workers with one OpenMP thread, and torch is told to have more; on a busy machine that matters.
    environment = {**os.environ, "CAT_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdin is not None
    assert process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def measure(spec: Path) -> dict[str, float]:
        requests.write(f"{spec}\n")
        requests.flush()
        line = answers.readline()
        if not line:
            raise CatClusterError(f"the job of {spec} by itself failed: see above")
        found: dict[str, float] = json.loads(line)
        return found

    try:
        yield measure
    finally:
        process.kill()
        process.wait()


def submit(spec: Path, store: ObjectStore) -> Run:
    """Submit a job to the queue of a storage as a user does."""
    command = [*_COMMAND, "cat_cluster.cli", "submit", str(spec), "--queue", "--storage", store.url, "--json"]
    return Run(store, json.loads(_checked(command).stdout)["run_id"])


def train(spec: Path, folder: Path) -> RunProgress:
    """Train a job as a user does, on a Ray that is started for it, and return its record; all must be published."""
    store = open_store(str(folder / "store"))
    command = [*_COMMAND, "cat_cluster.cli", "train", str(spec), "--storage", store.url]
    with own_ray() as own:
        _checked(command, **own, CAT_CACHE_DIR=str(folder / "cache"))
    return list_runs(store)[0][0]  # the newest


def await_end(run: Run) -> RunProgress:
    """Return the record of a run that has ended well."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not (progress := run.progress()).ended:
        if time.monotonic() > until:
            raise CatClusterError(f"{run.run_id} has not ended in {PATIENCE_SECONDS:.0f} s")
        time.sleep(0.1)
    if progress.state != "done":
        raise CatClusterError(f"{run.run_id} {progress.state}: {[one.reason for one in progress.adapters]}")
    return progress


@contextmanager
def own_ray() -> Iterator[dict[str, str]]:
    """Give the variables of a Ray of its own, whose workers are no nicer than the process that they are compared with.

    The path of its folder is short, as its sockets need it.
    """
    with tempfile.TemporaryDirectory(prefix="cat-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield {"RAY_TMPDIR": folder, "RAY_worker_niceness": "0"}


def _checked(command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode != 0:
        raise CatClusterError(f"{' '.join(command[4:6])} failed: {done.stderr[-2000:]}")
    return done
