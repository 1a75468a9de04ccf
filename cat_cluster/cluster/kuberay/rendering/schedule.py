"""Jobs on a schedule: a RayCronJob, or a CronJob for clusters whose operator does not look at these.

A RayCronJob makes the RayJob that was rendered. The pod of a CronJob calls `cat-cluster k8s submit` instead, so its
RayJob is as one that a person submits: it has a run, and labels by which Kueue finds it.
"""

from __future__ import annotations

import zoneinfo
from typing import Any

from cat_cluster.cluster.kuberay.checks.rules import MAX_NAME_LENGTH
from cat_cluster.cluster.kuberay.checks.schedules import schedule_problem
from cat_cluster.cluster.kuberay.rendering.pods import SPEC_ANNOTATION, SPEC_FILE, part_of_project, schedule_template
from cat_cluster.cluster.kuberay.rendering.render import RenderOptions, is_large, spec_text
from cat_cluster.errors import SpecError
from cat_cluster.spec.job import JobSpec

LATE_SECONDS = 3600  # by which a submission may be late, and which it may take: it reads the photos
RETRIES = 2  # of a submission: an API server or a bucket may be away for a minute
SUCCEEDED, FAILED = 1, 3  # submissions that are kept, with their logs
_OF_THIS_MACHINE = "localtime"  # a link beside the zones, on some machines; the cluster has none, or another


def refuse_large_spec(job: JobSpec, storage: str) -> None:
    """Raise SpecError for a spec too large for an object of Kubernetes: a schedule keeps it nowhere else."""
    text = spec_text(job, storage)
    if is_large(text):
        raise SpecError(
            f"the spec has {len(text.encode()) >> 10} KiB, more than an object of Kubernetes holds, and --schedule "
            "keeps it there: make several specs of it"
        )


def ray_cron_job(
    ray_job: dict[str, Any], schedule: str, time_zone: str | None, *, suspend: bool = False
) -> dict[str, Any]:
    """Return a RayCronJob that makes the rendered RayJob at each time of a schedule.

    schedule: five fields of cron, or one of @hourly ... @yearly; time_zone: such as Europe/Berlin, by default that of
    the operator's pod; suspend: until it is released. Raises SpecError.
    """
    times = _times(schedule, time_zone, suspend)
    metadata = ray_job["metadata"]
    longest = MAX_NAME_LENGTH["RayCronJob"]  # each job's name has the minute behind it
    if len(metadata["name"]) > longest:
        raise SpecError(f"--name {metadata['name']}: may have {longest} characters with --schedule; give a shorter one")
    return {
        "apiVersion": ray_job["apiVersion"],
        "kind": "RayCronJob",
        "metadata": metadata,
        "spec": {**times, "jobTemplate": ray_job["spec"]},
    }


def cron_job(
    ray_job: dict[str, Any],
    options: RenderOptions,
    schedule: str,
    time_zone: str | None,
    *,
    suspend: bool = False,
) -> dict[str, Any]:
    """Return a CronJob that submits the spec of a rendered RayJob at each time of a schedule, inside the cluster.

    options: with which the RayJob was rendered, all sizes given: the pod may lack the base that tells them. The rest is
    as for `ray_cron_job`, but the time zone is by default that of Kubernetes' controllers. Raises SpecError.
    """
    times = _times(schedule, time_zone, suspend)
    head = ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    image = head["spec"]["containers"][0]["image"]
    labels = part_of_project("schedule")
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": ray_job["metadata"]["name"], "namespace": options.namespace, "labels": labels},
        "spec": {
            **times,
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": LATE_SECONDS,
            "successfulJobsHistoryLimit": SUCCEEDED,
            "failedJobsHistoryLimit": FAILED,
            "jobTemplate": {
                "metadata": {"labels": labels},
                "spec": {
                    "backoffLimit": RETRIES,
                    "activeDeadlineSeconds": LATE_SECONDS,
                    "template": schedule_template(
                        image, head["metadata"]["annotations"][SPEC_ANNOTATION], _command(options, image)
                    ),
                },
            },
        },
    }


def _times(schedule: str, time_zone: str | None, suspend: bool) -> dict[str, Any]:
    """Return the fields that RayCronJob and CronJob share; both are read by the same library."""
    if problem := schedule_problem(schedule):
        raise SpecError(f"--schedule {schedule!r}: {problem}")
    if time_zone is not None and time_zone not in zoneinfo.available_timezones() - {_OF_THIS_MACHINE}:
        raise SpecError(f"--time-zone {time_zone}: is no name of the time zone database, such as Europe/Berlin")
    return {
        "schedule": schedule,
        **({"timeZone": time_zone} if time_zone else {}),
        **({"suspend": True} if suspend else {}),
    }


def _command(options: RenderOptions, image: str) -> list[str]:
    given = {
        "--name": options.name,
        "--namespace": options.namespace,
        "--image": image,
        "--packs": str(options.packs),
        "--hours": str(options.hours),
        "--queue": options.queue,
        "--priority": options.priority,
        "--worker-cpu": options.sizes.worker_cpu,
        "--worker-memory": options.sizes.worker_memory,
        "--head-memory": options.sizes.head_memory,
    }
    words = [word for option, value in given.items() if value is not None for word in (option, value)]
    return ["cat-cluster", "k8s", "submit", SPEC_FILE, "--no-wait", *(["--gpu"] if options.gpu else []), *words]
