"""Logs of the pods of a RayJob."""

from __future__ import annotations

from collections.abc import Iterator

from cat_cluster.cluster.kuberay.client.api import Api, Json
from cat_cluster.errors import RunError
from cat_cluster.spec.choices import JobLog

_CONTAINERS: dict[JobLog, str] = {"driver": "ray-job-submitter", "head": "ray-head", "workers": "ray-worker"}


def pods_of_part(api: Api, job: Json, part: JobLog) -> list[str]:
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


def log_of(api: Api, pod: str, part: JobLog, *, follow: bool = False, tail: int | None = None) -> Iterator[str]:
    """Yield the log of a pod of a part in pieces of text; raises KubernetesError."""
    return api.log(pod, _CONTAINERS[part], follow=follow, tail=tail)


def _pods(api: Api, job: Json) -> dict[JobLog, list[str]]:
    cluster = job.get("status", {}).get("rayClusterName")
    types = {"head": "head", "workers": "worker"}
    selectors = {"driver": f"batch.kubernetes.io/job-name={job['metadata']['name']}"}
    if cluster:
        selectors |= {part: f"ray.io/cluster={cluster},ray.io/node-type={kind}" for part, kind in types.items()}
    found: dict[JobLog, list[str]] = {"driver": [], "head": [], "workers": []}
    for part in found:
        if part in selectors:
            pods = [one["metadata"] for one in api.list("v1", "Pod", labels=selectors[part])]
            pods.sort(key=lambda pod: (pod["creationTimestamp"], pod["name"]))
            found[part] = [str(pod["name"]) for pod in pods]
    return found


def _why_none(status: str) -> str:
    if status in ("Complete", "Failed"):
        return (
            "its pods are gone, as they are some minutes after its end; `cat-cluster jobs status` shows the run's end"
        )
    return "none of its pods is there yet; ask again"
