"""How a RayJob and its pods stand, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cat_cluster.cluster.kuberay.client.jobs import age_of, is_held, run_of, shares_cluster, storage_of_run
from cat_cluster.cluster.kuberay.obstacles.queues import queue_of, waiting_text
from cat_cluster.cluster.kuberay.obstacles.refusals import requests_of

Json = dict[str, Any]

_STATES = {  # of the operator
    "Initializing": "starting",
    "Running": "running",
    "Complete": "succeeded",
    "Failed": "failed",
    "ValidationFailed": "refused by KubeRay",
    "Suspending": "being suspended",
    "Suspended": "suspended",
    "Retrying": "starting again after a failure",
    "Waiting": "waiting for its own job id",
}
_REASONS = {
    "DeadlineExceeded": "its deadline has passed",
    "PreRunningDeadlineExceeded": "its pods did not start in time",
    "SubmissionFailed": "it could not be handed to its cluster",
}


@dataclass(frozen=True)
class JobState:
    """How a RayJob stands. pods_ready, pods_asked: None while it has no cluster of its own; age: seconds."""

    job: str
    run: str | None
    storage: str | None
    state: str
    pods_ready: int | None
    pods_asked: int | None
    age: float
    queue: str | None


@dataclass(frozen=True)
class PodState:
    """How a pod stands. requests: what its containers ask for, by resource."""

    pod: str
    node: str | None
    phase: str
    restarts: int
    requests: dict[str, str]


def job_state(job: Json, workloads: Sequence[Json], *, now: datetime) -> JobState:
    """Return how a RayJob stands. workloads: Kueue's of its namespace."""
    metadata, ready, asked = job["metadata"], *_pod_counts(job)
    text, age = _state_text(job, workloads), age_of(job, now)
    return JobState(metadata["name"], run_of(job), storage_of_run(job), text, ready, asked, age, queue_of(job))


def pod_state(pod: Json) -> PodState:
    """Return how a pod stands; one that waits for a container, or whose container failed, says why, as kubectl does."""
    status = pod.get("status", {})
    containers = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
    waiting = [one["state"]["waiting"].get("reason", "") for one in containers if one.get("state", {}).get("waiting")]
    ended = [one["state"]["terminated"] for one in containers if one.get("state", {}).get("terminated")]
    failed = [one.get("reason", "") for one in ended if one.get("exitCode")]
    phase = status.get("reason") or next(filter(None, [*waiting, *failed]), status.get("phase", "Pending"))
    if pod["metadata"].get("deletionTimestamp"):
        phase = "Terminating"
    restarts = sum(one.get("restartCount", 0) for one in containers)
    return PodState(pod["metadata"]["name"], pod.get("spec", {}).get("nodeName"), phase, restarts, requests_of(pod))


def _state_text(job: Json, workloads: Sequence[Json]) -> str:
    status = job.get("status", {})
    state = status.get("jobDeploymentStatus", "")
    if job.get("spec", {}).get("suspend") and state in ("", "Suspended"):
        if is_held(job):
            return "suspended"
        return waiting_text(job, workloads) or f"waiting in queue {queue_of(job)}"
    if state == "Complete" and status.get("jobStatus") == "STOPPED":
        return "stopped"
    if state == "Running" and status.get("jobStatus") in (None, "", "PENDING"):
        return "starting its driver"
    text = _STATES.get(state, state or "not yet seen by KubeRay")
    if state == "Failed":
        return ": ".join(filter(None, (text, _REASONS.get(status.get("reason", "")))))
    return text


def _pod_counts(job: Json) -> tuple[int | None, int | None]:
    """Return how many pods of a job's cluster are ready, and how many it asks for."""
    status = job.get("status", {})
    cluster = status.get("rayClusterStatus") or {}
    has_own = bool(status.get("rayClusterName")) and not shares_cluster(job)
    if not has_own or status.get("jobDeploymentStatus") in ("Suspended", "Retrying"):
        return None, None
    conditions = cluster.get("conditions") or ()
    head = any(one.get("type") == "HeadPodReady" and one.get("status") == "True" for one in conditions)
    return int(head) + cluster.get("readyWorkerReplicas", 0), 1 + cluster.get("desiredWorkerReplicas", 0)
