"""A job's place in its queue of Kueue, and why it waits there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from cat_cluster.cluster.kuberay.client.jobs import QUEUE_LABEL
from cat_cluster.cluster.kuberay.obstacles.refusals import Cause, shortened

Json = dict[str, Any]

# Kueue's words (pkg/scheduler/flavorassigner of 0.17): of each pod set, what it lacks in each flavor that was tried.
_POD_SET = re.compile(r"(?:; )?couldn't assign flavors to pod set ([^:]+): ")
_LACKS = re.compile(
    r"insufficient unused quota for (?P<resource>\S+) in flavor (?P<flavor>\S+), (?P<more>\S+) more needed"
)
_NEVER = re.compile(
    r"insufficient quota for (?P<resource>\S+) in flavor (?P<flavor>\S+), previously considered podsets requests "
    r"\((?P<before>[^)]*)\) \+ current podset request \((?P<asks>[^)]*)\) > maximum capacity \((?P<most>[^)]*)\)"
)
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
    why, never = _shortage(reserved.get("message", ""))
    if text is not None:
        if "doesn't exist" in why:
            return f"{text}: {why}; make it, or submit to another --queue", True
        if never:
            return f"{text}: {why}; ask for less, or have the quota raised", True
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


def _shortage(message: str) -> Cause:
    """Return in words why Kueue finds no quota, and whether the quota is too small even when nothing else uses it."""
    pieces = _POD_SET.split(message)
    pod_sets = list(zip(pieces[1::2], pieces[2::2], strict=True))
    if pieces[0] or not all(_LACKS.search(why) or _NEVER.search(why) for _, why in pod_sets):
        return shortened(message), False
    lines, never = [], False
    for name, why in pod_sets:
        short = {one["resource"] for one in _LACKS.finditer(why)}
        never |= any(one["resource"] not in short for one in _NEVER.finditer(why))  # in no flavor that was tried
        lacks = [f"{one['more']} of {one['resource']} in flavor {one['flavor']}" for one in _LACKS.finditer(why)]
        beyond = [_beyond(one) for one in _NEVER.finditer(why)]
        parts = [f"lacks {' and '.join(lacks)}"] * bool(lacks) + [f"asks for {' and '.join(beyond)}"] * bool(beyond)
        lines.append(f"{name} {', '.join(parts)}")
    return "; ".join(lines), never


def _beyond(found: re.Match[str]) -> str:
    """Return what a pod set asks for beyond all that a flavor has."""
    others = "" if found["before"] == "0" else f" beside {found['before']} for its other pods"
    return f"{found['asks']} of {found['resource']}{others} where flavor {found['flavor']} has {found['most']}"


def _waits(workload: Json) -> bool:
    held = workload["spec"].get("active") is False
    return not held and not _is_true(workload, "QuotaReserved") and not _is_true(workload, "Finished")


def _is_true(workload: Json, kind: str) -> bool:
    return bool(_condition(workload, kind).get("status") == "True")


def _condition(workload: Json, kind: str) -> Json:
    conditions = workload.get("status", {}).get("conditions", ())
    return next((one for one in conditions if one.get("type") == kind), {})
