"""Following a run that has not started yet: it is waited for, and not for ever."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cat_cluster.cli.jobs import jobs_app
from cat_cluster.cluster import follow
from cat_cluster.cluster.follow import RayCarrier, follow_run, wait_for_start
from cat_cluster.cluster.kuberay.rendering.render import RenderOptions, expectation_of
from cat_cluster.cluster.ray_jobs import RayCluster
from cat_cluster.errors import RunError, StoreError
from cat_cluster.runs.progress import RunProgress
from cat_cluster.runs.run import Expectation, Run
from cat_cluster.spec.job import JobSpec
from cat_cluster.store import LocalStore

RUN_ID = "run-0123456789ab"
EXPECTED = Expectation(job="RayJob tea in namespace cats", look="`kubectl -n cats describe rayjob tea`", seconds=60)


class Seen:
    """A Watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.states: list[str] = []

    def show(self, progress: RunProgress) -> None:
        self.states.append(progress.state)

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.02)
    return Run(LocalStore(tmp_path), RUN_ID)


def record(state: Any, attempt: int = 1) -> RunProgress:
    concept = {"token": "sks", "class_noun": "cup", "images": "s3://bucket/cups"}
    job = JobSpec.model_validate({"name": "tea", "adapters": [{"id": "cup", "concepts": [concept]}]})
    return RunProgress.begin(RUN_ID, job, state=state, attempt=attempt)


def written_soon(run: Run, progress: RunProgress) -> threading.Timer:
    timer = threading.Timer(0.3, run.write_progress, [progress])
    timer.start()
    return timer


def test_a_run_that_a_job_will_start_is_waited_for(run: Run) -> None:
    run.expect(EXPECTED)
    written_soon(run, record("done"))
    seen = Seen()
    assert follow_run(run, seen).state == "done"
    (message,) = seen.messages
    assert "waiting for RayJob tea in namespace cats to start" in message
    assert "kubectl -n cats describe rayjob tea" in message


def test_whoever_waits_for_a_run_in_the_queue_hears_what_works_on_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "QUEUE_SECONDS", 0.1)
    run.write_progress(record("waiting"))
    run.store.put(run.key("queued.json"), b"{}")
    written_soon(run, record("done"))
    seen = Seen()
    assert follow_run(run, seen).state == "done"
    (message,) = seen.messages
    assert f"cat-cluster train-service --storage {run.store.url}" in message


def test_the_wait_ends_when_the_job_can_start_no_more(run: Run) -> None:
    run.expect(EXPECTED.model_copy(update={"seconds": 0.2}))
    began = time.monotonic()
    with pytest.raises(RunError, match=r"RayJob tea in namespace cats can start no more.*describe rayjob"):
        follow_run(run, Seen())
    assert 0.2 <= time.monotonic() - began < 10


def test_a_run_that_nothing_will_start_is_none(run: Run) -> None:
    with pytest.raises(RunError, match="no run run-0123456789ab"):
        follow_run(run, Seen())
    run.store.put(run.key("expected.json"), b"{")
    with pytest.raises(RunError, match="no run run-0123456789ab"):
        follow_run(run, Seen())


def test_an_attempt_that_failed_before_is_not_the_one_that_is_waited_for(run: Run) -> None:
    run.write_progress(record("failed", attempt=2))
    run.expect(EXPECTED.model_copy(update={"after": 2}))
    written_soon(run, record("done", attempt=3))
    seen = Seen()
    assert follow_run(run, seen).attempt == 3
    assert seen.states == ["done"]


@pytest.mark.parametrize(("state", "after"), [("done", 1), ("running", 1), ("failed", 0)])
def test_a_run_that_is_done_or_going_is_shown_at_once(state: str, after: int, run: Run) -> None:
    run.write_progress(record(state))
    run.expect(EXPECTED.model_copy(update={"after": after}))
    seen = Seen()
    wait_for_start(run, seen)
    assert seen.messages == []


def test_a_store_that_is_away_is_asked_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.expect(EXPECTED)
    real, answers = LocalStore.get, iter([StoreError("the store is away")] * 3)

    def get(self: LocalStore, key: str) -> bytes:
        if error := next(answers, None):
            raise error
        return real(self, key)

    monkeypatch.setattr(LocalStore, "get", get)
    written_soon(run, record("done"))
    seen = Seen()
    assert follow_run(run, seen).state == "done"
    assert seen.messages[0] == "the store is away; trying again"
    assert len(seen.messages) == 2


def test_a_silent_run_of_which_the_cluster_has_no_job_is_said_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = iter(range(3))

    def last_job_status(*_: object) -> str | None:
        if next(asked, None) is not None:
            return None
        run.write_progress(record("done"))
        return "SUCCEEDED"

    monkeypatch.setattr(follow, "ASK_SECONDS", 0)
    monkeypatch.setattr(follow, "is_alive", lambda progress: False)
    monkeypatch.setattr(follow, "last_job_status", last_job_status)
    run.write_progress(record("running"))
    seen = Seen()
    assert follow_run(run, seen, RayCarrier(run, RayCluster("http://127.0.0.1:8265"))).state == "done"
    (message,) = seen.messages
    assert "the Ray cluster at http://127.0.0.1:8265 has no job of it: submit it again, or press Ctrl+C" in message


def test_the_wait_is_reminded_of(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "REMIND_SECONDS", 0.1)
    run.expect(EXPECTED)
    written_soon(run, record("done"))
    seen = Seen()
    follow_run(run, seen)
    assert len(seen.messages) > 1
    assert "min so far" in seen.messages[-1]


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        (RenderOptions(), 3 * 3600 + 600),
        (RenderOptions(hours=1), 3600 + 600),
        (RenderOptions(suspend=True), None),
        (RenderOptions(queue="cats"), None),
    ],
)
def test_how_long_a_rendered_job_may_take_to_start(options: RenderOptions, seconds: float | None) -> None:
    expected = expectation_of({"metadata": {"name": "tea"}}, options, after=2)
    assert (expected.seconds, expected.after) == (seconds, 2)
    assert expected.job == "RayJob tea in namespace cat-cluster"


def test_the_command_says_what_a_run_waits_for(run: Run, tmp_path: Path) -> None:
    run.expect(EXPECTED.model_copy(update={"seconds": 0.1}))
    storage = ["--storage", str(tmp_path)]
    runner = CliRunner()
    shown = runner.invoke(jobs_app, ["status", RUN_ID, *storage])
    assert isinstance(shown.exception, RunError)
    assert "has not started: it waits for RayJob tea" in str(shown.exception)
    waited = runner.invoke(jobs_app, ["status", RUN_ID, "--wait", *storage])
    assert isinstance(waited.exception, RunError)
    assert "can start no more" in str(waited.exception)
    assert "waiting for RayJob tea" in waited.stderr
