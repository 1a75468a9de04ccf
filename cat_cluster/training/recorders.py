"""Listeners of the training loop: what a step reports becomes metrics, or curves in TensorBoard."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from cat_cluster.errors import OutputError
from cat_cluster.files import write_failure
from cat_cluster.telemetry import (
    CAT_LOSS,
    CHECKPOINT_BYTES,
    CHECKPOINT_SECONDS,
    DROPPED_ADAPTERS,
    IDENTITY_LOSS,
    ROWS,
    ROWS_PER_SECOND,
    STEPS,
    STEPS_PER_SECOND,
    TEACHER_CACHE,
    Metrics,
)
from cat_cluster.training.step_report import StepReport

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TrainingMetrics:
    """Fills the metrics of training from the reports of the loop."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def step(self, report: StepReport) -> None:
        """Record a step. An adapter counts as dropped in the step that dropped it, not again after a resume."""
        metrics = self._metrics
        metrics.inc(STEPS)
        metrics.inc(ROWS, report.rows)
        if report.seconds > 0.0:
            metrics.set(STEPS_PER_SECOND, 1.0 / report.seconds)
            metrics.set(ROWS_PER_SECOND, report.rows / report.seconds)
        metrics.inc(TEACHER_CACHE, report.teacher_known, result="hit")
        metrics.inc(TEACHER_CACHE, report.teacher_asked, result="miss")
        for adapter, tokens in report.losses.items():
            for token, loss in tokens.items():
                metrics.set(IDENTITY_LOSS, loss.identity, adapter=adapter, token=token)
                if loss.cat is not None:
                    metrics.set(CAT_LOSS, loss.cat, adapter=adapter, token=token)
        # A dropped adapter gets no rows, so the only report with both its losses and its reason is this one.
        metrics.inc(DROPPED_ADAPTERS, sum(adapter in report.losses for adapter in report.dropped))

    def forget(self, adapter: str) -> None:
        """Show the losses of an adapter no more that trains no more."""
        self._metrics.forget(adapter=adapter)

    def checkpoint(self, seconds: float, size: int) -> None:
        """Record that a checkpoint of `size` bytes was stored in `seconds`."""
        self._metrics.observe(CHECKPOINT_SECONDS, seconds)
        self._metrics.inc(CHECKPOINT_BYTES, size)


class TensorBoardRecorder:
    """Writes TensorBoard event files: losses and alpha scales per token, speed, and sample images.

    Each adapter is a run of TensorBoard, a subfolder of its name, over its own steps. Each run of the loop writes files
    of its own, which first discard all steps from their own first one on: after a resume TensorBoard shows every step
    once, as it was last done, as long as an adapter's files are in one folder.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` is made at once, and a file in it with an adapter's first step or image.

        This and all that writes raise OutputError when the place cannot be written or its disk is full; what was
        still in memory is then lost, and the next step begins another file.
        """
        self._folder = folder
        self._open_writers: dict[str, SummaryWriter] = {}
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)

    def step(self, report: StepReport) -> None:
        """Add the values of a step to the curves of the adapters that had it."""
        with self._writing():
            for adapter_id, step in report.done.items():
                writer = self._writer(adapter_id, step)
                for tag, value in _scalars(report, adapter_id):
                    writer.add_scalar(tag, value, step)

    def images(self, adapter_id: str, step: int, image: Image.Image) -> None:
        """Add a picture of an adapter after `step` steps."""
        pixels = np.asarray(image.convert("RGB"))
        with self._writing():
            self._writer(adapter_id, step).add_image("samples", pixels, step, dataformats="HWC")

    def flush(self) -> None:
        """Write what is still in memory to the files."""
        with self._writing():
            for writer in self._open_writers.values():
                writer.flush()

    def close(self) -> None:
        """Finish the files; a later step begins another one."""
        writers, self._open_writers = self._open_writers, {}
        with self._writing():
            for writer in writers.values():
                writer.close()

    def forget(self, adapter_id: str) -> None:
        """Finish the files of an adapter and remove them; a later step of it begins another one."""
        writer = self._open_writers.pop(adapter_id, None)
        with self._writing():
            if writer is not None:
                writer.close()
            shutil.rmtree(self._folder / adapter_id, ignore_errors=True)

    def files(self) -> dict[str, bytes]:
        """Return every event file as `<adapter id>/<name>`, those of this run with all that was recorded so far."""
        self.flush()
        found = sorted(self._folder.rglob("events.out.tfevents.*"))
        return {path.relative_to(self._folder).as_posix(): path.read_bytes() for path in found}

    def _writer(self, adapter_id: str, first_step: int) -> SummaryWriter:
        if adapter_id not in self._open_writers:
            # Imported here: only a job that asks for TensorBoard pays for loading it.
            from torch.utils.tensorboard import SummaryWriter

            self._open_writers[adapter_id] = SummaryWriter(str(self._folder / adapter_id), purge_step=first_step)
        return self._open_writers[adapter_id]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._open_writers = {}  # one has given up; the next step begins other files
            message = f"TensorBoard files: {write_failure(self._folder, error)}"
            raise OutputError(f"{message}, or set monitoring.tensorboard to false") from error


def _scalars(report: StepReport, adapter_id: str) -> Iterator[tuple[str, float]]:
    for token, loss in report.losses[adapter_id].items():
        yield f"identity_loss/{token}", loss.identity
        if loss.cat is not None:
            yield f"cat_loss/{token}", loss.cat
        if loss.outside is not None:
            yield f"outside_loss/{token}", loss.outside
    for token, scale in report.alpha_scales.get(adapter_id, {}).items():
        yield f"alpha_scale/{token}", scale
    if report.seconds > 0.0:
        yield "speed/steps_per_second", 1.0 / report.seconds
        yield "speed/rows_per_second", report.rows / report.seconds
