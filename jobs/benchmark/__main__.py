"""`python -m jobs.benchmark NAME` measures, writes jobs/benchmark/results/NAME.json and prints where it is."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cat_cluster.errors import CatClusterError
from jobs.benchmark.record import begin

app = typer.Typer(no_args_is_help=True, help="Measurements of cat-cluster; results go to jobs/benchmark/results.")
people = Console(stderr=True, emoji=False)
AllowDirty = Annotated[
    bool, typer.Option("--allow-dirty", help="Measure with uncommitted changes; the result file says so.")
]


@app.callback()
def _measurements() -> None:
    """Each command measures one question, side by side in one run."""


@app.command()
def frontier(
    folder: Annotated[Path, typer.Option(help="Where trained adapters are kept; a second run goes on.")] = Path(
        "out/frontier"
    ),
    only: Annotated[list[str] | None, typer.Option(help="Groups of trials to run; none means all.")] = None,
    allow_dirty: AllowDirty = False,
) -> None:
    """Vary one setting of CAT at a time: identity against drift (about an hour on 2 cores)."""
    from jobs.benchmark.study.frontier import GROUPS, run

    _check("only", only, GROUPS)
    people.print(f"wrote {run(begin(allow_dirty=allow_dirty), folder, people, only or list(GROUPS))}")


@app.command()
def study(
    folder: Annotated[Path, typer.Option(help="Where trained adapters are kept; a second run goes on.")] = Path(
        "out/study"
    ),
    photos: Annotated[Path | None, typer.Option(help="Folder of the paper's concepts, for the part photos.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="single, joint, photos; none means all there is.")] = None,
    allow_dirty: AllowDirty = False,
) -> None:
    """Compare CAT with plain LoRA on held-out concepts, three seeds, single and joint (over an hour on 2 cores)."""
    from jobs.benchmark.study.measure import run

    _check("only", only, ("single", "joint", "photos"))
    parts = only or ["single", "joint", *(["photos"] if photos else [])]
    for path in run(begin(allow_dirty=allow_dirty), folder, people, photos, parts):
        people.print(f"wrote {path}")


@app.command()
def specificity(
    folder: Annotated[Path, typer.Option(help="Where trained adapters are kept; a second run goes on.")] = Path(
        "out/specificity"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each adapter.")] = 300,
    concepts: Annotated[int, typer.Option(min=2, max=6, help="Adapters at each share, and in a stack; even.")] = 4,
    images: Annotated[int, typer.Option(min=1, help="Images of each prompt and trigger; there are six prompts.")] = 2,
    share: Annotated[
        list[float] | None, typer.Option(min=0.0, max=0.99, help="Shares of decoys; none means 0, 0.25, 0.5 and 0.75.")
    ] = None,
    allow_dirty: AllowDirty = False,
) -> None:
    """Compare shares of decoy rows: what adapters and their stack do with odd words (half an hour on 2 cores)."""
    from jobs.benchmark.study.specificity import SHARES, run

    if concepts % 2:
        raise typer.BadParameter("two and two are each other's, so an even number", param_hint="--concepts")
    start, shares = begin(allow_dirty=allow_dirty), share or SHARES
    path = run(start, folder, people, steps=steps, concepts=concepts, images=images, shares=shares)
    people.print(f"wrote {path}")


@app.command()
def stacks(
    folder: Annotated[Path, typer.Option(help="Where trained adapters are kept; a second run goes on.")] = Path(
        "out/stacks"
    ),
    images: Annotated[int, typer.Option(min=1, help="Images of each prompt and trigger; there are six prompts.")] = 2,
    allow_dirty: AllowDirty = False,
) -> None:
    """Compare stacks of adapters with joint ones, plain LoRA and the gate (some hours on 2 cores)."""
    from jobs.benchmark.study.stacks import run

    people.print(f"wrote {run(begin(allow_dirty=allow_dirty), folder, people, images=images)}")


@app.command()
def optimisations(allow_dirty: AllowDirty = False) -> None:
    """Time a step with each optimisation beside plain LoRA (about ten minutes on 2 cores)."""
    from jobs.benchmark.training.optimisations import run

    people.print(f"wrote {run(begin(allow_dirty=allow_dirty), people)}")


@app.command()
def packing(
    size: Annotated[str, typer.Option(help="pocket, or sd15 or sdxl on a GPU.")] = "pocket",
    allow_dirty: AllowDirty = False,
) -> None:
    """Time adapters packed, one by one, and in a plain PEFT loop; and the memory of packs (about ten minutes)."""
    from jobs.benchmark.training.packing import SIZES, run

    _check("size", [size], SIZES)
    people.print(f"wrote {run(begin(allow_dirty=allow_dirty), people, size)}")


@app.command()
def buckets(
    size: Annotated[str, typer.Option(help="pocket, or sd15 or sdxl on a GPU.")] = "pocket",
    allow_dirty: AllowDirty = False,
) -> None:
    """Time a step of photos of several shapes beside one of square crops (about five minutes on 2 cores)."""
    from jobs.benchmark.training.buckets import BASES, run

    _check("size", [size], BASES)
    people.print(f"wrote {run(begin(allow_dirty=allow_dirty), people, size)}")


@app.command()
def cluster(
    only: Annotated[
        list[str] | None, typer.Option(help="steps, changes, checkpoints, sharding, batch; none: all.")
    ] = None,
    allow_dirty: AllowDirty = False,
) -> None:
    """Measure what workers, ZeRO, Ray, checkpoints and batches cost and gain (about forty minutes on 2 cores)."""
    from jobs.benchmark.cluster import PARTS
    from jobs.benchmark.cluster.measure import run

    _check("only", only, PARTS)
    for path in run(begin(allow_dirty=allow_dirty), people, only or PARTS):
        people.print(f"wrote {path}")


@app.command()
def service(
    only: Annotated[list[str] | None, typer.Option(help="latency, defaults, stream; none: all.")] = None,
    submissions: Annotated[int, typer.Option(min=1, help="Jobs of the part latency.")] = 5,
    steps: Annotated[int, typer.Option(min=2, help="Training steps of each of them.")] = 30,
    concepts: Annotated[int, typer.Option(min=2, help="Concepts of the stream.")] = 12,
    least: Annotated[int, typer.Option(min=2, help="Fewest training steps of a concept of the stream.")] = 60,
    most: Annotated[int, typer.Option(min=2, help="Most training steps of one.")] = 240,
    allow_dirty: AllowDirty = False,
) -> None:
    """Measure a training service beside bare work and batch jobs (about twenty minutes on 2 cores)."""
    from jobs.benchmark.service import PARTS
    from jobs.benchmark.service.measure import run

    _check("only", only, PARTS)
    if least > most:
        raise typer.BadParameter("must not be above --most", param_hint="--least")
    paths = run(
        begin(allow_dirty=allow_dirty),
        people,
        only or PARTS,
        submissions=submissions,
        steps=steps,
        concepts=concepts,
        stream_steps=(least, most),
    )
    for path in paths:
        people.print(f"wrote {path}")


@app.command()
def serving(
    only: Annotated[
        list[str] | None,
        typer.Option(help="overhead, adapters, serial, peft, stacks, poisson, join, probes; none: all."),
    ] = None,
    size: Annotated[str, typer.Option(help="pocket, or sd15 or sdxl on a GPU.")] = "pocket",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seconds: Annotated[float, typer.Option(help="About how long each part takes turns.")] = 60.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of every backend; none: all cores.")] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the U-Net's blocks, where a backend can.")
    ] = False,
    allow_dirty: AllowDirty = False,
) -> None:
    """Measure the serving engine beside pipelines and PEFT batches (about half an hour on 2 cores)."""
    from jobs.benchmark.serving.measure import SIZES, run

    _check("size", [size], SIZES)
    _check("only", only, SIZES[size].parts)
    start = begin(allow_dirty=allow_dirty)
    people.print(f"wrote {run(start, people, only or (), size, device, seconds, compile=compile, threads=threads)}")


@app.command()
def drift(
    demo: Annotated[Path, typer.Option(help="Folder of `make demo`, whose adapters are probed.")] = Path("out/demo"),
    folder: Annotated[Path, typer.Option(help="Where adapters and scores are kept; a second run goes on.")] = Path(
        "out/drift"
    ),
    judge_only: Annotated[bool, typer.Option("--judge-only", help="Judge the scores that are there again.")] = False,
    allow_dirty: AllowDirty = False,
) -> None:
    """Draw probes of healthy adapters and of faults, and let the drift detectors judge them (half an hour)."""
    from jobs.benchmark.drift.measure import run

    people.print(f"wrote {run(begin(allow_dirty=allow_dirty), demo, folder, people, judge_only=judge_only)}")


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="An empty folder to run the demo in.")] = Path("out/demo-benchmark"),
    allow_dirty: AllowDirty = False,
) -> None:
    """Run `make demo` and keep its figures, which the README shows (about five minutes)."""
    from jobs.benchmark.demo import run

    people.print(f"wrote {run(begin(allow_dirty=allow_dirty), folder, people)}")


@app.command()
def report() -> None:
    """Write docs/benchmarks from the result files, as `make generate` does."""
    from jobs.benchmark.pages import write_pages

    for path in write_pages():
        people.print(f"wrote {path}")


def _check(option: str, names: Iterable[str] | None, known: Iterable[str]) -> None:
    """Refuse a name that is not known before anything is measured."""
    for name in names or ():
        if name not in known:
            raise typer.BadParameter(f"{name!r} is unknown; choose from {', '.join(known)}", param_hint=f"--{option}")


if __name__ == "__main__":
    try:
        app()
    except CatClusterError as error:
        people.print(f"error: {error}", markup=False)
        sys.exit(1)
