"""Commands for Kubernetes: `k8s render` makes a RayJob of a job spec, `k8s check` reads manifests strictly.

Those for jobs on a cluster are in `k8s_jobs`, and `k8s train-service` has a file of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from cat_cluster.cli.k8s_jobs import logs, status, stop, submit
from cat_cluster.cli.k8s_options import (
    NAMESPACE,
    Context,
    Gpu,
    HeadMemory,
    Hours,
    Image,
    Name,
    Namespace,
    Packs,
    Priority,
    Queue,
    Spec,
    Suspend,
    WorkerCpu,
    WorkerMemory,
    write_manifest,
)
from cat_cluster.cli.k8s_train_service import train_service
from cat_cluster.cli.options import AsJson, people, print_json
from cat_cluster.cli.values import output_file
from cat_cluster.cluster.kuberay.checks.releases import NEWEST, Release
from cat_cluster.errors import SpecError, needs_extra
from cat_cluster.settings import load_settings

if TYPE_CHECKING:
    from cat_cluster.cluster.kuberay.doctor import Finding
    from cat_cluster.cluster.kuberay.rendering.render import RenderOptions

# Training's modules take seconds to import: commands import what they need.

k8s_app = typer.Typer(no_args_is_help=True, help="Kubernetes with KubeRay: jobs on it, and strict checks of manifests.")
for _command in (submit, status, logs, stop, train_service):
    k8s_app.command()(_command)


def mount_k8s(app: typer.Typer) -> None:
    """Add the commands of this file to the command line."""
    app.add_typer(k8s_app, name="k8s")


@k8s_app.command()
def render(
    spec: Spec,
    storage: Annotated[str | None, typer.Option(help="s3:// address. Default: the spec's, else $CAT_STORAGE.")] = None,
    upload: Annotated[
        bool, typer.Option("--upload", help="Put photos in local folders, and a large spec, into the storage.")
    ] = False,
    image: Image = None,
    namespace: Namespace = NAMESPACE,
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
    schedule: Annotated[
        str | None,
        typer.Option(metavar="CRON", help="Times at which a RayCronJob starts the job, such as '0 3 * * *'."),
    ] = None,
    cron_job: Annotated[
        bool,
        typer.Option(
            "--cron-job",
            help="With --schedule: a CronJob instead, for an operator whose feature gate RayCronJob is off.",
        ),
    ] = False,
    time_zone: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Time zone of --schedule. Default: the operator's; with --cron-job that of Kubernetes' controllers.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="<path>", parser=output_file, help="File; default: stdout.")
    ] = None,
) -> None:
    """Write a job spec as a RayJob of Kubernetes, ready for `kubectl apply -f`; it holds the spec.

    With --schedule as a RayCronJob: photos at an s3:// address are looked at anew each time, and what has changed is
    trained. It needs the operator's feature gate RayCronJob, which is off by default. --cron-job writes a CronJob
    instead, whose pod calls `k8s submit`, and needs no gate.
    """
    from cat_cluster.cluster.kuberay.rendering.render import RenderOptions
    from cat_cluster.cluster.kuberay.rendering.sizes import Overrides

    sizes = Overrides(worker_cpu, worker_memory, head_memory)
    options = RenderOptions(name, namespace, image, gpu, packs, hours, suspend, queue, priority, sizes)
    if schedule is None and time_zone is not None:
        raise SpecError(f"--time-zone {time_zone}: is that of a schedule; give --schedule, or leave it out")
    if schedule is None and cron_job:
        raise SpecError("--cron-job: submits a job at the times of --schedule; give that too, or leave it out")
    if schedule is None:
        _render(spec, storage, options, upload=upload, out=out)
    else:
        _render_schedule(spec, storage, options, schedule, time_zone, cron_job=cron_job, upload=upload, out=out)


def _render_schedule(
    spec: Path,
    storage: str | None,
    options: RenderOptions,
    schedule: str,
    time_zone: str | None,
    *,
    cron_job: bool,
    upload: bool,
    out: Path | None,
) -> None:
    from cat_cluster.cluster.kuberay.rendering import schedule as schedules
    from cat_cluster.cluster.kuberay.rendering.render import render_job, sizes_of
    from cat_cluster.cluster.kuberay.rendering.sizes import Overrides
    from cat_cluster.spec.job import load_spec
    from cat_cluster.store import open_store

    if upload:
        raise SpecError(
            "--upload: stores photos once and for all, so each time would train the same; with --schedule "
            "keep them at an s3:// address that you change, and leave --upload out"
        )
    if options.queue is not None and not cron_job:
        raise SpecError(
            "--queue: KubeRay gives the jobs of a RayCronJob no labels, so Kueue would not see them; give --cron-job "
            "too, or leave it out"
        )
    job = load_spec(spec)
    store = open_store(storage or job.storage or load_settings().storage)
    schedules.refuse_large_spec(job, store.url)
    suspend, options = options.suspend, replace(options, suspend=False)
    sizes = sizes_of(job, options)
    if cron_job:  # the job that its pod will make is rendered here, so that what is wrong with it is refused here
        options = replace(options, sizes=Overrides(sizes.worker_cpu, sizes.worker_memory, sizes.head_memory))
    ray_job = render_job(job, store.url, options)
    if cron_job:
        document = schedules.cron_job(ray_job, options, schedule, time_zone, suspend=suspend)
    else:
        document = schedules.ray_cron_job(ray_job, schedule, time_zone, suspend=suspend)
    write_manifest(document, out, sizes.warnings)


def _render(spec: Path, storage: str | None, options: RenderOptions, *, upload: bool, out: Path | None) -> None:
    from cat_cluster.cluster.kuberay.rendering.render import expectation_of, render_job, sizes_of, upload_job
    from cat_cluster.runs.run import Run
    from cat_cluster.spec.job import load_spec
    from cat_cluster.store import open_store

    job = load_spec(spec)
    store = open_store(storage or job.storage or load_settings().storage)
    run_id, warnings = None, sizes_of(job, options).warnings
    if upload:
        from cat_cluster.data.concepts import upload_warnings

        warnings += upload_warnings(job.adapters)
        job, run_id = upload_job(job, store)
    ray_job = render_job(job, store.url, options, run_id=run_id, upload_to=store if upload else None)
    write_manifest(ray_job, out, warnings)
    if run_id is not None:
        run = Run(store, run_id)
        run.expect(expectation_of(ray_job, options, after=run.last_attempt()))
        follow = f"cat-cluster jobs status {run_id} --wait --storage {store.url}"
        people.print(f"follow it  {follow}", soft_wrap=True, markup=False)


@k8s_app.command()
def check(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files of manifests; - is stdin.")],
    crds: Annotated[
        str | None,
        typer.Option(metavar="DIR|URL", help="KubeRay's CRDs. Default: those of --kuberay, which this package has."),
    ] = None,
    restricted: Annotated[bool, typer.Option(help="Whether pods must fit the restricted pod-security profile.")] = True,
    kuberay: Annotated[Release, typer.Option(help="Release of KubeRay that is installed.")] = NEWEST,
    gates: Annotated[
        str,
        typer.Option(metavar="NAME,...", help="Feature gates of the operator that are on beside the default ones."),
    ] = "",
    server: Annotated[
        bool,
        typer.Option("--server", help="Ask the API server too: it applies nothing, and says what it would refuse."),
    ] = False,
    context: Context = None,
    namespace: Namespace = NAMESPACE,
    as_json: AsJson = False,
) -> None:
    """Check manifests before they are applied: unknown fields, what KubeRay's operator refuses, pod security.

    They are read as Kubernetes reads them; the end says what was not looked at. No cluster and no network is needed;
    --server asks a cluster about each object, and about a pod of each template. --namespace is for documents that name
    none. An overlay: `kubectl kustomize k8s/overlays/aws | cat-cluster k8s check -`.
    """
    with needs_extra("k8s", "checking manifests"):
        from cat_cluster.cluster.kuberay.checks.check import check_manifests, not_looked_at, read_manifests
        from cat_cluster.cluster.kuberay.checks.gates import gates_on
        from cat_cluster.cluster.kuberay.checks.schemas import load_schemas

    on = gates_on(gates, kuberay)
    documents = read_manifests(files)
    if not documents:
        raise SpecError(f"{', '.join(files)}: no manifest there; give files that hold some")
    schemas = load_schemas(crds, kuberay)
    findings = check_manifests(documents, schemas, restricted=restricted, gates=on)
    not_asked: Sequence[str] | None = None
    if server:
        from cat_cluster.cluster.kuberay.client.api import open_api
        from cat_cluster.cluster.kuberay.server_check import ask_server

        answer = ask_server(open_api(context, namespace), documents)
        not_asked = answer.not_asked
        known = {(one.file, one.document, one.title, one.field) for one in findings}
        findings += [one for one in answer.findings if (one.file, one.document, one.title, one.field) not in known]
    left = not_looked_at(documents, schemas, restricted=restricted, gates=on, not_asked=not_asked)
    if as_json:
        problems = [asdict(finding) for finding in findings]
        record = {"documents": len(documents), "problems": problems, "not_looked_at": left}
        print_json(record)
        if findings:
            raise typer.Exit(1)
        return
    end = "\n".join(["not looked at:", *(f"- {what}" for what in left)])
    if findings:
        raise SpecError("\n".join([*map(str, findings), end]))
    count = "1 document is" if len(documents) == 1 else f"{len(documents)} documents are"
    people.print(f"{count} right\n{end}", soft_wrap=True, markup=False)


@k8s_app.command()
def doctor(
    context: Context = None,
    namespace: Namespace = NAMESPACE,
    image: Annotated[
        str | None,
        typer.Option(
            metavar="URI", help="Image of the pod that looks from inside. Default: that of RayCluster cat-training."
        ),
    ] = None,
    inside: Annotated[
        bool, typer.Option("--inside/--no-inside", help="Whether a pod tries policies and bucket from inside.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Look whether a cluster is fit for training and serving: a line for each thing, with a remedy where it is not.

    Versions, operator, feature gates, rights, Secrets, storage class, GPUs; and, from a pod that is removed again,
    whether network policies are enforced and the bucket can be used. Exit code 1 where something has to be done.
    """
    with needs_extra("k8s", "asking a cluster"):
        from cat_cluster.cluster.kuberay.client.api import open_api
        from cat_cluster.cluster.kuberay.doctor import examine

    found: list[Finding] = []
    for finding in examine(open_api(context, namespace), image=image, inside=inside):
        found.append(finding)
        if not as_json:
            _show(finding)
    if as_json:
        print_json({"findings": [asdict(finding) for finding in found]})
    if any(finding.state == "problem" for finding in found):
        raise typer.Exit(1)


def _show(finding: Finding) -> None:
    marks = {"ok": "[green]ok[/green]", "problem": "[red]to do[/red]", "unknown": "[yellow]unknown[/yellow]"}
    text = f"{marks[finding.state]}  [bold]{escape(finding.subject)}[/bold]  {escape(finding.text)}"
    Console(emoji=False, highlight=False).print(text, soft_wrap=True)
