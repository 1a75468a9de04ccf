"""`python -m jobs.benchmark NAME` measures, writes jobs/benchmark/results/NAME.json and prints where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, help="Measurements of cat-cluster; results go to jobs/benchmark/results.")
people = Console(stderr=True)


@app.callback()
def _measurements() -> None:
    """Each command measures one question, side by side in one run."""


@app.command()
def frontier(
    folder: Annotated[Path, typer.Option(help="Where trained adapters are kept; a second run goes on.")] = Path(
        "out/frontier"
    ),
    only: Annotated[list[str] | None, typer.Option(help="Groups of trials to run; none means all.")] = None,
) -> None:
    """Vary one setting of CAT at a time: identity against drift (about an hour on 2 cores)."""
    from jobs.benchmark.frontier import GROUPS, run

    people.print(f"wrote {run(folder, people, only or list(GROUPS))}")


@app.command()
def study(
    folder: Annotated[Path, typer.Option(help="Where trained adapters are kept; a second run goes on.")] = Path(
        "out/study"
    ),
    photos: Annotated[Path | None, typer.Option(help="Folder of the paper's concepts, for the part photos.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="single, joint, photos; none means all there is.")] = None,
) -> None:
    """Compare CAT with plain LoRA on held-out concepts, three seeds, single and joint (over an hour on 2 cores)."""
    from jobs.benchmark.study import run

    parts = only or ["single", "joint", *(["photos"] if photos else [])]
    for path in run(folder, people, photos, parts):
        people.print(f"wrote {path}")


@app.command()
def levers() -> None:
    """Time a step with each lever beside plain LoRA (about ten minutes on 2 cores)."""
    from jobs.benchmark.levers import run

    people.print(f"wrote {run(people)}")


@app.command()
def packing(
    size: Annotated[str, typer.Option(help="pocket, or sd15 on a GPU.")] = "pocket",
) -> None:
    """Time 8 adapters packed, one by one, and in a plain PEFT loop; and the memory of packs (about ten minutes)."""
    from jobs.benchmark.packing import run

    people.print(f"wrote {run(people, size)}")


@app.command()
def cluster(
    only: Annotated[list[str] | None, typer.Option(help="steps, ray, checkpoints, sharding, batch; none: all.")] = None,
) -> None:
    """Measure what workers, ZeRO, Ray, checkpoints and batches cost and gain (about forty minutes on 2 cores)."""
    from jobs.benchmark.cluster import PARTS, run

    for path in run(people, only or PARTS):
        people.print(f"wrote {path}")


@app.command()
def report() -> None:
    """Write docs/benchmarks from the result files."""
    from jobs.benchmark.report import write_pages

    for path in write_pages():
        people.print(f"wrote {path}")


if __name__ == "__main__":
    app()
