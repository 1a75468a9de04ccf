"""The command line. Each command is a few lines that call the library; stdout is for results, stderr for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cat_cluster.cli.jobs import mount
from cat_cluster.cli.k8s import mount_k8s
from cat_cluster.cli.serve import serve
from cat_cluster.errors import CatClusterError
from cat_cluster.settings import load_settings

# Torch and diffusers take seconds to import: commands import what they need, so `--help` and errors come at once.

app = typer.Typer(
    name="cat-cluster",
    help="Teach Stable Diffusion new concepts without making it forget: CAT adapters, measured and published.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
adapters_app = typer.Typer(no_args_is_help=True, help="Look at and manage the adapters of a registry.")
base_app = typer.Typer(no_args_is_help=True, help="Base models.")
pocket_app = typer.Typer(no_args_is_help=True, help="Pocket-SD, the embedded base model.")
spec_app = typer.Typer(no_args_is_help=True, help="Job specs.")
app.add_typer(adapters_app, name="adapters")
app.add_typer(base_app, name="base")
app.add_typer(pocket_app, name="pocket")
app.add_typer(spec_app, name="spec")
mount(app)
app.command()(serve)
mount_k8s(app)

people = Console(stderr=True)
INTERRUPTED = 130

Storage = Annotated[
    str | None, typer.Option("--storage", help="Registry folder. Default: the spec's, else $CAT_STORAGE.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
JudgeOption = typer.Option(help="auto, pocket, pocket-classifier, a CLIP folder or hub id.")
Judge = Annotated[str, JudgeOption]
AdapterRef = Annotated[str, typer.Argument(metavar="ID", help="Adapter id, id@alias or id@revision.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for photos, registry and report.")] = Path("out/demo"),
    as_json: AsJson = False,
) -> None:
    """Teach the embedded base a new object with CAT and with plain LoRA, and show what each did to the rest."""
    from cat_cluster.cli.demo import run_demo

    with _listener() as listener:
        result = run_demo(out, load_settings(), listener)
    if as_json:
        _print_json(json.loads(result.files.json.read_text()))
        return
    people.print(result.table())
    people.print(f"\nReport  {result.files.html}\nPicture {result.files.png}\nNumbers {result.files.json}")
    people.print(f"Try     make serve, or cat-cluster serve --storage {result.storage}")


@app.command()
def train(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="Job spec (YAML); see `cat-cluster spec schema`.")],
    storage: Storage = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster this machine is in. Default: $RAY_ADDRESS, else Ray starts here.")
    ] = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Train in this process, one pack after the other, without Ray.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train, measure and publish every adapter of a job spec. The same spec again resumes, or says it is done."""
    from cat_cluster.spec.job import load_spec
    from cat_cluster.store import open_store

    job = load_spec(spec)
    settings = load_settings()
    store = open_store(storage or job.storage or settings.storage)
    with _listener() as listener:
        if in_process:
            from cat_cluster.pipeline.job import run_job

            results = run_job(job, store, settings, listener)
        else:
            from cat_cluster.cluster.driver import run_on_ray

            results = run_on_ray(job, store.url, settings, listener, address=address)
    if as_json:
        _print_json({"adapters": [result.summary() for result in results], "storage": store.url})
    if any(result.outcome == "failed" for result in results):
        raise typer.Exit(1)


@app.command()
def evaluate(
    adapter: AdapterRef,
    storage: Storage = None,
    images_per_prompt: Annotated[int | None, typer.Option(min=1, help="Seeds per prompt.")] = None,
    judge: Annotated[str | None, JudgeOption] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a published adapter again: KPS, identity, drift from the base, leaks; with 95% intervals."""
    from cat_cluster.pipeline.published_adapters import evaluate_published

    given = {"images_per_prompt": images_per_prompt, "judge": judge}
    changes = {name: value for name, value in given.items() if value is not None}
    with _listener() as listener:
        evaluation = evaluate_published(_registry(storage), adapter, _device(), listener, changes)
    measures = evaluation.to_json()
    if as_json:
        _print_json(measures)
        return
    table = Table(title=f"{adapter} under {measures['judge']['name']}")
    for heading in ("metric", "value", "95% interval"):
        table.add_column(heading)
    for name, interval in measures["intervals"].items():
        low, high = interval
        table.add_row(name, f"{measures[name]:.4f}", f"{low:.4f} to {high:.4f}")
    people.print(table)


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="What to draw; use the concept's token.")],
    out: Annotated[Path, typer.Option(help="PNG file to write; -0, -1 ... are added to its name when count > 1.")],
    adapter: Annotated[str | None, typer.Option(help="Adapter id, id@alias or id@revision. None: the base.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model. Default: the adapter's own, else pocket.")] = None,
    seed: Annotated[int, typer.Option(help="Seed; image i of several uses seed + i.")] = 0,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(min=0, help="Classifier-free guidance; up to 1 means none.")] = 4.0,
    sampler: Annotated[Literal["ddim", "euler", "dpmpp_2m"], typer.Option(help="Sampler.")] = "ddim",
    strength: Annotated[float, typer.Option(help="How strongly the adapter acts; 1 as trained.")] = 1.0,
    count: Annotated[int, typer.Option(min=1, help="Number of images.")] = 1,
    storage: Storage = None,
) -> None:
    """Draw images with an adapter, or with the base model alone."""
    from cat_cluster.pipeline.published_adapters import DrawRequest, draw_images

    request = DrawRequest(prompt, adapter, base, seed, steps, guidance, sampler, strength, count)
    with _listener() as listener:
        paths = draw_images(request, out, _registry(storage) if adapter else None, _device(), listener)
    for path in paths:
        people.print(f"wrote {path}")


@adapters_app.command("list")
def adapters_list(storage: Storage = None, as_json: AsJson = False) -> None:
    """List the adapters of a registry with their aliases and scores."""
    summaries = _registry(storage).list()
    if as_json:
        _print_json({"adapters": [_jsonable(summary) for summary in summaries]})
        return
    table = Table(box=SIMPLE_HEAD)
    for heading in ("adapter", "latest", "revisions", "tokens", "method", "KPS", "drift"):
        table.add_column(heading, no_wrap=heading == "latest", overflow="fold")
    for one in summaries:
        manifest = one.latest
        metrics = manifest.metrics if manifest is not None and manifest.metrics is not None else {}
        table.add_row(
            one.adapter_id,
            "-" if manifest is None else manifest.revision,
            str(len(one.revisions)),
            "-" if manifest is None else " ".join(concept.token for concept in manifest.concepts),
            "-" if manifest is None else manifest.method,
            *(f"{metrics[name]:.3f}" if name in metrics else "-" for name in ("kps", "base_drift")),
        )
    Console().print(table)


@adapters_app.command("show")
def adapters_show(adapter: AdapterRef, storage: Storage = None) -> None:
    """Print the manifest of an adapter: where it comes from, what it holds, how it scored."""
    _print_json(_jsonable(_registry(storage).resolve(adapter)))


@adapters_app.command("verify")
def adapters_verify(adapter: AdapterRef, storage: Storage = None, as_json: AsJson = False) -> None:
    """Check that every object of an adapter is there, whole, untampered and loadable."""
    report = _registry(storage).verify(adapter)
    if as_json:
        _print_json(_jsonable(report))
    elif not report.problems:
        people.print(f"[green]{report.adapter_id}@{report.revision} is whole[/green]")
    for problem in [] if as_json else report.problems:
        people.print(f"[red]{problem}[/red]")
    if report.problems:
        raise typer.Exit(1)


@adapters_app.command("export")
def adapters_export(
    adapter: AdapterRef,
    fmt: Annotated[Literal["diffusers", "peft", "kohya"], typer.Option("--format", help="File format.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    storage: Storage = None,
) -> None:
    """Write an adapter's weights in the format of another tool."""
    from cat_cluster.lora.formats import write_adapter

    registry = _registry(storage)
    manifest = registry.resolve(adapter)
    tokens = " ".join(concept.token for concept in manifest.concepts)
    metadata = {"adapter": manifest.name, "tokens": tokens, "base_fingerprint": manifest.base_fingerprint}
    weights = registry.load_weights(manifest)
    people.print(f"wrote {write_adapter(weights, out, fmt, adapter_id=manifest.adapter_id, metadata=metadata)}")


@adapters_app.command("import")
def adapters_import(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Adapter file (.safetensors), or the folder it is in.")],
    adapter_id: Annotated[str, typer.Option("--id", help="Name it gets here: a-z, 0-9 and -.")],
    token: Annotated[list[str], typer.Option(help="Trigger word it was taught; once per concept.")],
    class_noun: Annotated[list[str], typer.Option(help="What each concept is an example of, such as cup.")],
    photos: Annotated[list[Path] | None, typer.Option(help="Folder of each concept's photos, to measure it.")] = None,
    base: Annotated[str, typer.Option(help="Base model it was made for.")] = "pocket",
    images_per_prompt: Annotated[int, typer.Option(min=1, help="Seeds per prompt when it is measured.")] = 4,
    judge: Judge = "auto",
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Publish an adapter that PEFT, diffusers or kohya made. With photos it is measured, as a trained one is."""
    from cat_cluster.pipeline.importing import ImportRequest, import_adapter
    from cat_cluster.spec.sections import EvaluationSpec

    evaluation = EvaluationSpec(images_per_prompt=images_per_prompt, judge=judge)
    request = ImportRequest(file, adapter_id, token, class_noun, photos or (), base, evaluation)
    with _listener() as listener:
        manifest = import_adapter(request, _registry(storage), _device(), listener)
    if as_json:
        _print_json({"id": manifest.adapter_id, "revision": manifest.revision, "rank": manifest.rank})
        return
    measured = "measured" if manifest.metrics else "not measured: give --photos to measure it"
    people.print(f"published {manifest.name}, rank {manifest.rank}, {measured}")


@adapters_app.command("alias")
def adapters_alias(
    adapter_id: Annotated[str, typer.Argument(metavar="ID", help="Adapter id.")],
    alias: Annotated[str, typer.Argument(help="Alias, for example prod.")],
    revision: Annotated[str | None, typer.Argument(help="Revision it shall name; none prints its history.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the alias away; its history stays.")] = False,
    storage: Storage = None,
) -> None:
    """Move an alias to a revision, take it away, or print its history (always printed)."""
    registry = _registry(storage)
    if remove and revision is not None:
        raise typer.BadParameter("give a revision or --remove, not both")
    if remove:
        registry.remove_alias(adapter_id, alias)
    elif revision is not None:
        registry.set_alias(adapter_id, alias, revision)
    _print_json({"alias": alias, "history": [_jsonable(move) for move in registry.alias_history(adapter_id, alias)]})


@adapters_app.command("delete")
def adapters_delete(
    adapter_id: Annotated[str, typer.Argument(metavar="ID", help="Adapter id.")],
    revision: Annotated[str, typer.Argument(help="Revision to delete; refused while an alias names it.")],
    storage: Storage = None,
) -> None:
    """Delete a revision of an adapter for good."""
    _registry(storage).delete(adapter_id, revision)
    people.print(f"deleted {adapter_id}@{revision}")


@base_app.command("path")
def base_path(name: Annotated[str, typer.Argument(help="pocket, a diffusers folder, or a hub id.")]) -> None:
    """Print the diffusers folder of a base model."""
    from cat_cluster.models.base_model import base_folder

    typer.echo(base_folder(name))


@pocket_app.command("pretrain")
def pocket_pretrain(
    out: Annotated[Path, typer.Option(help="Folder for the weights; interrupted work there is resumed.")],
    minutes: Annotated[float | None, typer.Option(help="Wall-clock budget of all stages; none: the recipe's.")] = None,
    compile_unet: Annotated[bool, typer.Option("--compile", help="Compile the U-Net (needs a C++ compiler).")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the world and of every model.")] = 0,
) -> None:
    """Pretrain Pocket-SD from scratch on its procedural world: hours on a CPU, minutes on a GPU. Resumable."""
    from cat_cluster.models.pocket.pretrain import pretrain

    pretrain(out, minutes=minutes, device=_device(), compile=compile_unet, seed=seed)


@pocket_app.command("grid")
def pocket_grid(
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("pocket-grid.png"),
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
) -> None:
    """Draw a grid of what Pocket-SD knows."""
    from cat_cluster.models.base_model import base_folder
    from cat_cluster.models.pocket.quality import prompt_grid

    people.print(f"wrote {prompt_grid(base_folder('pocket'), out, seed)}")


@spec_app.command("check")
def spec_check(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="Job spec (YAML).")], as_json: AsJson = False
) -> None:
    """Check a job spec and its photos without training anything."""
    from cat_cluster.data.concepts import check_tokens, load_concept
    from cat_cluster.spec.job import load_spec

    adapters = load_spec(spec).resolved()
    for adapter in adapters:
        check_tokens([load_concept(concept) for concept in adapter.concepts])
    if as_json:
        _print_json({"adapters": [adapter.model_dump(mode="json") for adapter in adapters]})
        return
    for adapter in adapters:
        tokens = ", ".join(f"{concept.token} {concept.class_noun}" for concept in adapter.concepts)
        people.print(f"[green]ok[/green] {adapter.id}: {tokens}; {adapter.method}, {adapter.training.steps} steps")


@spec_app.command("schema")
def spec_schema() -> None:
    """Print the JSON schema of a job spec, for editors and checks."""
    from cat_cluster.spec.job import spec_json_schema

    _print_json(spec_json_schema())


def main() -> NoReturn:
    """Run the command line; an expected error prints its message and exits with code 1."""
    try:
        app()
    except CatClusterError as error:
        people.print("[bold red]error[/bold red]", end=" ")
        people.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # Typer turns the interrupt of a command into its exit code
            people.print("interrupted; run the same command again to continue")
        raise
    sys.exit(0)


@contextmanager
def _listener() -> Iterator[Any]:
    from transformers.utils import logging

    from cat_cluster.cli.job_bars import TerminalListener

    logging.disable_progress_bar()  # its bars for files that load in a moment would tear ours apart
    # stdout is for the result alone, and Ray prints its warnings there.
    with redirect_stdout(sys.stderr), TerminalListener(people) as listener:
        yield listener


def _device() -> str:
    from cat_cluster.models.base_model import choose_device

    return choose_device(load_settings().device)


def _registry(storage: str | None) -> Any:
    from cat_cluster.registry import Registry
    from cat_cluster.store import open_store

    return Registry(open_store(storage or load_settings().storage))


def _jsonable(value: Any) -> Any:
    from dataclasses import asdict, is_dataclass

    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, indent=2, sort_keys=False, allow_nan=False) + "\n")
