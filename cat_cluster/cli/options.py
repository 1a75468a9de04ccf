"""What commands share: options, where output goes, and what most of them open."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from cat_cluster.settings import load_settings
from cat_cluster.spec.fields import LARGEST_SEED

if TYPE_CHECKING:
    from cat_cluster.cli.job_bars import JobBars
    from cat_cluster.registry import Registry

people = Console(stderr=True, emoji=False)  # stdout is for results; `:x:` in a name or a prompt stays as it is

Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        help="Folder or s3:// address of the registry. Default: the job spec's, if there is one, else $CAT_STORAGE, "
        "else ./cat-storage.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
# Seeds of several images follow one another, so the last of them must be a seed too.
MOST_IMAGES = 10_000
LARGEST_FIRST_SEED = LARGEST_SEED - MOST_IMAGES
JudgeOption = typer.Option(help="auto, pocket, pocket-classifier, a CLIP folder or hub id.")
AdapterReference = Annotated[str, typer.Argument(metavar="ID", help="Adapter id, id@alias or id@revision.")]


def print_json(document: Any) -> None:
    """Print the one JSON document of a command on stdout."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


def device() -> str:
    """Return the device that $CAT_DEVICE names, or the best one of this machine."""
    from cat_cluster.models.device import choose_device

    return choose_device(load_settings().device)


def open_registry(storage: str | None) -> Registry:
    """Return the registry of --storage, or of $CAT_STORAGE."""
    from cat_cluster.registry import Registry
    from cat_cluster.store import open_store

    return Registry(open_store(storage or load_settings().storage))


@contextmanager
def progress(images: str = "measure") -> Iterator[JobBars]:
    """Show the progress bars of a job while it runs; images: what they are made for, in a word."""
    from transformers.utils import logging

    from cat_cluster.cli.job_bars import JobBars

    logging.disable_progress_bar()  # its bars for files that load in a moment would tear ours apart
    # stdout is for the result alone, and Ray prints its warnings there.
    with redirect_stdout(sys.stderr), JobBars(people, images) as bars:
        yield bars
