"""Following a run that a RayJob carries out: its states and obstacles in words, its tries, and its end."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from cat_cluster.cluster import follow
from cat_cluster.cluster.follow import follow_run
from cat_cluster.cluster.kuberay import followed_job
from cat_cluster.cluster.kuberay.client.api import Api
from cat_cluster.cluster.kuberay.followed_job import FollowedJob
from cat_cluster.cluster.kuberay.obstacles.obstacles import Obstacle
from cat_cluster.errors import KubernetesError, RunError
from cat_cluster.runs.progress import RunProgress
from cat_cluster.runs.run import Expectation, Run
from cat_cluster.spec.job import JobSpec
from cat_cluster.store import LocalStore
from tests.support.api_server import ApiServer, made
from tests.support.recorded_jobs import put_recorded

RUN_ID = "run-0123456789ab"
EXPECTED = Expectation(job="RayJob tea in namespace cats", look="`kubectl describe`")
SLOW = Obstacle("Pod tea-worker", "waits for a machine with a GPU; it may take minutes", final=False)
FINAL = Obstacle("Pod tea-head", "its image cat:9 is not there; push it", final=True)


class Seen:
    """A Watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.states: list[tuple[str, int]] = []

    def show(self, progress: RunProgress) -> None:
        if not self.states or self.states[-1] != (progress.state, progress.attempt):
            self.states.append((progress.state, progress.attempt))

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(follow, "ASK_SECONDS", 0)
    return Run(LocalStore(tmp_path), RUN_ID)


@pytest.fixture
def obstacles(monkeypatch: pytest.MonkeyPatch) -> list[Obstacle]:
    found: list[Obstacle] = []
    monkeypatch.setattr(followed_job, "job_obstacles", lambda api, name: list(found))
    return found


def record(state: Any, attempt: int = 1, **changes: Any) -> RunProgress:
    concept = {"token": "sks", "class_noun": "cup", "images": "s3://bucket/cups"}
    job = JobSpec.model_validate({"name": "tea", "adapters": [{"id": "cup", "concepts": [concept]}]})
    return RunProgress.begin(RUN_ID, job, state=state, attempt=attempt).changed(**changes)


def followed(run: Run, api: Api, seen: Seen) -> RunProgress:
    return follow_run(run, seen, FollowedJob(api, "tea", run, seen))


def later(*steps: Any) -> None:
    """Call the steps one after the other, 50 ms apart."""
    first, *rest = steps

    def call() -> None:
        first()
        if rest:
            later(*rest)

    threading.Timer(0.05, call).start()


def set_state(server: ApiServer, state: str = "Initializing", **status: str) -> None:
    server.put(made("RayJob", "tea", status={"jobDeploymentStatus": state, **status}))


def test_what_a_job_waits_for_is_said_once(run: Run, obstacles: list[Obstacle], api: Api, server: ApiServer) -> None:
    run.expect(EXPECTED)
    obstacles.append(SLOW)
    set_state(server)
    seen = Seen()
    later(lambda: set_state(server, "Running"), lambda: run.write_progress(record("done")))
    assert followed(run, api, seen).state == "done"
    assert seen.messages[1:] == [
        "RayJob tea: its Ray cluster is being made",
        "Pod tea-worker: waits for a machine with a GPU; it may take minutes",
        "RayJob tea: its Ray cluster is there",
    ]


def test_what_waiting_cannot_help_ends_the_wait(
    run: Run, obstacles: list[Obstacle], api: Api, server: ApiServer
) -> None:
    run.expect(EXPECTED)
    obstacles.append(FINAL)
    set_state(server)
    with pytest.raises(RunError, match=r"Pod tea-head: its image cat:9 is not there.*`cat-cluster k8s stop tea"):
        followed(run, api, Seen())
    assert server.objects  # the job is left for people to look at


def test_a_driver_at_work_is_waited_for_all_the_same(
    run: Run, obstacles: list[Obstacle], api: Api, server: ApiServer
) -> None:
    run.write_progress(record("running"))
    obstacles.append(FINAL)
    set_state(server, "Running")
    seen = Seen()
    later(lambda: run.write_progress(record("done")))
    assert followed(run, api, seen).state == "done"
    assert "Pod tea-head: its image cat:9 is not there; push it" in seen.messages


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (
            {"state": "Failed", "reason": "DeadlineExceeded", "message": "took too long"},
            r"\(DeadlineExceeded: took too",
        ),
        ({"state": "ValidationFailed", "message": "no such field"}, r"ended as ValidationFailed \(no such field\)"),
        ({"state": "Complete"}, "ended as Complete, without a word from its driver"),
        (None, "RayJob tea is gone: somebody has deleted it"),
    ],
)
def test_a_job_that_ended_without_a_word_is_an_error(
    status: Any, said: str, run: Run, api: Api, server: ApiServer
) -> None:
    run.expect(EXPECTED)
    if status is not None:
        set_state(server, **status)
    with pytest.raises(RunError, match=said):
        followed(run, api, Seen())


def test_an_end_without_a_word_says_what_was_killed_for_memory(run: Run, api: Api, server: ApiServer) -> None:
    run.expect(EXPECTED)
    put_recorded(server, "oom")
    server.objects["rayjobs", "cat-cluster", "oom"]["status"]["jobDeploymentStatus"] = "Failed"
    with pytest.raises(
        RunError, match=r"a word from its driver; Pod oom-\S+: .* killed for memory 5 times, .* had 16Mi"
    ):
        follow_run(run, Seen(), FollowedJob(api, "oom", run, Seen()))


def test_a_silent_driver_whose_job_has_ended_is_an_error(run: Run, api: Api, server: ApiServer) -> None:
    run.write_progress(record("running", updated="2026-01-01T00:00:00+00:00"))
    set_state(server, "Failed")
    with pytest.raises(RunError, match="has ended as Failed"):
        followed(run, api, Seen())


def test_a_try_that_failed_is_followed_by_the_next(run: Run, api: Api, server: ApiServer) -> None:
    run.write_progress(record("failed"))
    set_state(server, "Running")
    seen = Seen()
    later(lambda: set_state(server, "Retrying"), lambda: run.write_progress(record("done", attempt=2)))
    assert followed(run, api, seen).attempt == 2
    assert seen.states == [("failed", 1), ("done", 2)]
    assert "RayJob tea: a try has failed, and another cluster is made for the next" in seen.messages


def test_the_last_try_and_what_failed_for_good_end_it(run: Run, api: Api, server: ApiServer) -> None:
    run.write_progress(record("failed"))
    set_state(server, "Running")
    later(lambda: set_state(server, "Failed"))
    assert followed(run, api, Seen()).state == "failed"
    set_state(server, "Running")
    run.write_progress(record("failed", permanent=True))
    assert followed(run, api, Seen()).permanent
    run.write_progress(record("stopped"))
    assert followed(run, api, Seen()).state == "stopped"


def test_a_suspended_job_says_what_starts_it(run: Run, api: Api, server: ApiServer) -> None:
    seen, queued = Seen(), Seen()
    job = made("RayJob", "tea", spec={"suspend": True}, status={"jobDeploymentStatus": "Suspended"})
    server.put(job)
    FollowedJob(api, "tea", run, seen).check(None)
    job["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "cats"}
    workload = made("Workload", "rayjob-tea", spec={"queueName": "cats"})
    workload["metadata"]["ownerReferences"] = [{"uid": job["metadata"]["uid"]}]
    server.put(workload)
    FollowedJob(api, "tea", run, queued).check(None)
    (suspended,), (waiting,) = seen.messages, queued.messages
    assert suspended.startswith("RayJob tea: is suspended; `kubectl -n cat-cluster patch rayjob tea --type merge")
    assert suspended.endswith("or submitting it again starts it")
    assert waiting.startswith("RayJob tea: waiting in queue cats, place 1; it starts when")


def test_a_server_that_is_away_is_asked_again(run: Run, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    run.expect(EXPECTED)
    seen = Seen()

    def away(*_: object) -> None:
        raise KubernetesError("the API server cannot be reached")

    monkeypatch.setattr(api, "get", away)
    later(lambda: run.write_progress(record("done")))
    assert followed(run, api, seen).state == "done"
    assert seen.messages[1:] == ["the API server cannot be reached; trying again"]
