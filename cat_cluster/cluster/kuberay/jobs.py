"""RayJobs of a namespace: the one that a name or a run means, and how it stands."""

from __future__ import annotations

from contextlib import suppress

from cat_cluster.cluster.kuberay.api import Api, Json
from cat_cluster.cluster.runs import check_run_id
from cat_cluster.errors import RunError

RAY = "ray.io/v1"
RUN_LABEL = "cat-cluster/run"  # of a RayJob whose run was known when it was rendered
_SHOWN = 5


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


def run_of(job: Json) -> str | None:
    """Return the run that a RayJob trains; None where it was rendered without `--upload`."""
    run: str | None = job["metadata"].get("labels", {}).get(RUN_LABEL)
    return run


def _what_is_there(api: Api) -> str:
    jobs = api.list(RAY, "RayJob")
    jobs.sort(key=lambda job: job["metadata"].get("creationTimestamp", ""), reverse=True)
    names = [job["metadata"]["name"] + (f" ({run})" if (run := run_of(job)) else "") for job in jobs]
    if not names:
        return "it has none at all"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"it has {', '.join(names[:_SHOWN])}{more}"
