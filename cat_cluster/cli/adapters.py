"""Commands for the adapters of a registry: list, show, verify, export, import, alias, delete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cat_cluster.cli.options import (
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
from cat_cluster.cli.values import output_folder
from cat_cluster.errors import SpecError
from cat_cluster.spec.choices import AdapterFormat
from cat_cluster.spec.fields import LARGEST_COUNT

# Torch and diffusers take seconds to import: commands import what they need.

adapters_app = typer.Typer(
    no_args_is_help=True, help="List, check, export, import and delete the adapters of a registry."
)


def mount_adapters(app: typer.Typer) -> None:
    """Add the commands of this file to the command line."""
    app.add_typer(adapters_app, name="adapters")


@adapters_app.command("list")
def adapters_list(
    storage: Storage = None,
    as_json: AsJson = False,
    limit: Annotated[
        int | None, typer.Option(min=1, max=LARGEST_COUNT, help="Adapters to list, at most; default: all.")
    ] = None,
    after: Annotated[
        str | None, typer.Option(metavar="ID", help="List those behind this id, as where a --limit has ended.")
    ] = None,
) -> None:
    """List the adapters of a registry with their aliases and scores; in pages of a --limit "cup-2" comes before "cup".

    Example: cat-cluster adapters list --limit 50 --after striped-cup
    """
    pages = list(open_registry(storage).pages(limit, after=after))
    summaries, has_more = [one for page in pages for one in page.adapters], pages[-1].has_more
    if limit is None:  # pages have the order of the store's keys, by which the next one begins
        summaries.sort(key=lambda one: one.adapter_id)
    if as_json:
        listed = {"adapters": [_jsonable(summary) for summary in summaries]}
        print_json(listed if limit is None else {**listed, "has_more": has_more})
        return
    Console(emoji=False).print(_summary_table(summaries))
    if has_more:
        people.print(f"there are more: --after {summaries[-1].adapter_id}", soft_wrap=True)


@adapters_app.command("show")
def adapters_show(adapter: AdapterReference, storage: Storage = None) -> None:
    """Print the manifest of an adapter: where it comes from, what it holds, how it scored."""
    print_json(_jsonable(open_registry(storage).resolve(adapter)))


@adapters_app.command("verify")
def adapters_verify(adapter: AdapterReference, storage: Storage = None, as_json: AsJson = False) -> None:
    """Check that every object of an adapter exists, has its digest, and loads."""
    report = open_registry(storage).verify(adapter)
    if as_json:
        print_json(_jsonable(report))
    elif not report.problems:
        people.print(f"[green]{report.adapter_id}@{report.revision} is whole[/green]")
    for problem in [] if as_json else report.problems:
        people.print(f"[red]{problem}[/red]")
    if report.problems:
        raise typer.Exit(1)


@adapters_app.command("export")
def adapters_export(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ID", help="Adapter id, id@alias or id@revision; with :0.7, at strength 0.7."),
    ],
    fmt: Annotated[AdapterFormat, typer.Option("--format", help="File format.")],
    out: Annotated[Path, typer.Option(callback=output_folder, help="Folder to write to.")],
    storage: Storage = None,
) -> None:
    """Write an adapter's weights in the format of another tool; of several, one file that does what all do together.

    Example: cat-cluster adapters export striped-cup clown-fish:0.7 --format kohya --out ./lora
    """
    from cat_cluster.pipeline.published_adapters import export_stack
    from cat_cluster.registry.stacks import parse_member

    members = [parse_member(adapter) for adapter in adapters]
    people.print(f"wrote {export_stack(open_registry(storage), members, out, fmt)}")


@adapters_app.command("import")
def adapters_import(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Adapter file (.safetensors), or the folder it is in.")],
    adapter_id: Annotated[str, typer.Option("--id", help="Id to publish it under: a-z, 0-9 and -.")],
    token: Annotated[list[str], typer.Option(help="Trigger word it was taught; once per concept.")],
    class_noun: Annotated[list[str], typer.Option(help="What each concept is an example of, such as cup.")],
    photos: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of each concept's photos, to measure it."),
    ] = None,
    base: Annotated[str, typer.Option(help="Base model it was made for.")] = "pocket",
    images_per_prompt: Annotated[
        int, typer.Option(min=1, max=LARGEST_COUNT, help="Seeds per prompt when it is measured.")
    ] = 4,
    judge: Annotated[str, JudgeOption] = "auto",
    unet_only: Annotated[bool, typer.Option("--unet-only", help="Leave a text-encoder part of the file out.")] = False,
    skip_unsupported: Annotated[
        bool,
        typer.Option(
            "--skip-unsupported",
            help="Leave out, and name, all that is not applied: larger convolutions, DoRA magnitudes.",
        ),
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option(min=1, max=LARGEST_COUNT, help="Rank of the LoRA that stands for each LoHa or LoKr layer."),
    ] = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Publish an adapter of PEFT, diffusers, kohya or LyCORIS. With photos it is measured, as a trained one is.

    Example: cat-cluster adapters import mug.safetensors --id mug --token sks --class-noun mug --photos ./mug
    """
    from cat_cluster.pipeline.importing import ImportRequest, import_adapter
    from cat_cluster.spec.sections import EvaluationSpec

    missing = next((place for place in (file, *(photos or ())) if not place.exists()), None)
    if missing is not None:  # said before a base model is looked for
        raise SpecError(f"{missing} cannot be read: it is not there; check the path")
    evaluation = EvaluationSpec(images_per_prompt=images_per_prompt, judge=judge)
    request = ImportRequest(
        file, adapter_id, token, class_noun, photos or (), base, evaluation, unet_only, skip_unsupported, rank
    )
    with progress() as listener:
        manifest = import_adapter(request, open_registry(storage), device(), listener)
    told = manifest.training
    _print_notes(told)
    if as_json:
        record = {"id": manifest.adapter_id, "revision": manifest.revision, "rank": manifest.rank}
        if unet_only or skip_unsupported:
            record |= {key: told.get(key, empty) for key, empty in (("left_out", []), ("left_out_kinds", {}))}
        print_json(record | {key: told[key] for key in ("reduced",) if key in told})
        return
    measured = "measured" if manifest.metrics else "not measured: give --photos to measure it"
    people.print(f"published {manifest.name}, rank {manifest.rank}, {measured}")


def _print_notes(training: Mapping[str, Any]) -> None:
    """Say what of an imported file was left out, how near its LoHa and LoKr layers came, and what is not served."""
    for kind, count in training.get("left_out_kinds", {}).items():
        people.print(f"left out {kind}: {count} tensors", soft_wrap=True)
    if left_out := training.get("left_out"):
        people.print(
            f"left out in all: {len(left_out)} tensors, the first {left_out[0]}, and the manifest names each; images "
            "can differ from those of programs that apply them",
            soft_wrap=True,
        )
    if reduced := training.get("reduced"):
        people.print(
            f"LoHa and LoKr: {len(reduced['layers'])} layers as the nearest LoRA of rank {reduced['rank']}; relative "
            f"error {reduced['relative_error']:.2%} in all, at most {reduced['worst_relative_error']:.2%} "
            f"({reduced['worst_layer']}); each layer's is in the manifest",
            soft_wrap=True,
        )


@adapters_app.command("alias")
def adapters_alias(
    adapter_id: Annotated[str, typer.Argument(metavar="ID", help="Adapter id.")],
    alias: Annotated[str, typer.Argument(help="Alias, for example prod.")],
    revision: Annotated[
        str | None, typer.Argument(help="Revision to point it at; none: only print the history.")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the alias; its history stays.")] = False,
    storage: Storage = None,
) -> None:
    """Point an alias at a revision, or remove it; its history is printed in any case.

    Example: cat-cluster adapters alias striped-cup prod r-0123456789ab
    """
    registry = open_registry(storage)
    if remove and revision is not None:
        raise typer.BadParameter("give a revision or --remove, not both")
    if remove:
        registry.remove_alias(adapter_id, alias)
    elif revision is not None:
        registry.set_alias(adapter_id, alias, revision)
    history = registry.alias_history(adapter_id, alias)
    if not history:
        registry.resolve(f"{adapter_id}@{alias}")  # raises, and says which adapters and aliases there are
    print_json({"alias": alias, "history": [_jsonable(move) for move in history]})


@adapters_app.command("delete")
def adapters_delete(
    adapter_id: Annotated[str, typer.Argument(metavar="ID", help="Adapter id.")],
    revision: Annotated[str, typer.Argument(help="Revision to delete; refused while an alias points at it.")],
    storage: Storage = None,
) -> None:
    """Delete a revision of an adapter permanently."""
    open_registry(storage).delete(adapter_id, revision)
    people.print(f"deleted {adapter_id}@{revision}")


def _summary_table(summaries: Sequence[Any]) -> Table:
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
            *("-" if metrics.get(name) is None else f"{metrics[name]:.3f}" for name in ("kps", "base_drift")),
        )
    return table


def _jsonable(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
