"""What the stages of a pretraining leave behind: models that are finished, progress on the screen and in a log."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from diffusers import ModelMixin
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from cat_cluster.models.pretraining.stage import Report, Stage, StageProgress

Model = TypeVar("Model")
_LOGGED_EVERY = 30.0  # seconds


def result(
    stage: Stage,
    load: Callable[[Path], Model],
    save: Callable[[Model, Path], object],
    train: Callable[[Stage], tuple[Model, StageProgress]],
) -> Model:
    """The stage's finished model, or train it (resuming its checkpoint), save it and write how it ended beside it.

    It is read from its file in either case: a run in one piece then gives the weights of one that was interrupted.
    """
    folder, ending = stage.checkpoint.with_suffix(""), stage.checkpoint.with_suffix(".json")
    if not ending.is_file():
        model, ended = train(stage)
        save(model, folder)
        ending.write_text(json.dumps(asdict(ended), indent=2) + "\n", encoding="utf-8")
    return load(folder)


def save_model(model: PreTrainedModel | ModelMixin, folder: Path) -> None:
    """Save a model of transformers or diffusers."""
    model.save_pretrained(folder)


def forget_paths(folder: Path) -> None:
    """Take out of every config where its part was loaded from: that is this machine's business."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextmanager
def stages(
    work: Path, shares: Mapping[str, float], *, minutes: float | None, device: str, seed: int, compile: bool
) -> Iterator[Callable[[str], Stage]]:
    """Yield what makes the stage of a name; `shares` are the stages' parts of `minutes`, if there is such a limit.

    Each stage moves a bar of its own, and a line in `work`/progress.jsonl every half minute says how far it is.
    """
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True, emoji=False),
    ) as bars:
        report = _report(bars, tuple(shares), work / "progress.jsonl")

        def stage(name: str) -> Stage:
            seconds = None if minutes is None else 60 * minutes * shares[name] / sum(shares.values())
            return Stage(name, work / f"{name}.pt", device, seed, report, seconds, compile)

        yield stage


def _report(bars: Progress, names: tuple[str, ...], log: Path) -> Report:
    tasks = {name: bars.add_task(name, total=1.0, start=False, detail="") for name in names}
    logged = 0.0

    def report(reached: StageProgress) -> None:
        nonlocal logged
        task = tasks[reached.stage]
        bars.start_task(task)
        bars.update(task, completed=reached.progress, detail=f"step {reached.step}  loss {reached.loss:.4f}")
        if time.monotonic() - logged >= _LOGGED_EVERY or reached.progress >= 1:
            logged = time.monotonic()
            line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **asdict(reached)}
            with log.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(line) + "\n")

    return report
