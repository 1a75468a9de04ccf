"""A training service on a real Ray: runs come in while others train, one of them bad, and one is stopped."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cat_cluster.pipeline.job import run_job
from cat_cluster.runs.entering import enter_run
from cat_cluster.runs.progress import RunProgress
from cat_cluster.runs.run import Run
from cat_cluster.settings import Settings
from cat_cluster.spec.job import load_spec
from cat_cluster.store import LocalStore
from tests.support.tiny_jobs import (
    CommandLine,
    adapter,
    published_weights,
    relative_change,
    start_process,
    write_photos,
    write_spec,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

LAW = 1e-3
START_SECONDS = END_SECONDS = 120
LONG = 100_000  # steps


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """A folder for Ray, not one of pytest's: the paths of its sockets must stay under 108 characters."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def await_progress(run: Run, *states: str, step: int = 0) -> RunProgress:
    """Wait until a run is in one of the states, and its first adapter at a step."""
    deadline = time.monotonic() + END_SECONDS
    while (progress := run.progress()).state not in states or progress.adapters[0].step < step:
        assert time.monotonic() < deadline, progress
        time.sleep(0.2)
    return progress


def test_runs_that_come_in_join_those_that_train(
    tmp_path: Path, tiny_base_folder: Path, ray_folder: Path, command: CommandLine
) -> None:
    for seed, name in enumerate(("cup", "mug", "jar", "vase")):
        write_photos(tmp_path / name, seed=seed)
    training = {"learning_rate": 0.005, "steps": 30}

    def spec(name: str, *adapters: dict[str, object]) -> Path:
        return write_spec(tmp_path / f"{name}.yaml", tiny_base_folder, list(adapters), training=training)

    cup, mug = adapter("cup", tmp_path / "cup"), adapter("mug", tmp_path / "mug", training={"rank": 3, "seed": 4})
    good, mixed = spec("good", cup), spec("mixed", mug, adapter("jar", tmp_path / "jar"))
    endless = spec("endless", adapter("vase", tmp_path / "vase", training={"steps": LONG}))
    store = LocalStore(tmp_path / "store")
    service = start_process(
        "train-service", "--storage", store.url, "--base", str(tiny_base_folder), RAY_TMPDIR=str(ray_folder)
    )
    try:
        never, _ = enter_run(load_spec(endless), store, owner="ann")
        await_progress(never, "running", step=1)
        bad, _ = enter_run(load_spec(mixed), store, owner="bob")
        (tmp_path / "jar" / "1.png").write_bytes(b"no image any more")
        queued = command("submit", good, "--queue", "--storage", store.url, "--json")
        assert queued.code == 0, queued.err
        one = Run(store, queued.json()["run_id"])
        assert await_progress(one, "done", "failed").state == "done"
        mixed_progress = await_progress(bad, "done", "failed")
        assert never.progress().state == "running", "they trained beside it"
        assert command("jobs", "stop", never.run_id, "--storage", store.url).code == 0
        await_progress(never, "stopped")
        again = command("submit", good, "--queue", "--storage", store.url, "--wait", "--json")
        assert (again.code, again.json()["state"]) == (0, "done")
    finally:
        service.terminate()
        _, said = service.communicate(timeout=60)
    assert service.returncode == 0, said
    assert "Traceback" not in said
    assert [mixed_progress.adapter(name).state for name in ("mug", "jar")] == ["published", "failed"]
    assert "1.png: is not a readable image" in (mixed_progress.adapter("jar").reason or "")
    assert store.list("queue/") == []
    assert [key for key in store.list("checkpoints/") if "/vase/" not in key] == []
    local = LocalStore(tmp_path / "local")
    alone = write_spec(tmp_path / "alone.yaml", tiny_base_folder, [cup, mug], training=training)
    run_job(load_spec(alone), local, Settings(device="cpu"))
    for name in ("cup", "mug"):
        ours, theirs = (published_weights(tmp_path / place, name) for place in ("store", "local"))
        assert relative_change(ours, theirs) <= LAW
    assert json.loads(store.get(f"runs/{one.run_id}/queued.json"))["entry"].endswith(f"{one.run_id}.json")
