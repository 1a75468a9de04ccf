"""Commands for jobs on a Ray cluster: `submit` and `jobs list|status|logs|stop`."""

from __future__ import annotations

import getpass
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cat_cluster.cli.options import AsJson, Storage, people, print_json
from cat_cluster.errors import SpecError
from cat_cluster.runs.listing import list_runs
from cat_cluster.runs.progress import RunProgress, is_alive
from cat_cluster.runs.run import Run
from cat_cluster.runs.services import read_services
from cat_cluster.settings import load_settings
from cat_cluster.store import ObjectStore, open_store

# Ray takes a second to import and the photos' readers more: commands import what they need.

jobs_app = typer.Typer(no_args_is_help=True, help="Runs on a Ray cluster: their status, their logs, and stopping them.")

StoreOption = Annotated[
    str | None,
    typer.Option("--storage", help="Storage the job was submitted with. Default: $CAT_STORAGE, else ./cat-storage."),
]
AddressOption = typer.Option(
    "--address", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, http://HOST:8265."
)
Address = Annotated[str | None, AddressOption]
RequiredAddress = Annotated[str, AddressOption]
Token = Annotated[
    str | None,
    typer.Option("--token", help="Token of the cluster. Default: $RAY_AUTH_TOKEN or the file $RAY_AUTH_TOKEN_PATH."),
]
CaFile = Annotated[
    Path | None, typer.Option("--ca", exists=True, dir_okay=False, help="Certificates to trust for an https address.")
]
InQueue = Annotated[
    bool, typer.Option("--queue", help="Have the training service of the storage train it; needs no address.")
]
Owner = Annotated[
    str, typer.Option(help="With --queue: whose share of the places it takes. Default: you.", show_default=False)
]
Priority = Annotated[
    int, typer.Option(min=-100, max=100, help="With --queue: higher goes first, before other owners too.")
]
Deadline = Annotated[
    datetime | None,
    typer.Option(
        formats=["%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%dT%H:%M%z"],
        help="With --queue: goes before your own runs that have a later one or none, as 2026-12-01T09:00+01:00.",
    ),
]
Wait = Annotated[bool, typer.Option("--wait", help="Follow the run to its end; exit 1 if it fails.")]
Force = Annotated[
    bool, typer.Option("--force", help="Start also when the run is done, or take it over from its driver.")
]
RuntimeEnv = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="Ray runtime environment of the job, a YAML or JSON file."),
]
Env = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="Environment variable of the job; may be repeated.")
]
PassEnv = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Variable of this shell to copy into the job's; the dashboard shows it."),
]
Image = Annotated[str | None, typer.Option(metavar="URI", help="Container image the job runs in.")]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="Run, as `jobs list` prints it.")]


def mount_jobs(app: typer.Typer) -> None:
    """Add the commands of this file to the command line."""
    app.command()(submit)
    app.add_typer(jobs_app, name="jobs")


def submit(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="Job spec (YAML); see `cat-cluster spec schema`.")],
    address: Address = None,
    storage: Storage = None,
    queue: InQueue = False,
    owner: Owner = "",
    priority: Priority = 0,
    deadline: Deadline = None,
    wait: Wait = False,
    force: Force = False,
    token: Token = None,
    ca: CaFile = None,
    runtime_env: RuntimeEnv = None,
    env: Env = None,
    pass_env: PassEnv = None,
    image: Image = None,
    as_json: AsJson = False,
) -> None:
    """Train a job spec on a Ray cluster. The same spec again resumes, or says that it is running or done.

    Example: cat-cluster submit job.yaml --address http://127.0.0.1:8265 --storage s3://bucket/cat --wait
    """
    from cat_cluster.cluster.ray_jobs import open_cluster
    from cat_cluster.cluster.submit import read_runtime_env, submit_run
    from cat_cluster.data.concepts import upload_warnings
    from cat_cluster.runs.entering import enter_run
    from cat_cluster.spec.job import load_spec

    of_a_job = {"--runtime-env": runtime_env, "--env": env, "--pass-env": pass_env, "--image": image, "--force": force}
    of_the_queue = {"--owner": owner, "--priority": priority, "--deadline": deadline}
    _refuse_given(of_a_job if queue else of_the_queue, "goes without --queue" if queue else "goes with --queue alone")
    if not queue and address is None:
        raise SpecError("--address: give the cluster's dashboard, http://HOST:8265; or --queue for a training service")
    job = load_spec(spec)
    for warning in upload_warnings(job.adapters):
        people.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    store = open_store(storage or job.storage or load_settings().storage)
    if queue:
        if job.cluster.model_fields_set:
            people.print("warning: cluster: has no effect in a training service, which has settings of its own")
        entered = enter_run(job, store, owner=owner or getpass.getuser(), priority=priority, deadline=deadline)
        _say_entered(*entered, wait=wait, as_json=as_json)
        return
    assert address is not None
    cluster = open_cluster(address, token, ca)
    environment = read_runtime_env(runtime_env, env or (), pass_env or (), image)
    submission = submit_run(job, store, cluster, runtime_env=environment, force=force)
    run = Run(store, submission.run_id)
    if submission.outcome == "already done":
        people.print(f"{run.run_id} is already done; --force runs it again", soft_wrap=True)
    else:
        people.print(f"submitted {run.run_id} as Ray job {submission.job}", soft_wrap=True)
    if wait:
        _follow(run, address, token, ca, as_json=as_json)
        return
    if as_json:
        record = {"run_id": run.run_id, "outcome": submission.outcome, "job": submission.job, "storage": store.url}
        print_json(record)
    elif submission.job is not None:
        people.print(f"follow it  {_follow_command(run, address)}", soft_wrap=True, markup=False)


def _say_entered(run: Run, is_new: bool, *, wait: bool, as_json: bool) -> None:
    as_before = "is in the queue already, with the owner, priority and deadline that it was entered with"
    people.print(f"{run.run_id} {'waits in the queue' if is_new else as_before}", soft_wrap=True)
    if wait:
        _follow(run, None, None, None, as_json=as_json)
    elif as_json:
        print_json({"run_id": run.run_id, "outcome": "queued" if is_new else "in the queue", "storage": run.store.url})
    else:
        people.print(f"follow it  {run.follow_command()}", soft_wrap=True, markup=False)


def _refuse_given(options: Mapping[str, object], why: str) -> None:
    for name, value in options.items():
        if value:
            raise SpecError(f"{name} {why}: leave it out")


@jobs_app.command("list")
def jobs_list(storage: StoreOption = None, as_json: AsJson = False) -> None:
    """List the runs of a storage, newest first."""
    from cat_cluster.cli.run_status import runs_table

    store = _store(storage)
    runs, damaged = list_runs(store)
    for run_id in damaged:
        people.print(f"[red]the record of {run_id} is damaged[/red]: submit its job again with --force", soft_wrap=True)
    if as_json:
        print_json({"runs": [run_json(run) for run in runs], "damaged": damaged})
    elif runs:
        Console(emoji=False).print(runs_table(runs))
    else:
        people.print(f"no runs in storage {store.url}; give --storage if they are in another", soft_wrap=True)


@jobs_app.command("status")
def jobs_status(
    run_id: RunId,
    storage: StoreOption = None,
    wait: Wait = False,
    address: Address = None,
    token: Token = None,
    ca: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Show the status of a run: the state, step, losses, and metrics or error of every adapter.

    It reads the storage alone; with --wait and --address it also asks the cluster when the driver is silent.
    """
    from cat_cluster.cli.run_status import adapters_table, state_text

    run = Run(_store(storage), run_id)
    if wait:
        _follow(run, address, token, ca, as_json=as_json)
        return
    progress = run.progress()
    if as_json:
        print_json(run_json(progress))
        return
    console = Console(emoji=False)
    console.print(f"{progress.run_id} ({progress.name})", markup=False, highlight=False)
    reason = f": {progress.reason}" if progress.reason else ""
    console.print(
        f"{state_text(progress)}, attempt {progress.attempt}{reason}", markup=False, highlight=False, soft_wrap=True
    )
    console.print(adapters_table(progress))


@jobs_app.command("services")
def jobs_services(storage: StoreOption = None, as_json: AsJson = False) -> None:
    """List the training services of a storage: their slots, who trains with whom, and how much waits."""
    from cat_cluster.cli.run_status import services_table

    store = _store(storage)
    services = read_services(store)
    if as_json:
        print_json({"services": [service.model_dump(mode="json") for service in services]})
    elif services:
        Console(emoji=False).print(services_table(services))
    else:
        people.print(
            f"no training service in storage {store.url}: start one with `cat-cluster train-service`", soft_wrap=True
        )


@jobs_app.command("logs")
def jobs_logs(
    run_id: RunId,
    address: RequiredAddress,
    token: Token = None,
    ca: CaFile = None,
) -> None:
    """Print the log of a run's last Ray job on the cluster."""
    from cat_cluster.cluster.ray_jobs import job_logs, open_cluster
    from cat_cluster.errors import ClusterError
    from cat_cluster.runs.run import check_run_id

    check_run_id(run_id)
    try:
        typer.echo(job_logs(open_cluster(address, token, ca), run_id), nl=False)
    except ClusterError as error:
        raise ClusterError(
            f"{error}\nThe log is kept by the cluster only; the run's status is in the storage: "
            f"`cat-cluster jobs status {run_id}`"
        ) from error


@jobs_app.command("stop")
def jobs_stop(
    run_id: RunId,
    storage: StoreOption = None,
    address: Address = None,
    token: Token = None,
    ca: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Ask a run to stop; with --address its Ray jobs are stopped too. Submitting the job again resumes it."""
    from cat_cluster.cluster.ray_jobs import open_cluster
    from cat_cluster.cluster.submit import stop_run

    run = Run(_store(storage), run_id)
    attempt, jobs = stop_run(run, None if address is None else open_cluster(address, token, ca))
    if as_json:
        print_json({"run_id": run_id, "attempt": attempt, "jobs": jobs})
        return
    people.print(f"asked attempt {attempt} of {run_id} to stop", soft_wrap=True)
    for job in jobs:
        people.print(f"stopping Ray job {job}", soft_wrap=True)


def _follow(run: Run, address: str | None, token: str | None, ca: Path | None, *, as_json: bool) -> None:
    """Show a run until it ends; exit code 1 when it failed or was stopped, 130 on Ctrl+C, which leaves it running."""
    from cat_cluster.cli.run_status import RunBars
    from cat_cluster.cluster.follow import RayCarrier, follow_run
    from cat_cluster.cluster.ray_jobs import open_cluster

    carrier = None if address is None else RayCarrier(run, open_cluster(address, token, ca))
    try:
        with RunBars(people) as bars:
            progress = follow_run(run, bars, carrier)
    except KeyboardInterrupt:
        people.print("\ndetached; the run continues", soft_wrap=True)
        people.print(f"follow it  {_follow_command(run, address)}", soft_wrap=True, markup=False)
        people.print(f"stop it    cat-cluster jobs stop {run.run_id}{_options(run, address)}", soft_wrap=True)
        raise typer.Exit(130) from None
    if as_json:
        print_json(run_json(progress))
    if progress.state != "done":
        raise typer.Exit(1)


def _follow_command(run: Run, address: str | None) -> str:
    return f"cat-cluster jobs status {run.run_id} --wait{_options(run, address)}"


def _options(run: Run, address: str | None) -> str:
    return f" --storage {run.store.url}" + (f" --address {address}" if address else "")


def run_json(progress: RunProgress) -> dict[str, Any]:
    """Return the JSON of a run's state."""
    return {**progress.model_dump(mode="json"), "alive": is_alive(progress)}


def _store(storage: str | None) -> ObjectStore:
    return open_store(storage or load_settings().storage)
