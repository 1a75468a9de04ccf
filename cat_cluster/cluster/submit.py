"""Submitting a job to a Ray cluster: once per run, with its photos where the cluster can read them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from cat_cluster.cluster.ray_jobs import LIVE, RayCluster, connect, explained, stop_jobs
from cat_cluster.data.s3_photos import store_images
from cat_cluster.errors import ClusterError, RunError, SpecError
from cat_cluster.runs.progress import RunProgress
from cat_cluster.runs.queue import enter
from cat_cluster.runs.run import Run, run_id_of
from cat_cluster.spec.job import AdapterSpec, JobSpec
from cat_cluster.spec.yaml_bounds import load_yaml, read_text
from cat_cluster.store import ObjectStore

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

MAX_SUBMISSIONS = 1000  # ids tried for one attempt: each that is taken is a job that ended before its claim


@dataclass(frozen=True)
class Submission:
    """The result of a submission: the run, and the id of its new Ray job, None when the run was already done."""

    run_id: str
    outcome: Literal["submitted", "already done"]
    job: str | None
    storage: str


def submit_run(
    job: JobSpec,
    store: ObjectStore,
    cluster: RayCluster,
    *,
    runtime_env: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Submission:
    """Start a job on a Ray cluster unless its run is done; work that an earlier attempt has stored is not repeated.

    force: also start when the run is done or has a driver, which is then superseded. Raises SpecError for a storage
    that the cluster cannot reach, ConceptError for photos, RunError when a driver is at work, ClusterError, StoreError.
    """
    _refuse_local_files(job, store, cluster)
    store.check_access()
    run = Run(store, run_id_of(job, image_digests_of(job)))
    previous = run.progress_or_none(damaged_ok=force)
    if previous is not None and not force:
        if is_done(previous, store):
            return Submission(run.run_id, "already done", None, store.url)
        run.refuse_alive(previous)
    client = connect(cluster)
    run.write_spec(with_stored_images(job, store).model_copy(update={"storage": store.url}))
    run.withdraw_stop()
    waiting = RunProgress.begin(run.run_id, job, state="waiting", attempt=run.last_attempt() + 1)
    run.write_progress(waiting)
    try:
        submission_id = _start(client, run, job, cluster, runtime_env or {}, force=force)
    except (ClusterError, SpecError):
        run.store.delete(run.progress_key(waiting.attempt))
        if previous is not None:
            run.write_progress(previous)  # it may have been a record of the same attempt
        raise
    return Submission(run.run_id, "submitted", submission_id, store.url)


def enter_run(
    job: JobSpec, store: ObjectStore, *, owner: str, priority: int = 0, deadline: datetime | None = None
) -> tuple[Run, bool]:
    """Enter a job into the queue of a storage, for a training service; False where it waits or is worked on already.

    Its photos are stored first where the storage is no folder. Raises ConceptError for photos, RunError for a value out
    of bounds and when a driver outside of the queue is at work, StoreError.
    """
    store.check_access()
    run = Run(store, run_id_of(job, image_digests_of(job)))
    stored = with_stored_images(job, store).model_copy(update={"storage": store.url})
    _, is_new = enter(run, stored, owner=owner, priority=priority, deadline=deadline)
    return run, is_new


def stop_run(run: Run, cluster: RayCluster | None = None) -> tuple[int, list[str]]:
    """Ask the run's attempt to stop, and Ray to stop its jobs when a cluster is given.

    Returns the attempt and the ids of those jobs. Raises RunError when the run has ended. ClusterError leaves the
    request in the store, where a live driver finds it.
    """
    progress = run.progress()
    if progress.ended:
        raise RunError(f"{run.run_id} is already {progress.state}: there is nothing to stop")
    attempt = max(progress.attempt, run.last_attempt())
    run.request_stop(attempt)
    jobs = [] if cluster is None else stop_jobs(cluster, run.run_id)
    if jobs and run.progress().state == "waiting":  # no driver has begun that would record it
        run.write_progress(run.progress().changed(state="stopped"))
    return attempt, jobs


def read_runtime_env(
    file: Path | None = None, env: Sequence[str] = (), pass_env: Sequence[str] = (), image: str | None = None
) -> dict[str, Any]:
    """Return Ray's runtime environment from a YAML or JSON file, KEY=VALUE pairs, names of variables to copy, an image.

    Of this shell's environment only the named variables are copied. Raises SpecError.
    """
    content: Any = {}
    if file is not None:
        try:
            content = load_yaml(read_text(file)) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise SpecError(f"--runtime-env {file}: cannot be read as YAML or JSON: {error}") from error
    variables = content.get("env_vars") or {} if isinstance(content, dict) else None
    if not isinstance(variables, dict):
        raise SpecError(f"--runtime-env {file}: must hold the keys of a Ray runtime environment, such as env_vars, pip")
    for pair in env:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise SpecError(f"--env {pair}: write it as NAME=VALUE, or use --pass-env NAME to copy one of this shell's")
        variables = {**variables, name: value}
    for name in pass_env:
        if name not in os.environ:
            raise SpecError(f"--pass-env {name}: this shell has no such variable; set it, or leave the option out")
        variables = {**variables, name: os.environ[name]}
    return {
        **content,
        **({"env_vars": variables} if variables else {}),
        **({} if image is None else {"image_uri": image}),
    }


def _refuse_local_files(job: JobSpec, store: ObjectStore, cluster: RayCluster) -> None:
    if cluster.is_loopback:
        return
    if store.url.startswith("file:"):
        raise SpecError(
            f"storage: {store.url} is a folder of this machine, and the cluster at {cluster.address} cannot see it; "
            "use a bucket that both reach, as in storage: s3://bucket/prefix or --storage s3://bucket/prefix"
        )
    for adapter in job.resolved():
        if adapter.training.general_prompts is not None:
            raise SpecError(
                f"training.general_prompts: {adapter.training.general_prompts} is a file of this machine, and the "
                f"cluster at {cluster.address} cannot see it; leave the field out (adapter {adapter.id})"
            )


def image_digests_of(job: JobSpec) -> list[list[str]]:
    """Return per adapter the digests of its photos and captions; ConceptError for what training would refuse."""
    from cat_cluster.data.concepts import image_digests, load_concepts

    return [
        image_digests(load_concepts(adapter.id, adapter.concepts, masked=adapter.training.masked_loss))
        for adapter in job.resolved()
    ]


def is_done(progress: RunProgress, store: ObjectStore) -> bool:
    """Say whether a run is done and its adapters are still published: one may have been deleted since."""
    from cat_cluster.registry.references import manifest_key

    return progress.state == "done" and all(
        adapter.revision is not None and store.exists(manifest_key(adapter.id, adapter.revision))
        for adapter in progress.adapters
    )


def with_stored_images(job: JobSpec, store: ObjectStore) -> JobSpec:
    """Return the job with its photos in the storage, unless that is a folder, which only this machine can read."""
    if store.url.startswith("file:"):
        return job

    def stored(adapter: AdapterSpec) -> AdapterSpec:
        concepts = tuple(
            concept
            if "://" in concept.images
            else concept.model_copy(update={"images": store_images(Path(concept.images), store)})
            for concept in adapter.concepts
        )
        return adapter.model_copy(update={"concepts": concepts})

    return job.model_copy(update={"adapters": tuple(stored(adapter) for adapter in job.adapters)})


def _start(
    client: JobSubmissionClient,
    run: Run,
    job: JobSpec,
    cluster: RayCluster,
    runtime_env: Mapping[str, Any],
    *,
    force: bool,
) -> str:
    """Start the Ray job under the first free id from `<run id>-<next attempt>` on, so that two clients start one."""
    attempt = run.last_attempt() + 1
    for number in range(attempt, attempt + MAX_SUBMISSIONS):
        submission_id = f"{run.run_id}-{number}"
        try:
            with explained(cluster):
                client.submit_job(
                    entrypoint=f"python -m jobs.train --storage {shlex.quote(run.store.url)} --run {run.run_id}",
                    submission_id=submission_id,
                    runtime_env=dict(runtime_env),
                    metadata={"run_id": run.run_id, "name": job.name, "attempt": str(attempt)},
                    entrypoint_num_cpus=0,
                )
            return submission_id
        except (ValueError, TypeError) as error:
            raise SpecError(f"--runtime-env, --env or --image: Ray refuses them: {error}") from error
        except ClusterError as error:
            if not _is_taken(error):
                raise
        with explained(cluster):
            status = client.get_job_status(submission_id).value
        if status in LIVE and not force:
            raise RunError(
                f"{run.run_id} is already submitted: its Ray job {submission_id} is {status}; follow it with "
                f"`{run.follow_command()}`, or submit once more with --force"
            )
    raise RunError(f"{run.run_id} has used up {MAX_SUBMISSIONS} ids on {cluster.address}: start the cluster anew")


def _is_taken(error: ClusterError) -> bool:
    return "already exists" in str(error.__cause__)
