"""Submitting a job to Kubernetes: once per run, as a RayJob; and stopping it, so that it can be gone on with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal

from cat_cluster.cluster.kuberay.checks.check import Document, check_manifests
from cat_cluster.cluster.kuberay.checks.schemas import load_schemas
from cat_cluster.cluster.kuberay.client.api import ROLE, Api, Json
from cat_cluster.cluster.kuberay.client.jobs import JOB_VERBS, RAY, end_text, has_ended, is_held, run_of
from cat_cluster.cluster.kuberay.rendering.pods import RUN_LABEL
from cat_cluster.cluster.kuberay.rendering.render import RenderOptions, expectation_of, render_job, upload_job
from cat_cluster.cluster.submit import is_done
from cat_cluster.errors import KubernetesError, RunError, SpecError, StoreError
from cat_cluster.runs.progress import RunProgress
from cat_cluster.runs.run import Run
from cat_cluster.spec.job import JobSpec
from cat_cluster.store import ObjectStore

POLL_SECONDS = 1.0
GONE_SECONDS = 120.0  # that a deleted RayJob may take to go: the operator stops its Ray job first
_NOT_KNOWN = ("unknown field", "field not declared in schema")  # an API server's words, by how it was asked
STOP_SECONDS = 30.0  # that a driver gets to end its tasks and to say that it has stopped


@dataclass(frozen=True)
class KubernetesSubmission:
    """The result of a submission: the run, and its RayJob, None where the run was already done."""

    run: Run
    outcome: Literal["submitted", "already running", "already done"]
    job: str | None


def check_cluster(api: Api) -> None:
    """Raise KubernetesError unless the cluster has KubeRay and the namespace, and whoever asks may make jobs there."""
    api.required(RAY, "RayJob")
    try:
        if api.get("v1", "Namespace", api.namespace) is None:
            raise KubernetesError(
                f"the cluster of context {api.context} has no namespace {api.namespace}: make it and apply an overlay "
                "(docs/operations.md, From nothing to a served adapter), or give another --namespace or --context",
                HTTPStatus.NOT_FOUND,
            )
    except KubernetesError as error:
        if error.status != HTTPStatus.FORBIDDEN:  # who has rights in a namespace alone may not see it
            raise
    missing = [verb for verb in JOB_VERBS if not api.allows(verb, "ray.io", "rayjobs")]
    if missing:
        raise KubernetesError(
            f"rights are missing in namespace {api.namespace} (context {api.context}): {', '.join(missing)} of "
            f"rayjobs.ray.io; Role {ROLE} of k8s/base gives them: have yourself bound to it",
            HTTPStatus.FORBIDDEN,
        )


def submit_to_kubernetes(
    api: Api, job: JobSpec, store: ObjectStore, options: RenderOptions, *, force: bool = False
) -> KubernetesSubmission:
    """Make the RayJob of a spec unless its run is done or has one that is at work; photos are stored first.

    A suspended one is started; one that has ended without a failure is made again, and goes on from the store. So is
    one of this name that has another run, as where photos at an s3:// address have changed, unless it is at work.
    force: also where the run is done or at work, or has failed. Raises SpecError, ConceptError, BaseModelError,
    StoreError, KubernetesError, and RunError for a run that failed or that something else works on.
    """
    job, run_id = upload_job(job, store)
    run = Run(store, run_id)
    ray_job = render_job(job, store.url, options, run_id=run_id, upload_to=store)
    name = ray_job["metadata"]["name"]
    findings = check_manifests([Document("the rendered job", 1, ray_job)], load_schemas())
    if findings:
        raise SpecError("\n".join(map(str, findings)))
    there = api.get(RAY, "RayJob", name)
    previous = run.progress_or_none(damaged_ok=force)
    if not force:
        if previous is not None and is_done(previous, store):
            return KubernetesSubmission(run, "already done", None)
        found = _job_of_run(api, run, there, options)
        if found is not None:
            return found
        _refuse_another(api, run, name)
        if previous is not None:
            run.refuse_alive(previous)
    if there is not None:
        delete_job(api, name)
    run.withdraw_stop()
    _apply(api, ray_job)
    after = run.last_attempt()
    run.expect(expectation_of(ray_job, options, after=after))
    if previous is not None and previous.state == "done":  # its record would be taken for the end of what begins
        run.write_progress(RunProgress.begin(run_id, job, state="waiting", attempt=after + 1))
    return KubernetesSubmission(run, "submitted", name)


def stop_job(api: Api, job: Json, run: Run | None, say: Callable[[str], None]) -> None:
    """Stop a RayJob: its driver is asked through the store, then it is deleted, and its pods and later tries with it.

    KubeRay suspends no job that has rules of deletion, and Kueue would start one again; what was trained is in the
    store, from which the same job, submitted again, goes on. run: None where it is not known. Raises RunError for a job
    that has ended, KubernetesError.
    """
    name = job["metadata"]["name"]
    if has_ended(job):
        raise RunError(f"RayJob {name} {end_text(job)}: there is nothing to stop")
    try:
        if run is not None:
            _ask_to_stop(run, say)
    except StoreError as error:
        say(f"{error}; RayJob {name} is deleted all the same")
        run = None
    delete_job(api, name)
    if run is not None:
        _record_stop(run)


def delete_job(api: Api, name: str) -> None:
    """Delete a RayJob and wait until it has gone; KubernetesError when it does not."""
    api.delete(RAY, "RayJob", name)
    until = time.monotonic() + GONE_SECONDS
    while api.get(RAY, "RayJob", name) is not None:
        if time.monotonic() > until:
            raise KubernetesError(
                f"RayJob {name} was deleted {GONE_SECONDS:.0f} s ago and is still there: KubeRay's operator "
                "has to let it go; see that it runs, then try again"
            )
        time.sleep(POLL_SECONDS)


def _apply(api: Api, ray_job: Json) -> None:
    """Apply a rendered RayJob; a field that the server does not know is one of KubeRay's, since ours are checked."""
    try:
        api.apply(ray_job)
    except KubernetesError as error:
        if not any(words in str(error) for words in _NOT_KNOWN):
            raise
        raise KubernetesError(
            f"KubeRay's definitions in the cluster of context {api.context} are too old: {error}. Update them and the "
            "operator to 1.6 or later (docs/operations.md, From nothing to a served adapter, step 3); `cat-cluster k8s "
            "doctor` says which are there",
            error.status,
        ) from error


def _job_of_run(api: Api, run: Run, job: Json | None, options: RenderOptions) -> KubernetesSubmission | None:
    """Return the submission of a run whose RayJob is there; None where one is to be made. job: the one of its name.

    Raises RunError for a job that failed, and for one that is at work on another run.
    """
    if job is None or (_is_leaving(job) and not has_ended(job)):
        return None
    name, other = job["metadata"]["name"], run_of(job)
    if other not in (None, run.run_id):
        if has_ended(job) or is_held(job):
            return None
        raise RunError(
            f"RayJob {name} is at work on {other}, which has other photos or another spec: submit again when it has "
            f"ended, or stop it, `cat-cluster k8s stop {name} --namespace {api.namespace}`; --force puts {run.run_id} "
            "in its place"
        )
    if not has_ended(job):
        if is_held(job) and not options.suspend:
            api.merge(RAY, "RayJob", name, {"spec": {"suspend": False}})
            return KubernetesSubmission(run, "submitted", name)
        return KubernetesSubmission(run, "already running", name)
    if job.get("status", {}).get("jobDeploymentStatus") in ("Failed", "ValidationFailed"):
        raise RunError(
            f"RayJob {name} {end_text(job)}; `cat-cluster k8s logs {name} --namespace {api.namespace}` may say "
            "more. When that is mended, --force makes it again: it goes on from what is stored"
        )
    return None


def _is_leaving(job: Json) -> bool:
    return "deletionTimestamp" in job["metadata"]


def _refuse_another(api: Api, run: Run, name: str) -> None:
    """Raise RunError where a RayJob of other sizes, image or name is at work on the run."""
    for other in api.list(RAY, "RayJob", labels=f"{RUN_LABEL}={run.run_id}"):
        its_name = other["metadata"]["name"]
        if its_name != name and not has_ended(other) and not _is_leaving(other):
            raise RunError(
                f"RayJob {its_name} is at work on {run.run_id} already: stop it first, `cat-cluster k8s stop {its_name}"
                f" --namespace {api.namespace}`, or take the run over with --force"
            )


def _ask_to_stop(run: Run, say: Callable[[str], None]) -> None:
    progress = run.progress_or_none(damaged_ok=True)
    if progress is None or progress.state != "running":
        run.withdraw_expectation()  # no driver is at work, and none will come
        return
    run.request_stop(progress.attempt)
    say(f"asked attempt {progress.attempt} of {run.run_id} to stop")
    until = time.monotonic() + STOP_SECONDS
    while time.monotonic() < until and not progress.ended:
        time.sleep(POLL_SECONDS)
        progress = run.progress()


def _record_stop(run: Run) -> None:
    """Record the stop for a driver that went before it could: a run is resumed only when none is at work."""
    progress = run.progress_or_none(damaged_ok=True)
    if progress is not None and not progress.ended:
        run.write_progress(progress.changed(state="stopped"))
