"""How RayJobs and pods stand, in words: of what a real API server said, and of Kueue's types."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from cat_cluster.cluster.kuberay.obstacles.states import job_state, pod_state
from tests.support.recorded_jobs import RECORDED, queued, workload

NOW = datetime(2026, 11, 29, 10, 50, tzinfo=UTC)


def with_status(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "tea"}, "spec": {}, "status": status}


@pytest.mark.parametrize(
    ("job", "text"),
    [
        (RECORDED["managed"]["job"], "not yet seen by KubeRay"),
        (RECORDED["cpu"]["job"], "starting"),
        ({"metadata": {"name": "tea"}}, "not yet seen by KubeRay"),
        (RECORDED["invalid"]["job"], "refused by KubeRay"),
        (RECORDED["suspended"]["job"], "suspended"),
        (RECORDED["deadline"]["job"], "failed: its deadline has passed"),
        (RECORDED["predeadline"]["job"], "failed: its pods did not start in time"),
        (with_status(jobDeploymentStatus="Running", jobStatus="RUNNING"), "running"),
        (with_status(jobDeploymentStatus="Running"), "starting its driver"),
        (with_status(jobDeploymentStatus="Complete", jobStatus="SUCCEEDED"), "succeeded"),
        (with_status(jobDeploymentStatus="Complete", jobStatus="STOPPED"), "stopped"),
        (with_status(jobDeploymentStatus="Failed", reason="AppFailed"), "failed"),
        (with_status(jobDeploymentStatus="Retrying"), "starting again after a failure"),
    ],
)
def test_a_job_says_where_it_is(job: dict[str, Any], text: str) -> None:
    assert job_state(job, (), now=NOW).state == text


def test_a_job_in_a_queue_says_its_place() -> None:
    workloads = [workload("first", 10), workload("tea", 20), workload("held", 10, active=False)]
    tea = job_state(queued("tea"), workloads, now=NOW)
    assert (tea.state, tea.queue, tea.pods_asked) == ("waiting in queue train, place 2", "train", None)
    assert job_state(queued("held"), workloads, now=NOW).state == "held in queue train"
    assert job_state(queued("new"), workloads, now=NOW).state == "waiting in queue train"
    fresh = {**queued("tea"), "status": {}}
    assert job_state(fresh, workloads, now=NOW).state == "waiting in queue train, place 2"
    runs = {**queued("tea"), "spec": {"suspend": False}, "status": {"jobDeploymentStatus": "Initializing"}}
    assert job_state(runs, workloads, now=NOW).state == "starting"


def test_pods_of_a_job_are_counted() -> None:
    ready = [{"type": "HeadPodReady", "status": "True"}]
    cluster = {"conditions": ready, "readyWorkerReplicas": 2, "desiredWorkerReplicas": 4}
    state = job_state(with_status(rayClusterName="tea-a", rayClusterStatus=cluster), (), now=NOW)
    assert (state.pods_ready, state.pods_asked) == (3, 5)
    state = job_state(RECORDED["tengpu"]["job"], (), now=NOW)
    assert (state.pods_ready, state.pods_asked) == (0, 5)
    assert job_state(RECORDED["invalid"]["job"], (), now=NOW).pods_asked is None
    shares = {**RECORDED["tengpu"]["job"], "spec": {"clusterSelector": {"ray.io/cluster": "tea"}}}
    assert job_state(shares, (), now=NOW).pods_asked is None


def test_run_storage_and_age_are_told() -> None:
    job = {
        "metadata": {
            "name": "tea-0123",
            "labels": {"cat-cluster/run": "run-0123456789ab"},
            "annotations": {"cat-cluster/storage": "s3://cats/prod"},
            "creationTimestamp": "2026-11-29T10:48:30Z",
        },
        "spec": {},
    }
    state = job_state(job, (), now=NOW)
    assert (state.run, state.storage, state.age) == ("run-0123456789ab", "s3://cats/prod", 90.0)


@pytest.mark.parametrize(
    ("case", "phase", "restarts"),
    [
        ("cpu", "Pending", 0),
        ("image", "ErrImagePull", 0),
        ("oom", "CrashLoopBackOff", 5),
        ("secret", "CreateContainerConfigError", 0),
    ],
)
def test_a_pod_says_what_it_waits_for(case: str, phase: str, restarts: int) -> None:
    state = pod_state(RECORDED[case]["pods"][0])
    assert (state.phase, state.restarts) == (phase, restarts)
    assert state.requests["memory"]


def test_a_pod_that_goes_or_was_evicted_says_so() -> None:
    pod = {"metadata": {"name": "a"}, "status": {"phase": "Failed", "reason": "Evicted"}}
    assert pod_state(pod).phase == "Evicted"
    assert pod_state({**pod, "metadata": {"name": "a", "deletionTimestamp": "2026"}}).phase == "Terminating"
