"""A job's place in its queue of Kueue, and why it waits there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cat_cluster.cluster.kuberay.client.jobs import QUEUE_LABEL
from cat_cluster.cluster.kuberay.obstacles.refusals import Cause, shortened

Json = dict[str, Any]

VERSIONS = ("kueue.x-k8s.io/v1beta2", "kueue.x-k8s.io/v1beta1")


def queue_of(job: Json) -> str | None:
    """Return the LocalQueue that a RayJob is in; None where nothing of Kueue's starts it."""
    queue: str | None = job["metadata"].get("labels", {}).get(QUEUE_LABEL)
    return queue


def kubectl_of(job: Json) -> str:
    """Return how a command of kubectl for a job's namespace begins."""
    namespace = job["metadata"].get("namespace")
    return f"kubectl -n {namespace}" if namespace else "kubectl"


def workload_of(job: Json, workloads: Sequence[Json]) -> Json | None:
    """Return what Kueue made of a RayJob; None while it has made nothing."""
    uid = job["metadata"].get("uid")
    owned = (
        one for one in workloads if uid in [owner.get("uid") for owner in one["metadata"].get("ownerReferences", ())]
    )
    return next(owned, None)


def place(workload: Json, workloads: Sequence[Json]) -> int | None:
    """Return a workload's place among those of its queue that wait, from 1: by priority, then by age."""
    queue = workload["spec"].get("queueName")
    waiting = [one for one in workloads if one["spec"].get("queueName") == queue and _waits(one)]
    waiting.sort(key=lambda one: (-one["spec"].get("priority", 0), one["metadata"].get("creationTimestamp", "")))
    names = [one["metadata"]["name"] for one in waiting]
    name = workload["metadata"]["name"]
    return names.index(name) + 1 if name in names else None


def waiting_text(job: Json, workloads: Sequence[Json]) -> str | None:
    """Return in words that a job waits in its queue, and where; None for one that does not."""
    queue, workload = queue_of(job), workload_of(job, workloads)
    if queue is None or workload is None:
        return None
    if workload["spec"].get("active") is False:
        return f"held in queue {queue}"
    number = place(workload, workloads)
    return None if number is None else f"waiting in queue {queue}, place {number}"


def queue_cause(job: Json, workloads: Sequence[Json]) -> Cause | None:
    """Return why a job of a queue is not started, and whether waiting cannot help; None for one that is."""
    queue, workload = queue_of(job), workload_of(job, workloads)
    if workload is None:
        return (
            f"waiting in queue {queue}, which Kueue has not noticed: see that its controller runs and its "
            "configuration names the framework ray.io/rayjob",
            False,
        )
    name, text = workload["metadata"]["name"], waiting_text(job, workloads)
    if workload["spec"].get("active") is False:
        command = f'`{kubectl_of(job)} patch workload {name} --type merge -p \'{{"spec":{{"active":true}}}}\'`'
        return f"{text}: {command} lets it go on", False
    reserved = _condition(workload, "QuotaReserved")
    why = shortened(reserved.get("message", ""))
    if text is not None:
        if "doesn't exist" in why:
            return f"{text}: {why}; make it, or submit to another --queue", True
        return f"{text}{f': {why}' if why else ''}; it starts when there is quota for all of its pods", False
    if _is_true(workload, "QuotaReserved") and not _is_true(workload, "Admitted"):
        checks = [
            one.get("name", "") for one in workload["status"].get("admissionChecks", ()) if one.get("state") != "Ready"
        ]
        what = f"admission check {', '.join(checks)}" if checks else "its admission"
        return (
            f"has quota in queue {queue} and waits for {what}; `{kubectl_of(job)} describe workload {name}` says more",
            False,
        )
    return None


def _waits(workload: Json) -> bool:
    held = workload["spec"].get("active") is False
    return not held and not _is_true(workload, "QuotaReserved") and not _is_true(workload, "Finished")


def _is_true(workload: Json, kind: str) -> bool:
    return bool(_condition(workload, kind).get("status") == "True")


def _condition(workload: Json, kind: str) -> Json:
    conditions = workload.get("status", {}).get("conditions", ())
    return next((one for one in conditions if one.get("type") == kind), {})
