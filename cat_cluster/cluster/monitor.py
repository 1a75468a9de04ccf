"""What a running pack shows of itself: events for its driver, metrics, TensorBoard files and sample grids."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from cat_cluster.cluster.event_queue import EventQueue
from cat_cluster.evaluation.samples import SampleGrids
from cat_cluster.lora.bank import LoraBank
from cat_cluster.pipeline.prepare import PreparedAdapter
from cat_cluster.spec.job import JobSpec
from cat_cluster.store import ObjectStore
from cat_cluster.telemetry import Metrics
from cat_cluster.training.loop import StepReport
from cat_cluster.training.recorders import TensorBoardRecorder, TrainingMetrics

REPORT_SECONDS = 0.25  # between two events of a pack; the first and the last step are always told


class PackMonitor:
    """Follows the training of a pack on one worker; a context manager. `writes`: this is the worker that tells."""

    def __init__(
        self,
        job: JobSpec,
        pack: Sequence[PreparedAdapter],
        store: ObjectStore,
        board: EventQueue,
        metrics: Metrics,
        run_id: str,
        *,
        writes: bool,
    ) -> None:
        self._job, self._pack, self._board = job, tuple(pack), board
        self._writes = writes
        self._told = 0.0
        self._grids: Callable[[int], None] | None = None
        self._folder = f"runs/{run_id}"
        self._store = store
        self._metrics = TrainingMetrics(metrics)
        self._events: tempfile.TemporaryDirectory[str] | None = None
        self._tensorboard: TensorBoardRecorder | None = None
        if writes and job.monitoring.tensorboard:
            self._events = tempfile.TemporaryDirectory(prefix="cat-cluster-")
            self._tensorboard = TensorBoardRecorder(Path(self._events.name))

    def open_bank(self, bank: LoraBank) -> None:
        """Take the pack's bank, to draw samples with."""
        base = self._pack[0].base
        if self._job.monitoring.samples_every is None:
            return
        if not self._writes and self._job.cluster.zero_stage != 3:
            return  # where the base is sharded every worker takes part in each picture
        drawn = SampleGrids(base, bank)

        def draw(step: int) -> None:
            for slot, adapter in enumerate(self._pack, start=1):
                concepts = [(concept.token, concept.class_noun) for concept in adapter.concepts]
                picture = drawn.draw(slot, concepts, f"{adapter.resolved.id}, step {step}")
                if not self._writes:
                    continue
                data = io.BytesIO()
                picture.save(data, format="PNG")
                self._store.put(f"{self._folder}/samples/{adapter.resolved.id}/{step:08d}.png", data.getvalue())
                if self._tensorboard is not None:
                    self._tensorboard.images(adapter.resolved.id, step, picture)

        self._grids = draw

    def checkpoint(self, seconds: float, size: int) -> None:
        """Take in that a checkpoint of `size` bytes was stored."""
        self._metrics.checkpoint(seconds, size)

    def step(self, report: StepReport) -> None:
        """Take in a step that is done."""
        if self._writes:
            self._metrics.step(report)
            if self._tensorboard is not None:
                self._tensorboard.step(report)
            now = time.monotonic()
            if now - self._told >= REPORT_SECONDS or report.step in (1, report.steps):
                self._told = now
                self._board.tell("step", report)
        every = self._job.monitoring.samples_every
        if self._grids is not None and every is not None and report.step % every == 0:
            self._grids(report.step)
        if self._tensorboard is not None and report.step % self._job.cluster.checkpoint_every == 0:
            self._upload()

    def __enter__(self) -> PackMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tensorboard is not None and self._events is not None:
            self._tensorboard.close()
            if error is None:
                self._upload()
            self._events.cleanup()

    def _upload(self) -> None:
        assert self._tensorboard is not None
        self._tensorboard.flush()
        for name, data in self._tensorboard.files().items():
            # A folder per pack: what one of them takes back after a resume must not take another's steps along.
            self._store.put(f"{self._folder}/tensorboard/{self._pack[0].resolved.id}/{name}", data)
