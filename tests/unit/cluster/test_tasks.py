"""How the tasks beside the training are started, and what one does that is given up; the rest needs a real Ray."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cat_cluster.cluster import tasks
from cat_cluster.cluster.messages import OrderedAdapter
from cat_cluster.pipeline.job import train_adapters
from cat_cluster.pipeline.prepare import prepare
from cat_cluster.registry import Registry
from cat_cluster.runs.progress import RunProgress
from cat_cluster.runs.run import Run
from cat_cluster.settings import Settings
from cat_cluster.spec.job import load_spec
from cat_cluster.store import LocalStore
from cat_cluster.telemetry import PrometheusBackend
from tests.support.tiny_jobs import adapter, write_photos, write_spec


def test_ray_tries_no_task_again_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that it may try again it starts without end when memory runs out."""
    given: list[dict[str, Any]] = []

    def options(**named: Any) -> Any:
        given.append(named)
        return SimpleNamespace(remote=lambda *_: 3)

    monkeypatch.setattr(tasks.ray, "remote", lambda _: SimpleNamespace(options=options))
    monkeypatch.setattr(tasks.ray, "get", lambda size: size)
    adapter: Any = SimpleNamespace(resolved=SimpleNamespace(id="cup"), revision="r-0123456789ab")
    assert tasks.pack_size_on_ray([adapter, adapter], "auto", on_gpus=True, side_by_side=1) == 3
    messages: Any = None
    work: Any = SimpleNamespace(adapter_id="cup", ordered=lambda: None)
    tasks.evaluate_on_ray(work, storage="file:///s", seconds=1.0, messages=messages, on_gpus=False)
    assert [(one["max_retries"], one["num_gpus"]) for one in given] == [(0, 1), (0, 0)]


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_a_run_that_is_said_to_be_stopped_publishes_nothing_more(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch, state: Any
) -> None:
    """The interrupt that ends a measuring task may reach it late, as in a long call of torch."""
    monkeypatch.setenv("CAT_DEVICE", "cpu")
    store = LocalStore(tmp_path / "store")
    photos = write_photos(tmp_path / "cup")
    job = load_spec(write_spec(tmp_path / "job.yaml", tiny_base_folder, [adapter("cup", photos)]))
    run = Run(store, "run-0123456789ab")
    attempt = run.claim()
    [one] = prepare(job, Settings(device="cpu"), Registry(store))
    train_adapters([one], job, store, Settings(device="cpu"), on_step=lambda _: None)
    run.request_stop(attempt.number)
    run.write_progress(RunProgress.begin(run.run_id, job, state=state, attempt=attempt.number))
    ordered = OrderedAdapter("cup", one.resolved, one.revision, run.run_id, attempt.number, job.monitoring)
    before = store.list("")
    messages: Any = None
    monkeypatch.setattr(tasks, "RayBackend", PrometheusBackend)
    result = tasks._evaluate(ordered, store.url, 1.0, messages)
    if state == "running":
        assert result.outcome == "published"
    else:
        assert (result.outcome, store.list("")) == ("failed", before)
        assert "attempt 1 of run-0123456789ab is stopped" in (result.reason or "")
