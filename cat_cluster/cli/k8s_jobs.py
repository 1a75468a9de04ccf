"""Commands for jobs on Kubernetes: `k8s submit|status|logs|stop`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from cat_cluster.cli.jobs import run_json
from cat_cluster.cli.k8s_options import (
    NAMESPACE,
    Context,
    Gpu,
    HeadMemory,
    Hours,
    Image,
    Job,
    Name,
    Namespace,
    Packs,
    Priority,
    Queue,
    Spec,
    Suspend,
    WorkerCpu,
    WorkerMemory,
)
from cat_cluster.cli.options import AsJson, people, print_json
from cat_cluster.errors import KubernetesError, needs_extra
from cat_cluster.spec.choices import JobLog

if TYPE_CHECKING:
    from cat_cluster.cluster.kuberay.client.api import Api
    from cat_cluster.cluster.kuberay.submit import KubernetesSubmission

# The client of Kubernetes and training's modules take seconds to import: commands import what they need.


def submit(
    spec: Spec,
    storage: Annotated[
        str | None,
        typer.Option(help="s3:// address. Default: the spec's, else $CAT_STORAGE, else that of the namespace's pods."),
    ] = None,
    wait: Annotated[bool, typer.Option(help="Follow the run to its end; exit 1 if it fails.")] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Start also when the run is done, has failed, or is at work.")
    ] = False,
    context: Context = None,
    namespace: Namespace = NAMESPACE,
    image: Image = None,
    name: Name = None,
    gpu: Gpu = False,
    packs: Packs = 1,
    hours: Hours = 24,
    suspend: Suspend = False,
    queue: Queue = None,
    priority: Priority = None,
    worker_cpu: WorkerCpu = None,
    worker_memory: WorkerMemory = None,
    head_memory: HeadMemory = None,
    as_json: AsJson = False,
) -> None:
    """Train a job spec on a Ray cluster of its own in Kubernetes, and follow it to its end.

    Photos go into the storage first; a storage in the cluster is reached through a port that this command forwards. The
    same spec again resumes, or says that it is running or done. Example: cat-cluster k8s submit job.yaml
    """
    with needs_extra("k8s", "submitting to Kubernetes"):
        from cat_cluster.cluster.kuberay.submit import check_cluster, submit_to_kubernetes
    from cat_cluster.cluster.kuberay.client.storage import pod_settings, storage_of, storage_reached
    from cat_cluster.cluster.kuberay.rendering.render import RenderOptions, check_options, sizes_of
    from cat_cluster.cluster.kuberay.rendering.sizes import Overrides
    from cat_cluster.data.concepts import upload_warnings
    from cat_cluster.spec.job import load_spec
    from cat_cluster.store import open_store

    sizes = Overrides(worker_cpu, worker_memory, head_memory)
    options = RenderOptions(name, namespace, image, gpu, packs, hours, suspend, queue, priority, sizes)
    check_options(options)
    job = load_spec(spec)
    for warning in (*sizes_of(job, options).warnings, *upload_warnings(job.adapters)):
        _say(f"warning: {warning}")
    api = _open(context, namespace)
    check_cluster(api)
    settings = pod_settings(api, _say)
    url = storage_of(storage, job.storage, settings, _say)
    with storage_reached(api, settings, _say):
        submission = submit_to_kubernetes(api, job, open_store(url), options, force=force)
        _say(_outcome_text(submission))
        if submission.outcome == "already done" or (wait and not suspend):
            _follow(api, submission, as_json=as_json)
            return
    if as_json:
        run = submission.run
        record = {"run_id": run.run_id, "outcome": submission.outcome, "job": submission.job, "storage": run.store.url}
        print_json(record)


def status(
    job: Annotated[
        str | None,
        typer.Argument(metavar="[RUN|JOB]", help="Run, or the name of its RayJob. Default: all of the namespace."),
    ] = None,
    context: Context = None,
    namespace: Namespace = NAMESPACE,
    as_json: AsJson = False,
) -> None:
    """Show how the jobs of a namespace stand; given one, also its pods, and what is in its way.

    How far its adapters are is in the storage: cat-cluster jobs status RUN --storage s3://bucket/prefix
    """
    api = _open(context, namespace)
    from cat_cluster.cluster.kuberay.client.jobs import RAY, find_job
    from cat_cluster.cluster.kuberay.obstacles.states import job_state

    if job is not None:
        _show_job(api, find_job(api, job), as_json=as_json)
        return
    api.required(RAY, "RayJob")
    found = sorted(api.list(RAY, "RayJob"), key=lambda one: one["metadata"].get("creationTimestamp", ""), reverse=True)
    workloads = _workloads(api, found)
    states = [job_state(one, workloads, now=api.now()) for one in found]
    if as_json:
        print_json({"jobs": [asdict(one) for one in states]})
    elif states:
        from cat_cluster.cli.k8s_status import jobs_table, print_table

        print_table(jobs_table(states))
    else:
        _say(f"no RayJobs in namespace {api.namespace}; --namespace and --context say where else to look")


def logs(
    job: Job,
    of: Annotated[
        JobLog, typer.Option(help="The driver's, or what Ray prints in the head or the workers of its cluster.")
    ] = "driver",
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until it ends; of several workers all at once.")
    ] = False,
    context: Context = None,
    namespace: Namespace = NAMESPACE,
) -> None:
    """Print the log of a job: what its driver says, or Ray in its pods; of several pods each line names its own."""
    api = _open(context, namespace)
    from cat_cluster.cluster.kuberay.client.jobs import find_job
    from cat_cluster.cluster.kuberay.job_logs import pods_of_part, read_logs

    for piece in read_logs(api, pods_of_part(api, find_job(api, job), of), follow=follow, say=_say):
        sys.stdout.write(piece)
        sys.stdout.flush()


def stop(
    job: Job,
    storage: Annotated[
        str | None, typer.Option(help="Storage the job was submitted with. Default: as the job itself says.")
    ] = None,
    context: Context = None,
    namespace: Namespace = NAMESPACE,
    as_json: AsJson = False,
) -> None:
    """Stop a job: its run is asked to stop, and its pods go. Submitting the same spec again resumes it."""
    api = _open(context, namespace)
    from cat_cluster.cluster.kuberay.client.jobs import find_job, run_of, storage_of_run
    from cat_cluster.cluster.kuberay.client.storage import pod_settings, storage_reached
    from cat_cluster.cluster.kuberay.submit import stop_job
    from cat_cluster.runs.run import Run
    from cat_cluster.store import open_store

    found = find_job(api, job)
    name, run_id, url = found["metadata"]["name"], run_of(found), storage or storage_of_run(found)
    with ExitStack() as stack:
        run = None
        if run_id is not None and url is not None:
            try:
                stack.enter_context(storage_reached(api, pod_settings(api, _say), _say))
                run = Run(open_store(url), run_id)
            except KubernetesError as error:  # a job must not run on because its storage is away
                _say(f"{error}; RayJob {name} is deleted all the same")
        stop_job(api, found, run, _say)
    if as_json:
        print_json({"job": name, "run_id": run_id, "storage": url})
        return
    _say(f"stopped RayJob {name}: it is deleted, and its pods go")
    if run_id is not None:
        _say("what was trained is in the storage: `cat-cluster k8s submit` with the same spec goes on from there")


def _open(context: str | None, namespace: str) -> Api:
    with needs_extra("k8s", "a cluster of Kubernetes"):
        from cat_cluster.cluster.kuberay.client.api import open_api

    return open_api(context, namespace)


def _show_job(api: Api, job: dict[str, Any], *, as_json: bool) -> None:
    from cat_cluster.cli.k8s_status import age_text, pods_table, pods_text, print_table
    from cat_cluster.cluster.kuberay.obstacles.obstacles import obstacles_of
    from cat_cluster.cluster.kuberay.obstacles.states import job_state, pod_state
    from cat_cluster.cluster.kuberay.obstacles.view import view_job

    view = view_job(api, job)
    now = api.now()
    state, pods = job_state(job, view.workloads or (), now=now), [pod_state(pod) for pod in view.pods]
    obstacles = obstacles_of(view, now=now)
    if as_json:
        listed = {"pods": [asdict(one) for one in pods], "obstacles": [asdict(one) for one in obstacles]}
        print_json({**asdict(state), **listed})
        return
    console = Console(emoji=False)
    ready = f", {pods_text(state)} pods ready" if state.pods_asked is not None else ""
    console.print(f"{state.job}: {state.state}{ready}, {age_text(state.age)} old", markup=False, highlight=False)
    if pods:
        print_table(pods_table(pods))
    for obstacle in obstacles:
        console.print(f"- {obstacle}", markup=False, highlight=False, soft_wrap=True)
    if state.run is not None:
        _say(f"its adapters  cat-cluster jobs status {state.run} --storage {state.storage or 's3://...'}")


def _workloads(api: Api, jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return Kueue's Workloads where a job waits for them; none where they may not be seen."""
    from cat_cluster.cluster.kuberay.client.jobs import QUEUE_LABEL
    from cat_cluster.cluster.kuberay.obstacles.view import list_workloads

    if not any(QUEUE_LABEL in job["metadata"].get("labels", {}) for job in jobs):
        return []
    try:
        return list_workloads(api) or []
    except KubernetesError as error:
        if error.status != HTTPStatus.FORBIDDEN:
            raise
        _say(f"places in queues are not known: {error}")
        return []


def _outcome_text(submission: KubernetesSubmission) -> str:
    run = submission.run.run_id
    if submission.outcome == "already done":
        return f"{run} is already done; --force runs it again"
    if submission.outcome == "already running":
        return f"{run} is already on its way as RayJob {submission.job}"
    return f"submitted {run} as RayJob {submission.job}"


def _follow(api: Api, submission: KubernetesSubmission, *, as_json: bool) -> None:
    """Show a run until it ends; exit code 1 when it failed or was stopped, 130 on Ctrl+C, which leaves it running."""
    from cat_cluster.cli.run_status import RunBars
    from cat_cluster.cluster.follow import follow_run
    from cat_cluster.cluster.kuberay.client.kubeconfig import IN_CLUSTER
    from cat_cluster.cluster.kuberay.followed_job import FollowedJob

    run, job = submission.run, submission.job
    try:
        with RunBars(people) as bars:
            progress = follow_run(run, bars, None if job is None else FollowedJob(api, job, run, bars))
    except KeyboardInterrupt:
        where = f" --namespace {api.namespace}"
        if api.context != IN_CLUSTER:
            where += f" --context {shlex.quote(api.context)}"
        _say("\ndetached; the run continues")
        _say(f"follow it  the same command again, or cat-cluster k8s logs {job} --follow{where}")
        _say(f"stop it    cat-cluster k8s stop {job}{where}")
        raise typer.Exit(130) from None
    if as_json:
        print_json(run_json(progress))
    if progress.state != "done":
        raise typer.Exit(1)


def _say(text: str) -> None:
    people.print(text, markup=False, highlight=False, soft_wrap=True)
