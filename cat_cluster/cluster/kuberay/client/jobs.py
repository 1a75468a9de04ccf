"""RayJobs of a namespace: the one that a name or a run means, how it stands, and its pods."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime

from cat_cluster.cluster.kuberay.client.api import Api, Json
from cat_cluster.cluster.kuberay.rendering.pods import RUN_LABEL, STORAGE_ANNOTATION
from cat_cluster.errors import RunError
from cat_cluster.runs.run import check_run_id
from cat_cluster.spec.choices import JobLog

RAY = "ray.io/v1"
JOB_VERBS = ("get", "list", "create", "patch", "delete")  # on RayJobs, of who submits them
DEADLINES = ("DeadlineExceeded", "PreRunningDeadlineExceeded")  # reasons of KubeRay's
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_PARTS: dict[str, JobLog] = {"head": "head", "worker": "workers"}  # by label ray.io/node-type
_SHOWN = 5
_LONGEST = 400  # characters of a reason: a job that failed quotes its log


def find_job(api: Api, name_or_run: str) -> Json:
    """Return the RayJob of a name, or of a run: of several the newest that has not ended, else the newest.

    Raises RunError, which names the jobs that are there, when there is none; KubernetesError.
    """
    api.required(RAY, "RayJob")
    found: list[Json] = []
    with suppress(RunError):  # it is no run, but may be a name
        found = api.list(RAY, "RayJob", labels=f"{RUN_LABEL}={check_run_id(name_or_run)}")
    if found:
        return max(found, key=lambda job: (not has_ended(job), job["metadata"].get("creationTimestamp", "")))
    job = api.get(RAY, "RayJob", name_or_run)
    if job is None:
        raise RunError(
            f"namespace {api.namespace} has no RayJob of {name_or_run!r}: {_what_is_there(api)}; --namespace and "
            "--context say where else to look"
        )
    return job


def has_ended(job: Json) -> bool:
    """Say whether KubeRay works on a RayJob no more. A suspended one may go on."""
    return job.get("status", {}).get("jobDeploymentStatus") in ("Complete", "Failed", "ValidationFailed")


def missed_deadline(job: Json) -> bool:
    """Say whether a RayJob has ended because it, or its start, took longer than it may."""
    return job.get("status", {}).get("reason") in DEADLINES


def is_held(job: Json) -> bool:
    """Say whether a RayJob is suspended until a person starts it; in a queue Kueue does."""
    return bool(job.get("spec", {}).get("suspend")) and QUEUE_LABEL not in job["metadata"].get("labels", {})


def shares_cluster(job: Json) -> bool:
    """Say whether a RayJob runs on a RayCluster that is there without it, and for others too."""
    return bool(job.get("spec", {}).get("clusterSelector"))


def pods_of(api: Api, job: Json) -> dict[JobLog, list[Json]]:
    """Return the pods of a RayJob by the log that they have, oldest first: those that submit it have the driver's.

    Head and workers are those of its cluster of the moment, which may be shared.
    """
    name, cluster = job["metadata"]["name"], job.get("status", {}).get("rayClusterName")
    found: dict[JobLog, list[Json]] = {"driver": [], "head": [], "workers": []}
    found["driver"] = api.list("v1", "Pod", labels=f"batch.kubernetes.io/job-name={name}")
    for pod in api.list("v1", "Pod", labels=f"ray.io/cluster={cluster}") if cluster else ():
        part = _PARTS.get(pod["metadata"]["labels"].get("ray.io/node-type", ""))
        if part is not None:
            found[part].append(pod)
    for pods in found.values():
        pods.sort(key=lambda pod: (pod["metadata"].get("creationTimestamp", ""), pod["metadata"]["name"]))
    return found


def age_of(job: Json, now: datetime) -> float:
    """Return the age of a RayJob in seconds. now: by the API server's clock, `Api.now`."""
    created = job["metadata"].get("creationTimestamp")
    return 0.0 if created is None else max(0.0, (now - datetime.fromisoformat(created)).total_seconds())


def run_of(job: Json) -> str | None:
    """Return the run that a RayJob trains; None where it was rendered without `--upload`."""
    run: str | None = job["metadata"].get("labels", {}).get(RUN_LABEL)
    return run


def storage_of_run(job: Json) -> str | None:
    """Return the address of the storage that a RayJob's run is in; None where `run_of` is."""
    storage: str | None = job["metadata"].get("annotations", {}).get(STORAGE_ANNOTATION)
    return storage


def end_text(job: Json) -> str:
    """Return how a RayJob has ended, as "has ended as Failed (AppFailed: ...)"."""
    status = job.get("status", {})
    message = " ".join(str(status.get("message", "")).split())
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
    why = ": ".join(filter(None, (status.get("reason", ""), message)))
    return f"has ended as {status.get('jobDeploymentStatus')}" + (f" ({why})" if why else "")


def _what_is_there(api: Api) -> str:
    jobs = api.list(RAY, "RayJob")
    jobs.sort(key=lambda job: job["metadata"].get("creationTimestamp", ""), reverse=True)
    names = [job["metadata"]["name"] + (f" ({run})" if (run := run_of(job)) else "") for job in jobs]
    if not names:
        return "it has none at all"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"it has {', '.join(names[:_SHOWN])}{more}"
