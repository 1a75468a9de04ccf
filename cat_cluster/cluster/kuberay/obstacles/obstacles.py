"""Why a RayJob does not move, in words: of its status, its pods and events, and its place in a queue of Kueue."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from cat_cluster.cluster.kuberay.client.api import Api
from cat_cluster.cluster.kuberay.client.jobs import (
    DEADLINES,
    RAY,
    age_of,
    has_ended,
    is_held,
    missed_deadline,
    shares_cluster,
)
from cat_cluster.cluster.kuberay.obstacles.pod_causes import evicted, killed_and_deleted, pod_cause, was_killed
from cat_cluster.cluster.kuberay.obstacles.queues import kubectl_of, queue_cause, queue_of
from cat_cluster.cluster.kuberay.obstacles.refusals import refusal, shortened
from cat_cluster.cluster.kuberay.obstacles.view import JobView, view_job

Json = dict[str, Any]

NOTICE_SECONDS = 30  # in which the operator, or Kueue, has seen a new job
RECENT_SECONDS = 300  # that the events of pods which are gone, and of the operator, count
_MORE_TIME = dict(
    zip(
        DEADLINES,
        ("--hours gives it more", "what kept its pods from starting has to change; then make the job anew"),
        strict=True,
    )
)
_POD_REFUSED = "FailedToCreate"  # begins the operator's reasons
# A pod that may not restart (autoscaler v2) is deleted when its container ends: only this event tells why.
_KILLED = re.compile(r"Deleted (?P<type>head|worker) Pod [^/;]*/(?P<name>[^;]+);.*\bReason:OOMKilled\b")


@dataclass(frozen=True)
class Obstacle:
    """What is in a job's way. about: the object; text: a sentence with its remedy; final: waiting cannot help."""

    about: str
    text: str
    final: bool

    def __str__(self) -> str:
        return f"{self.about}: {self.text}"


def job_obstacles(api: Api, name: str) -> list[Obstacle]:
    """Return what is in the way of the RayJob `name` of the namespace; nothing where there is no such job."""
    job = api.get(RAY, "RayJob", name)
    return [] if job is None else obstacles_of(view_job(api, job), now=api.now())


def obstacles_of(view: JobView, *, now: datetime) -> list[Obstacle]:
    """Return what is in the way of a job, each cause once, however many pods have it."""
    job, status = view.job, view.job.get("status", {})
    about, state = f"RayJob {job['metadata']['name']}", status.get("jobDeploymentStatus")
    if has_ended(job):
        return _together([*_ended_obstacles(about, status), *_remaining_obstacles(view, now)])
    found = [Obstacle(what, why, final=False) for what, why in view.hidden.items()]
    if queue_of(job) is not None and (cause := _queue_cause(view, now)):
        return [*found, Obstacle(about, *cause)]
    if not status:
        return [*found, *_unseen(about, view, now), *_events_of(view, now)]
    if is_held(job) and state in ("Suspended", "Suspending"):
        patch = f'patch rayjob {job["metadata"]["name"]} --type merge -p \'{{"spec":{{"suspend":false}}}}\''
        command = f"`{kubectl_of(job)} {patch}`"
        return [*found, Obstacle(about, f"is suspended; {command} or submitting it again starts it", final=False)]
    return _together([*found, *_cluster_obstacles(view), *_pod_obstacles(view, now), *_events_of(view, now)])


def _ended_obstacles(about: str, status: Json) -> Iterator[Obstacle]:
    reason, message = status.get("reason", ""), shortened(status.get("message", ""))
    if status["jobDeploymentStatus"] == "ValidationFailed":
        yield Obstacle(about, f"KubeRay's operator refuses it: {message}; correct it, and make it anew", final=True)
    elif reason == "SubmissionFailed":
        text = f"it could not be handed to its cluster: {message}; `cat-cluster k8s logs` of the submitter says why"
        yield Obstacle(about, text, final=True)
    elif reason in DEADLINES:
        yield Obstacle(about, f"its deadline has passed: {message}; {_MORE_TIME[reason]}", final=True)


def _remaining_obstacles(view: JobView, now: datetime) -> Iterator[Obstacle]:
    """What is still there of a job says why its deadline passed, and whether it failed for want of memory."""
    status = view.job["status"]
    if missed_deadline(view.job):
        yield from _cluster_obstacles(view)
        yield from _pod_obstacles(view, now)
    elif status["jobDeploymentStatus"] == "Failed":
        yield from _pod_obstacles(replace(view, pods=[pod for pod in view.pods if was_killed(pod)]), now)


def _queue_cause(view: JobView, now: datetime) -> tuple[str, bool] | None:
    """Why a job that Kueue holds waits; without Kueue nobody holds one that is not suspended."""
    if not view.job.get("spec", {}).get("suspend"):
        return None
    if view.workloads is None:
        text = f"waits for queue {queue_of(view.job)}, and Kueue is not installed in the cluster; install it"
        return text, True
    if "workloads" in view.hidden:
        return None
    if not view.workloads and age_of(view.job, now) < NOTICE_SECONDS:
        return None
    return queue_cause(view.job, view.workloads)


def _unseen(about: str, view: JobView, now: datetime) -> Iterator[Obstacle]:
    """A job that KubeRay's operator has said nothing of."""
    manager, age = view.job.get("spec", {}).get("managedBy"), age_of(view.job, now)
    if manager and not manager.startswith("ray.io/"):
        yield Obstacle(about, f"is {manager}'s to run (managedBy), and KubeRay leaves it alone", final=False)
    elif age >= NOTICE_SECONDS:
        text = f"KubeRay's operator has said nothing of it for {NOTICE_SECONDS} s and more"
        down = [one for one in view.operators or () if not one.get("status", {}).get("readyReplicas")]
        if view.operators == []:
            # Some clouds run it where nobody sees it, so this is a guess.
            yield Obstacle(about, f"{text}, and the cluster shows none; install it (docs/operations.md)", final=False)
            return
        where = down[0]["metadata"]["namespace"] if down else "kuberay-system"
        look = f"`kubectl -n {where} get pods`"
        not_ready = ", and has no pod that is ready" if down else ""
        yield Obstacle(about, f"{text}{not_ready}; see that it runs ({look}), and watches the namespace", final=False)


def _cluster_obstacles(view: JobView) -> Iterator[Obstacle]:
    """Pods that were refused: the operator notes the last of them in the status of the cluster."""
    status = view.job["status"]
    if shares_cluster(view.job):  # what it lacks is in the way of a job that waits for it alone
        if (
            status.get("jobDeploymentStatus") == "Initializing"
            and status.get("rayClusterStatus", {}).get("state") != "ready"
        ):
            cluster = status.get("rayClusterName")
            yield Obstacle(
                f"RayJob {view.job['metadata']['name']}",
                f"waits for RayCluster {cluster}, which it shares with others, to be ready; "
                f"`{kubectl_of(view.job)} describe raycluster {cluster}` says how that stands",
                final=False,
            )
        return
    conditions = status.get("rayClusterStatus", {}).get("conditions", ())
    for condition in conditions:
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            message = condition.get("message", "").removeprefix(condition.get("reason", "")).strip()
            yield Obstacle(f"RayCluster {status.get('rayClusterName')}", *refusal(message))


def _pod_obstacles(view: JobView, now: datetime) -> Iterator[Obstacle]:
    for pod in view.pods:
        name = pod["metadata"]["name"]
        warnings = [one for one in view.events if one["involvedObject"].get("name") == name]
        warnings.sort(key=_when)
        logs = {container: text for (owner, container), text in view.logs.items() if owner == name}
        if cause := pod_cause(pod, warnings, logs, now=now):
            yield Obstacle(f"Pod {name}", *cause)


def _events_of(view: JobView, now: datetime) -> Iterator[Obstacle]:
    """What only events tell: of the operator, of the Job that submits, and of pods that are gone."""
    name = view.job["metadata"]["name"]
    cluster = None if shares_cluster(view.job) else view.job.get("status", {}).get("rayClusterName")
    conditions = view.job.get("status", {}).get("rayClusterStatus", {}).get("conditions")
    here = {pod["metadata"]["name"] for pod in view.pods}
    last: dict[tuple[str, str, str], Json] = {}
    for event in sorted(view.events, key=_when):
        about = event["involvedObject"]
        if event.get("type") == "Normal" and not _KILLED.search(event.get("message", "")):
            continue
        # Kubernetes tries a refused pod of a Job again ever more seldom.
        if about.get("kind") == "Job" or (now - _when(event)).total_seconds() <= RECENT_SECONDS:
            last[about.get("kind", ""), about.get("name", ""), event.get("reason", "")] = event
    for (kind, owner, reason), event in last.items():
        about, message = f"{kind} {owner}", event.get("message", "")
        if kind == "Pod" and reason == "Evicted" and cluster and owner.startswith(f"{cluster}-") and owner not in here:
            yield Obstacle(about, *evicted(message))
        elif (kind, owner, reason) == ("Job", name, "FailedCreate"):
            if not any("batch.kubernetes.io/job-name" in pod["metadata"].get("labels", {}) for pod in view.pods):
                yield Obstacle(about, *refusal(message))
        elif killed := _KILLED.search(message):
            alike = _alike(killed["name"], view.pods)
            yield Obstacle(f"Pod {killed['name']}", *killed_and_deleted(killed["type"], alike))
        elif (kind, owner) in (("RayJob", name), ("RayCluster", cluster)):
            if not (reason.startswith(_POD_REFUSED) and reason.endswith("Pod")):
                yield Obstacle(about, f"{reason}: {shortened(message)}; correct what it names", final=False)
            elif not conditions:  # the operator notes nothing there when its gate is off
                yield Obstacle(about, *refusal(message))


def _alike(name: str, pods: Iterable[Json]) -> Json | None:
    """Return a pod of the group of one that is gone: their names differ in the part that Kubernetes made."""
    group = name.rpartition("-")[0]
    return next((pod for pod in pods if pod["metadata"]["name"].rpartition("-")[0] == group), None)


def _together(found: Iterable[Obstacle]) -> list[Obstacle]:
    """Return obstacles of which those with the same text are one, about all that have it."""
    same: dict[tuple[str, bool], list[str]] = {}
    for one in found:
        same.setdefault((one.text, one.final), []).append(one.about)
    return [Obstacle(_about(names), text, final) for (text, final), names in same.items()]


def _about(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    kind, _, first = names[0].partition(" ")
    return f"{len(names)} {kind.lower()}s ({first}, ...)"


def _when(event: Json) -> datetime:
    """Return when an event was last seen."""
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    text = next((time for time in times if time), event["metadata"].get("creationTimestamp"))
    return datetime.fromisoformat(text) if text else datetime.fromtimestamp(0, UTC)
