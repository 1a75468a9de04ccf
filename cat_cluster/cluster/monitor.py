"""Monitoring a pack in training: events for its driver, metrics, TensorBoard files and sample grids."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from cat_cluster.cluster.messages import Messages, OrderedAdapter
from cat_cluster.errors import SupersededError
from cat_cluster.evaluation.samples import SampleGrids
from cat_cluster.lora.bank import LoraBank
from cat_cluster.models.base_model import BaseModel
from cat_cluster.pipeline.prepare import PreparedAdapter
from cat_cluster.store import ObjectStore
from cat_cluster.telemetry import Metrics
from cat_cluster.training.recorders import TensorBoardRecorder, TrainingMetrics
from cat_cluster.training.step_report import StepReport

REPORT_SECONDS = 0.25  # between two events of a pack; the first and the last step are always reported


@dataclass(frozen=True, eq=False)
class _Watched:
    """An adapter in training, and the store of its run."""

    ordered: OrderedAdapter
    concepts: list[tuple[str, str]]
    store: ObjectStore

    def put(self, key: str, data: bytes) -> None:
        """Store an object of the run, unless another driver has taken it over."""
        with suppress(SupersededError):
            self.store.put(f"runs/{self.ordered.run_id}/{key}", data)


class PackMonitor:
    """Monitors the training of a pack on one worker. A context manager.

    reports: whether this worker reports for the pack; one of them does. all_draw: whether all of them take part in each
    image, as where the base is sharded. upload_every: steps between two uploads of TensorBoard's files.
    """

    def __init__(
        self, messages: Messages, metrics: Metrics, *, reports: bool, all_draw: bool, upload_every: int
    ) -> None:
        self._messages = messages
        self._reports, self._draws, self._upload_every = reports, reports or all_draw, upload_every
        self._reported = 0.0
        self._watched: dict[str, _Watched] = {}
        self._grids: SampleGrids | None = None
        self._metrics = TrainingMetrics(metrics)
        self._event_files = tempfile.TemporaryDirectory(prefix="cat-cluster-")
        self._tensorboard = TensorBoardRecorder(Path(self._event_files.name))

    def open(self, base: BaseModel, bank: LoraBank) -> None:
        """Set what samples are generated with."""
        self._grids = SampleGrids(base, bank)

    def admit(self, ordered: OrderedAdapter, adapter: PreparedAdapter, store: ObjectStore) -> None:
        """Know an adapter that comes in; store: of its run."""
        concepts = [(concept.token, concept.class_noun) for concept in adapter.concepts]
        self._watched[ordered.name] = _Watched(ordered, concepts, store)

    def dismiss(self, name: str) -> None:
        """Know an adapter no more that has left the pack, and keep nothing of it here."""
        watched = self._watched.pop(name)
        self._upload({name: watched})
        self._tensorboard.forget(name)
        self._metrics.forget(watched.ordered.resolved.id)

    def checkpoint(self, seconds: float, size: int) -> None:
        """Record that a checkpoint of `size` bytes was stored in `seconds`."""
        self._metrics.checkpoint(seconds, size)

    def step(self, report: StepReport, slots: Mapping[str, int]) -> None:
        """Record a step that is done; slots: of the bank, by the adapter's name."""
        if self._reports:
            self._metrics.step(report.of({name: one.ordered.resolved.id for name, one in self._watched.items()}))
            self._tensorboard.step(report.of({name: name for name, one in self._watched.items() if _has_curves(one)}))
            now = time.monotonic()
            if now - self._reported >= REPORT_SECONDS or report.notable:
                self._reported = now
                self._messages.put("step", report)
        for name, step in report.done.items():
            every = self._watched[name].ordered.monitoring.samples_every
            if self._draws and every is not None and step % every == 0:
                self._draw(self._watched[name], slots[name], step)
        if report.step % self._upload_every == 0:
            self._upload(self._watched)

    def _draw(self, watched: _Watched, slot: int, step: int) -> None:
        assert self._grids is not None
        adapter_id = watched.ordered.resolved.id
        grid = self._grids.draw(slot, watched.concepts, f"{adapter_id}, step {step}")
        if not self._reports:
            return
        data = io.BytesIO()
        grid.save(data, format="PNG")
        watched.put(f"samples/{adapter_id}/{step:08d}.png", data.getvalue())
        if _has_curves(watched):
            self._tensorboard.images(watched.ordered.name, step, grid)

    def __enter__(self) -> PackMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tensorboard.close()
        if error is None:
            self._upload(self._watched)
        self._event_files.cleanup()

    def _upload(self, watched: Mapping[str, _Watched]) -> None:
        if not self._reports or not any(map(_has_curves, watched.values())):
            return
        self._tensorboard.flush()
        for path, data in self._tensorboard.files().items():
            name, _, file = path.rpartition("/")
            if name in watched:
                watched[name].put(f"tensorboard/{watched[name].ordered.resolved.id}/{file}", data)


def _has_curves(watched: _Watched) -> bool:
    return watched.ordered.monitoring.tensorboard
