"""The progress bars of the terminal, on stderr: what a job that runs here and a run that is followed have in common."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column


class Bars:
    """Bars with a detail each, and lines above them. A context manager; it knows neither torch nor jobs."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=12),  # all of it fits 80 columns
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=9)),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[detail]}"),
            console=console,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def message(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(escape(text), soft_wrap=True)

    def move(self, bar: str, stage: str, name: str, **changes: Any) -> None:
        """Open a bar or change it: rich's `total` and `completed`, and a `detail` in markup."""
        if bar not in self._tasks:
            self._tasks[bar] = self._progress.add_task("", total=None, detail="")
        self._progress.update(self._tasks[bar], description=f"{stage:<8}{name}", **changes)


def loss_text(token: str, identity: float | None, cat: float | None) -> str:
    """Return the losses of a concept in markup, as "sks identity 0.2500 cat 0.00200"."""
    shown = "-" if identity is None else f"{identity:.4f}"
    return f"[cyan]{escape(token)}[/cyan] identity {shown}" + ("" if cat is None else f" cat {cat:.5f}")
