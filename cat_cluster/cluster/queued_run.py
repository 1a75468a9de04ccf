"""A run of the queue that a training service works on, and what is said of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from cat_cluster.cluster.work import HeldRun, Work
from cat_cluster.errors import CatClusterError
from cat_cluster.pipeline.job import AdapterResult
from cat_cluster.pipeline.prepare import PreparedAdapter
from cat_cluster.runs.progress import RunProgress, timestamp
from cat_cluster.runs.queue import QueueEntry
from cat_cluster.spec.job import ResolvedAdapter
from cat_cluster.training.step_report import StepReport

Found = tuple[ResolvedAdapter, PreparedAdapter | CatClusterError]


@dataclass(eq=False)
class QueuedRun:
    """A run that the service works on.

    preparation: reads its photos in a thread, None once all are; found: what it has found that nobody has looked at;
    waiting: adapters without a place; begun: those at work, by name.
    """

    entry: QueueEntry
    run: HeldRun
    preparation: Future[None] | None = None
    found: deque[Found] = field(default_factory=deque)
    waiting: deque[Work] = field(default_factory=deque)
    begun: dict[str, Work] = field(default_factory=dict)

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left to do."""
        return self.preparation is None and not self.waiting and not self.begun


class RunLog:
    """A JobListener of a run that says what happens to it, a line each."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def message(self, text: str) -> None:
        """A line for people."""
        self._say(text)

    def started(self, steps: Mapping[str, int], together: int) -> None:
        """Adapters begin to train."""
        names = ", ".join(f"{adapter_id} ({own} steps)" for adapter_id, own in steps.items())
        self._say(f"training {names}; {together} together")

    def step(self, report: StepReport) -> None:
        """The run's record says it."""

    def images(self, adapter_id: str, done: int, total: int) -> None:
        """The run's record says when they are done."""

    def finished(self, result: AdapterResult) -> None:
        """An adapter is at its end."""
        self._say(f"{result.outcome} {result.adapter_id}: {result.reason or result.revision}")


def refused(entry: QueueEntry, attempt: int, reason: str) -> RunProgress:
    """Return the record of a run that nothing can be done with: it has failed, and would again."""
    now = timestamp()
    return RunProgress(
        run_id=entry.run_id,
        name=entry.name,
        state="failed",
        attempt=attempt,
        started=now,
        updated=now,
        adapters=(),
        reason=reason,
        permanent=True,
    )
