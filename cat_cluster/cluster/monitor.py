"""Monitoring a pack in training: events for its driver, metrics, TensorBoard files and sample grids."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from cat_cluster.cluster.messages import Messages
from cat_cluster.evaluation.samples import SampleGrids
from cat_cluster.lora.bank import LoraBank
from cat_cluster.models.base_model import BaseModel
from cat_cluster.pipeline.prepare import PreparedAdapter
from cat_cluster.spec.job import JobSpec
from cat_cluster.store import ObjectStore
from cat_cluster.telemetry import Metrics
from cat_cluster.training.loop import StepReport
from cat_cluster.training.recorders import TensorBoardRecorder, TrainingMetrics

REPORT_SECONDS = 0.25  # between two events of a pack; the first and the last step are always reported


class PackMonitor:
    """Monitors the training of a pack on one worker. A context manager.

    reports: whether this worker reports for the pack; one of them does.
    """

    def __init__(
        self,
        job: JobSpec,
        store: ObjectStore,
        messages: Messages,
        metrics: Metrics,
        run_id: str,
        *,
        reports: bool,
    ) -> None:
        self._job, self._messages = job, messages
        self._reports = reports
        self._reported = 0.0
        self._concepts: dict[str, list[tuple[str, str]]] = {}
        self._grids: SampleGrids | None = None
        self._folder = f"runs/{run_id}"
        self._store = store
        self._metrics = TrainingMetrics(metrics)
        self._event_files: tempfile.TemporaryDirectory[str] | None = None
        self._tensorboard: TensorBoardRecorder | None = None
        if reports and job.monitoring.tensorboard:
            self._event_files = tempfile.TemporaryDirectory(prefix="cat-cluster-")
            self._tensorboard = TensorBoardRecorder(Path(self._event_files.name))

    def open(self, base: BaseModel, bank: LoraBank) -> None:
        """Set what samples are generated with."""
        # Where the base is sharded every worker takes part in each image.
        if self._job.monitoring.samples_every is not None and (self._reports or self._job.cluster.zero_stage == 3):
            self._grids = SampleGrids(base, bank)

    def admit(self, adapters: Sequence[PreparedAdapter]) -> None:
        """Know adapters that come in."""
        for adapter in adapters:
            concepts = [(concept.token, concept.class_noun) for concept in adapter.concepts]
            self._concepts[adapter.resolved.id] = concepts

    def checkpoint(self, seconds: float, size: int) -> None:
        """Record that a checkpoint of `size` bytes was stored in `seconds`."""
        self._metrics.checkpoint(seconds, size)

    def step(self, report: StepReport, slots: Mapping[str, int]) -> None:
        """Record a step that is done; slots: of the bank, by adapter."""
        if self._reports:
            self._metrics.step(report)
            if self._tensorboard is not None:
                self._tensorboard.step(report)
            now = time.monotonic()
            if now - self._reported >= REPORT_SECONDS or report.notable:
                self._reported = now
                self._messages.put("step", report)
        every = self._job.monitoring.samples_every
        if self._grids is not None and every is not None:
            for adapter_id, step in report.done.items():
                if step % every == 0:
                    self._draw(self._grids, adapter_id, slots[adapter_id], step)
        if self._tensorboard is not None and report.step % self._job.cluster.checkpoint_every == 0:
            self._upload()

    def _draw(self, grids: SampleGrids, adapter_id: str, slot: int, step: int) -> None:
        grid = grids.draw(slot, self._concepts[adapter_id], f"{adapter_id}, step {step}")
        if not self._reports:
            return
        data = io.BytesIO()
        grid.save(data, format="PNG")
        self._store.put(f"{self._folder}/samples/{adapter_id}/{step:08d}.png", data.getvalue())
        if self._tensorboard is not None:
            self._tensorboard.images(adapter_id, step, grid)

    def __enter__(self) -> PackMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tensorboard is not None and self._event_files is not None:
            self._tensorboard.close()
            if error is None:
                self._upload()
            self._event_files.cleanup()

    def _upload(self) -> None:
        assert self._tensorboard is not None
        self._tensorboard.flush()
        for name, data in self._tensorboard.files().items():
            self._store.put(f"{self._folder}/tensorboard/{name}", data)
