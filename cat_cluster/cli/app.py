"""The command line. Each command is a few lines that call the library; stdout is for results, stderr for people."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.table import Table

from cat_cluster.cli.adapters import mount_adapters
from cat_cluster.cli.generate import generate
from cat_cluster.cli.jobs import mount_jobs
from cat_cluster.cli.k8s import mount_k8s
from cat_cluster.cli.options import (
    LARGEST_FIRST_SEED,
    AdapterReference,
    AsJson,
    JudgeOption,
    Storage,
    device,
    open_registry,
    people,
    print_json,
    progress,
)
from cat_cluster.cli.serve import serve
from cat_cluster.cli.train_service import train_service
from cat_cluster.cli.values import above_zero, check_all_values, output_folder, png_file
from cat_cluster.errors import BaseModelError, CatClusterError, needs_extra
from cat_cluster.settings import load_settings
from cat_cluster.spec.characters import shown_name
from cat_cluster.spec.fields import LARGEST_COUNT

if TYPE_CHECKING:
    from cat_cluster.data.concepts import Concept

# Torch and diffusers take seconds to import: commands import what they need, so `--help` and errors come at once.

app = typer.Typer(
    name="cat-cluster",
    help="Teach Stable Diffusion new concepts without making it forget: CAT adapters, measured and published.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
base_app = typer.Typer(no_args_is_help=True, help="Base models.")
pocket_app = typer.Typer(no_args_is_help=True, help="The embedded base models: Pocket-SD and Pocket-XL.")
spec_app = typer.Typer(no_args_is_help=True, help="Job specs.")
app.add_typer(base_app, name="base")
app.add_typer(pocket_app, name="pocket")
app.add_typer(spec_app, name="spec")
app.command()(serve)
app.command("train-service")(train_service)
mount_jobs(app)
mount_adapters(app)
mount_k8s(app)

INTERRUPTED = 130
_UsageError: Any = typer.BadParameter.__mro__[1]  # the class of every error in the words of a command


@app.command()
def demo(
    out: Annotated[Path, typer.Option(callback=output_folder, help="Folder for photos, registry and report.")] = Path(
        "out/demo"
    ),
    base: Annotated[Literal["pocket", "pocket-xl"], typer.Option(help="Which embedded base.")] = "pocket",
    as_json: AsJson = False,
) -> None:
    """Teach an embedded base three new objects with CAT and with plain LoRA, and show what each did to the rest.

    It needs no photos, no download and no GPU, and leaves a report and a registry that `cat-cluster serve` can serve.
    """
    with needs_extra("cluster,serve", "the demo"):
        import_module("fastapi")  # of the service that it starts at its end: better missed before training than after
        from cat_cluster.cli.demo import run_demo

    with progress() as listener:
        result = run_demo(out, load_settings(), listener, base)
    if as_json:
        print_json(json.loads(result.files.json.read_text()))
        return
    people.print(result.table())
    files = result.files
    people.print(f"\nReport  {files.html}\nPicture {files.png}\nStacks  {files.stacks}\nNumbers {files.json}")
    chosen = "" if base == "pocket" else f"--base {base} "
    people.print(f"Try     make serve, or cat-cluster serve {chosen}--storage {result.storage}")


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
    """Train, measure and publish every adapter of a job spec. The same spec again resumes, or says it is done.

    Example: cat-cluster train jobs/specs/single.yaml --storage ./cat-storage
    """
    from cat_cluster.models.base_names import check_bases
    from cat_cluster.spec.job import load_spec
    from cat_cluster.store import open_store

    job = load_spec(spec)
    check_bases(job.resolved())  # before training's modules are loaded
    settings = load_settings()
    store = open_store(storage or job.storage or settings.storage)
    with progress() as listener:
        if in_process:
            from cat_cluster.pipeline.job import run_job

            results = run_job(job, store, settings, listener)
        else:
            with needs_extra("cluster", "training on Ray", "; or train in this process with --in-process"):
                from cat_cluster.cluster.driver import run_on_ray

            results = run_on_ray(job, store.url, settings, listener, address=address)
    if as_json:
        print_json({"adapters": [result.summary() for result in results], "storage": store.url})
    if any(result.outcome == "failed" for result in results):
        raise typer.Exit(1)


@app.command()
def evaluate(
    adapter: AdapterReference,
    storage: Storage = None,
    images_per_prompt: Annotated[int | None, typer.Option(min=1, max=LARGEST_COUNT, help="Seeds per prompt.")] = None,
    judge: Annotated[str | None, JudgeOption] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a published adapter again: KPS, identity, drift from the base, leaks; with 95% intervals.

    Example: cat-cluster evaluate striped-cup@latest --images-per-prompt 8 --storage out/demo/registry
    """
    from cat_cluster.pipeline.published_adapters import evaluate_published

    given = {"images_per_prompt": images_per_prompt, "judge": judge}
    changes = {name: value for name, value in given.items() if value is not None}
    with progress() as listener:
        evaluation = evaluate_published(open_registry(storage), adapter, device(), listener, changes)
    measures = evaluation.to_json()
    if as_json:
        print_json(measures)
        return
    people.print(_scores_table(adapter, measures, evaluation.judges[0].leaks.decoy_gain))


app.command()(generate)


@base_app.command("path")
def base_path(
    name: Annotated[str, typer.Argument(help="pocket, a diffusers folder or .safetensors checkpoint, or a hub id.")],
) -> None:
    """Print the diffusers folder of a base model."""
    from cat_cluster.models.base_names import base_folder

    typer.echo(base_folder(name))


@pocket_app.command("pretrain")
def pocket_pretrain(
    out: Annotated[
        Path, typer.Option(callback=output_folder, help="Folder for the weights; interrupted work there is resumed.")
    ],
    base: Annotated[Literal["pocket", "pocket-xl"], typer.Option(help="Which embedded base.")] = "pocket",
    emojis: Annotated[
        Path | None,
        typer.Option(
            help="Of pocket-xl: the unpacked npm package emoji-datasource-google 16.0.0. Default: npm fetches it."
        ),
    ] = None,
    real_judge: Annotated[
        Path | None, typer.Option(help="Of pocket-xl: EfficientNet-Lite0 as safetensors, for the model card.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            callback=above_zero,
            help="Wall-clock time of all stages together; none: as many steps as the recipe says.",
        ),
    ] = None,
    compile_unet: Annotated[bool, typer.Option("--compile", help="Compile the U-Net (needs a C++ compiler).")] = False,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_FIRST_SEED, help="Seed of the world and of every model.")] = 0,
) -> None:
    """Pretrain an embedded base from scratch on its own world: hours on a CPU, minutes on a GPU. Resumable."""
    if base == "pocket-xl":
        from cat_cluster.models.pocket_xl.pretraining.pretrain import pretrain_xl

        pretrain_xl(
            out,
            emojis=emojis,
            real_judge=real_judge,
            minutes=minutes,
            device=device(),
            compile=compile_unet,
            seed=seed,
        )
        return
    if emojis is not None or real_judge is not None:
        raise typer.BadParameter("--emojis and --real-judge are pocket-xl's: leave them out, or give --base pocket-xl")
    from cat_cluster.models.pocket.pretraining.pretrain import pretrain

    pretrain(out, minutes=minutes, device=device(), compile=compile_unet, seed=seed)


@pocket_app.command("grid")
def pocket_grid(
    out: Annotated[Path, typer.Option(metavar="<path>", parser=png_file, help="PNG file to write.")] = Path(
        "pocket-grid.png"
    ),
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_FIRST_SEED, help="First seed.")] = 0,
    weights: Annotated[
        Path | None, typer.Option(help="Folder that `pocket pretrain` wrote. Default: the shipped Pocket-SD.")
    ] = None,
) -> None:
    """Generate a grid of images that shows what an embedded base knows."""
    from cat_cluster.models.base_names import base_folder

    folder = base_folder("pocket") if weights is None else weights
    if not (folder / "model_index.json").is_file():
        raise BaseModelError(
            f"--weights: {folder} has no model_index.json; name a folder that `cat-cluster pocket pretrain` finished"
        )
    if (folder / "text_encoder_2").is_dir():
        from cat_cluster.models.pocket_xl.pretraining.quality import prompt_grid as grid_of_xl

        people.print(f"wrote {grid_of_xl(folder, out, seed, device=device())}")
        return
    from cat_cluster.models.pocket.pretraining.quality import prompt_grid

    people.print(f"wrote {prompt_grid(folder, out, seed, device=device())}")


@spec_app.command("check")
def spec_check(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="Job spec (YAML).")],
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Check a job spec, its base models and photos, and print the adapters it would train. Nothing is trained."""
    from cat_cluster.data.concepts import load_concepts
    from cat_cluster.data.warnings import concept_warnings
    from cat_cluster.models.base_names import check_bases
    from cat_cluster.models.text_limit import local_text_limit
    from cat_cluster.spec.job import load_spec

    job = load_spec(spec)
    adapters = job.resolved()
    try:
        away = check_bases(adapters)
    except BaseModelError as error:
        raise BaseModelError(f"{spec}: {error}") from error
    if any(adapter.training.init_from is not None for adapter in adapters):
        from cat_cluster.pipeline.start import with_pinned_start

        registry = open_registry(storage or job.storage)
        adapters = tuple(with_pinned_start(adapter, registry) for adapter in adapters)
    limits = {adapter.base: local_text_limit(adapter.base) for adapter in adapters}
    read: dict[str, list[dict[str, Any]]] = {}
    warnings = [
        f"{away.get(base, f'base {base!r} is not on this machine')}: training checks "
        f"{'its files, and ' if base in away else ''}whether its text encoder reads whole captions"
        for base, limit in limits.items()
        if base in away or limit is None
    ]
    for adapter in adapters:
        concepts = load_concepts(adapter.id, adapter.concepts, masked=adapter.training.masked_loss)
        read[adapter.id] = [_what_was_read(one) for one in concepts]
        warnings += concept_warnings(adapter.id, concepts, adapter.training, limits[adapter.base])
    if as_json:
        print_json(
            {"adapters": [adapter.model_dump(mode="json") for adapter in adapters], "read": read, "warnings": warnings}
        )
        return
    for adapter in adapters:
        tokens = ", ".join(f"{concept.token} {concept.class_noun}" for concept in adapter.concepts)
        start = "" if adapter.training.init_from is None else f", from {adapter.training.init_from}"
        line = f"{adapter.id}: {tokens}; {adapter.method}, {adapter.training.steps} steps{start}"
        people.print(f"[green]ok[/green] {line}")
        for one in read[adapter.id]:
            number = f"{one['photos']} photo{'' if one['photos'] == 1 else 's'}"
            passed_over = (
                f"; passed over: {', '.join(map(shown_name, one['passed_over']))}" if one["passed_over"] else ""
            )
            masks = f", {one['masks']} with a mask" if adapter.training.masked_loss else ""
            line = f"   {one['token']}: {number}{masks}, captions from {one['captions_from']}{passed_over}"
            people.print(line, markup=False, highlight=False, soft_wrap=True)
    for warning in warnings:
        people.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)


def _what_was_read(concept: Concept) -> dict[str, Any]:
    return {
        "token": concept.token,
        "photos": len(concept.examples),
        "masks": sum(example.mask is not None for example in concept.examples),
        "captions_from": concept.captions_from,
        "passed_over": list(concept.passed_over),
    }


@spec_app.command("schema")
def spec_schema() -> None:
    """Print the JSON schema of a job spec, for editors and checks."""
    from cat_cluster.spec.job import spec_json_schema

    print_json(spec_json_schema())


check_all_values(app)


def _scores_table(adapter: str, measures: Mapping[str, Any], decoy_gain: float) -> Table:
    table = Table("metric", "value", "95% interval", title=f"{adapter} under {measures['judge']['name']}")
    for name, (low, high) in measures["intervals"].items():
        table.add_row(name, f"{measures[name]:.4f}", f"{low:.4f} to {high:.4f}")
    table.add_row("identity gain by a decoy word", f"{decoy_gain:.4f}", "")
    return table


def main() -> NoReturn:
    """Run the command line and exit; an expected error prints its message.

    Exit code 1 is for what a command could not do, 2 for words that are no command. With --json the error is the one
    JSON document on stdout too: {"error": {"type", "message"}}.
    """
    if sys.stdout is None:  # the shell's >&-
        sys.stdout = io.StringIO()
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()  # here, where what fails can still be said
    except CatClusterError as error:
        _end_with(type(error).__name__, str(error))
    except BrokenPipeError:  # its reader has what it wanted
        _drop_stdout()
        sys.exit(1)
    except OSError as error:  # of a path that was given, such as one that is too long
        place = "" if error.filename is None else f"{error.filename}: "
        _end_with("OutputError", f"{place}{error.strerror or error}; check the path and who may read or write it")
    except _UsageError as error:
        error.message = error.message.removeprefix("Value error, ")  # pydantic's, with which typer reads values
        error.show()
        _end_stdout("UsageError", error.format_message())
        sys.exit(2)
    except typer.Abort:
        code = 1
    if code == INTERRUPTED:  # Typer turns the interrupt of a command into its exit code
        people.print("interrupted; run the same command again to continue")
    sys.exit(code if isinstance(code, int) else 0)


def _end_with(kind: str, message: str) -> NoReturn:
    people.print("[bold red]error[/bold red]", end=" ")
    # A message may quote a file's name, and a name may hold what a terminal obeys.
    people.print("\n".join(map(shown_name, message.split("\n"))), markup=False, highlight=False, soft_wrap=True)
    _end_stdout(kind, message)
    sys.exit(1)


def _end_stdout(kind: str, message: str) -> None:
    """Print the error as JSON where that is asked for; a stdout that cannot be written is no further error."""
    try:
        if "--json" in sys.argv[1:]:
            print_json({"error": {"type": kind, "message": message}})
        sys.stdout.flush()
    except OSError:  # stderr has the message
        _drop_stdout()


def _drop_stdout() -> None:
    """Let what waits for a stdout that cannot be written go nowhere, or Python would complain of it at its end."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
