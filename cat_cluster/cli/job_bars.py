"""What a person sees of a running job: one progress bar per adapter, on stderr so that stdout stays clean."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape

from cat_cluster.cli.bars import Bars, loss_text
from cat_cluster.pipeline.job import AdapterResult
from cat_cluster.training.loss_curves import ConceptLoss
from cat_cluster.training.step_report import StepReport

LOSS_SMOOTHING = 0.05


class JobBars(Bars):
    """A JobListener that draws progress bars: steps, smoothed losses per token, time left. A context manager."""

    def __init__(self, console: Console, images: str = "measure") -> None:
        """images: what is done where images are made, in a word."""
        super().__init__(console)
        self._images = images
        self._smoothed: dict[tuple[str, str], ConceptLoss] = {}

    def started(self, steps: Mapping[str, int], together: int) -> None:
        """Open a training bar for each adapter that begins."""
        if together > 1:
            self.message(f"{together} adapters train together, in one U-Net forward per step")
        for adapter_id, total in steps.items():
            self._train(adapter_id, total=total)

    def step(self, report: StepReport) -> None:
        """Move the training bars and show the losses of each token."""
        for adapter_id, reason in report.dropped.items():
            self._train(adapter_id, detail=f"[red]dropped: {escape(reason)}")
        for adapter_id, losses in report.losses.items():
            detail = "  ".join(self._smoothed_text(adapter_id, token, loss) for token, loss in losses.items())
            self._train(adapter_id, completed=report.done[adapter_id], detail=detail)

    def images(self, adapter_id: str, done: int, total: int) -> None:
        """Move the bar of an adapter's images."""
        self.move(f"{self._images} {adapter_id}", self._images, adapter_id, completed=done, total=total)

    def finished(self, result: AdapterResult) -> None:
        """Say in one line what became of an adapter."""
        colour = "red" if result.outcome == "failed" else "green"
        reason = f": {escape(result.reason)}" if result.reason else f" {result.revision}"
        self.console.print(f"[{colour}]{result.outcome}[/{colour}] {result.adapter_id}{reason}")

    def _train(self, adapter_id: str, **changes: object) -> None:
        self.move(f"train {adapter_id}", "train", adapter_id, **changes)

    def _smoothed_text(self, adapter_id: str, token: str, loss: ConceptLoss) -> str:
        before = self._smoothed.get((adapter_id, token), loss)
        identity = before.identity + LOSS_SMOOTHING * (loss.identity - before.identity)
        cat = before.cat if loss.cat is None else loss.cat
        if cat is not None and loss.cat is not None and before.cat is not None:
            cat = before.cat + LOSS_SMOOTHING * (loss.cat - before.cat)
        self._smoothed[adapter_id, token] = ConceptLoss(identity, cat)
        return loss_text(token, identity, cat)
