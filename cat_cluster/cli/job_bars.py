"""What a person sees of a running job: one progress bar per adapter, on stderr so that stdout stays clean."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    TaskID,
)

from cat_cluster.cli.bars import Bars
from cat_cluster.pipeline.job import AdapterResult
from cat_cluster.training.loop import StepReport
from cat_cluster.training.loss_curves import ConceptLoss

LOSS_SMOOTHING = 0.05


class TerminalListener(Bars):
    """A JobListener that draws progress bars: steps, smoothed losses per token, time left. A context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        super().__init__(console)
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._smoothed: dict[tuple[str, str], ConceptLoss] = {}

    def pack_started(self, adapter_ids: Sequence[str], steps: int) -> None:
        """Open a training bar for each adapter of the pack."""
        if len(adapter_ids) > 1:
            self.message(f"{len(adapter_ids)} adapters train together, in one U-Net forward per step")
        for adapter_id in adapter_ids:
            self._bar("train", adapter_id, steps)

    def step(self, report: StepReport) -> None:
        """Move the training bars and show the losses of each token."""
        for (stage, adapter_id), task in self._tasks.items():
            if stage != "train":
                continue
            if adapter_id in report.dropped:
                self._progress.update(task, detail=f"[red]dropped: {escape(report.dropped[adapter_id])}")
            elif adapter_id in report.losses:
                detail = "  ".join(
                    self._loss_text(adapter_id, token, loss) for token, loss in report.losses[adapter_id].items()
                )
                self._progress.update(task, completed=report.step, detail=detail)

    def images(self, adapter_id: str, done: int, total: int) -> None:
        """Move the evaluation bar of an adapter."""
        self._progress.update(self._bar("measure", adapter_id, total), completed=done)

    def finished(self, result: AdapterResult) -> None:
        """Say in one line what became of an adapter."""
        colour = "red" if result.outcome == "failed" else "green"
        reason = f": {escape(result.reason)}" if result.reason else f" {result.revision}"
        self._progress.console.print(f"[{colour}]{result.outcome}[/{colour}] {result.adapter_id}{reason}")

    def _bar(self, stage: str, adapter_id: str, total: int) -> TaskID:
        key = (stage, adapter_id)
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(f"{stage:<8}{adapter_id}", total=total, detail="")
        return self._tasks[key]

    def _loss_text(self, adapter_id: str, token: str, loss: ConceptLoss) -> str:
        key = (adapter_id, token)
        before = self._smoothed.get(key, loss)
        identity = before.identity + LOSS_SMOOTHING * (loss.identity - before.identity)
        cat = before.cat if loss.cat is None else loss.cat
        if cat is not None and loss.cat is not None and before.cat is not None:
            cat = before.cat + LOSS_SMOOTHING * (loss.cat - before.cat)
        self._smoothed[key] = ConceptLoss(identity, cat)
        text = f"[cyan]{escape(token)}[/cyan] identity {identity:.4f}"
        return text if cat is None else f"{text} cat {cat:.5f}"
