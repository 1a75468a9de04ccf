"""Logs of the pods of a RayJob."""

from __future__ import annotations

from dataclasses import dataclass

from cat_cluster.cluster.kuberay.client.api import Api, Json
from cat_cluster.errors import RunError
from cat_cluster.spec.choices import JobLog

_CONTAINERS: dict[JobLog, str] = {"driver": "ray-job-submitter", "head": "ray-head", "workers": "ray-worker"}


@dataclass(frozen=True)
class JobPod:
    """A pod of a RayJob, and its container that is of interest."""

    name: str
    container: str


def pods_of_part(api: Api, job: Json, part: JobLog) -> list[JobPod]:
    """Return the pods of a part of a RayJob, oldest first: of the driver's log the one that prints it, the last one's.

    Raises RunError, which says what there is instead, where there is none; KubernetesError.
    """
    pods = _pods(api, job)
    if not pods[part]:
        there = [name for name, found in pods.items() if found]
        name, status = job["metadata"]["name"], job.get("status", {}).get("jobDeploymentStatus") or "new"
        raise RunError(
            f"RayJob {name} ({status}) has no pod for the log of its {part}: "
            + (f"there is that of its {' and '.join(there)} (--of)" if there else _why_none(status))
        )
    return pods[part][-1:] if part == "driver" else pods[part]


def _pods(api: Api, job: Json) -> dict[JobLog, list[JobPod]]:
    cluster = job.get("status", {}).get("rayClusterName")
    types = {"head": "head", "workers": "worker"}
    selectors = {"driver": f"batch.kubernetes.io/job-name={job['metadata']['name']}"}
    if cluster:
        selectors |= {part: f"ray.io/cluster={cluster},ray.io/node-type={kind}" for part, kind in types.items()}
    found: dict[JobLog, list[JobPod]] = {"driver": [], "head": [], "workers": []}
    for part in found:
        if part in selectors:
            pods = api.list("v1", "Pod", labels=selectors[part])
            pods.sort(key=lambda pod: (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]))
            found[part] = [JobPod(pod["metadata"]["name"], _container(pod, part)) for pod in pods]
    return found


def _container(pod: Json, part: JobLog) -> str:
    """Return the container of ours; of a job that others made the first one, which KubeRay takes."""
    names = [str(one["name"]) for one in pod["spec"]["containers"]]
    return _CONTAINERS[part] if _CONTAINERS[part] in names else names[0]


def _why_none(status: str) -> str:
    if status in ("Complete", "Failed"):
        return (
            "its pods are gone, as they are some minutes after its end; `cat-cluster jobs status` shows the run's end"
        )
    return "none of its pods is there yet; ask again"
