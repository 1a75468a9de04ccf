"""What an API server shows of a RayJob: all that tells why it does not move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus

from cat_cluster.cluster.kuberay.client.api import Api, Json
from cat_cluster.cluster.kuberay.client.jobs import has_ended, missed_deadline, pods_of, shares_cluster
from cat_cluster.cluster.kuberay.client.operators import find_operators
from cat_cluster.cluster.kuberay.obstacles.pod_causes import LINES, logs_wanted
from cat_cluster.cluster.kuberay.obstacles.queues import VERSIONS, queue_of
from cat_cluster.errors import KubernetesError


@dataclass(frozen=True)
class JobView:
    """What an API server shows of a RayJob.

    workloads: Kueue's of the namespace, None where it has none; operators: KubeRay's Deployments, None where whoever
    asks may not see them; logs: by pod and container, the end of what it wrote; hidden: what may not be seen, and why.
    """

    job: Json
    pods: Sequence[Json] = ()
    events: Sequence[Json] = ()
    workloads: Sequence[Json] | None = ()
    operators: Sequence[Json] | None = None
    logs: Mapping[tuple[str, str], str] = field(default_factory=dict)
    hidden: Mapping[str, str] = field(default_factory=dict)


def view_job(api: Api, job: Json) -> JobView:
    """Return what there is to see of a RayJob, as far as role `training-jobs` and Kueue's absence let it be seen."""
    hidden: dict[str, str] = {}

    def seen(what: str, ask: Callable[[], list[Json] | None]) -> list[Json] | None:
        try:
            return ask()
        except KubernetesError as error:
            if error.status != HTTPStatus.FORBIDDEN:
                raise
            hidden[what] = str(error)
            return []

    status = job.get("status", {})
    pods = seen("pods", lambda: _own_pods(api, job)) or []
    if has_ended(job) and not missed_deadline(job):
        return JobView(job, pods, hidden=hidden)  # nothing is in its way any more
    events = seen("events", lambda: _list_events(api, job)) or []
    workloads = seen("workloads", lambda: list_workloads(api)) if queue_of(job) else []
    operators = None if status else find_operators(api)
    return JobView(job, pods, events, workloads, operators, _read_logs(api, pods), hidden)


def list_workloads(api: Api) -> list[Json] | None:
    """Return Kueue's Workloads of the namespace, None where Kueue is not installed."""
    version = next((version for version in VERSIONS if api.resource(version, "Workload")), None)
    return None if version is None else api.list(version, "Workload")


def _own_pods(api: Api, job: Json) -> list[Json]:
    """Return the pods that are there for a RayJob alone, the head first, and those that submit it last."""
    found = pods_of(api, job)
    return found["driver"] if shares_cluster(job) else [*found["head"], *found["workers"], *found["driver"]]


def _list_events(api: Api, job: Json) -> list[Json]:
    """Return the warnings of the namespace, and what the operator reports of a job's own cluster."""
    found = api.list("v1", "Event", fields="type=Warning")
    if (cluster := job.get("status", {}).get("rayClusterName")) and not shares_cluster(job):
        about = f"type=Normal,involvedObject.kind=RayCluster,involvedObject.name={cluster}"
        found += api.list("v1", "Event", fields=about)
    return found


def _read_logs(api: Api, pods: Sequence[Json]) -> dict[tuple[str, str], str]:
    """Return the last lines of what crashed, by pod and container; one pod of a group tells it for all."""
    logs: dict[tuple[str, str], str] = {}
    read: set[tuple[str, str]] = set()
    for pod in pods:
        name, group = pod["metadata"]["name"], pod["metadata"].get("labels", {}).get("ray.io/group", "")
        for container, previous in logs_wanted(pod):
            if (group, container) not in read:
                read.add((group, container))
                logs[name, container] = _log_end(api, name, container, previous)
    return logs


def _log_end(api: Api, pod: str, container: str, previous: bool) -> str:
    """Return the last lines of a log; none where it is gone or may not be read."""
    try:
        return "".join(api.log(pod, container, tail=LINES, previous=previous))
    except KubernetesError:
        return ""
