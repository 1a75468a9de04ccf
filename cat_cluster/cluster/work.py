"""An adapter that is to be brought to its end on Ray, and the run that it is for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cat_cluster.cluster.messages import OrderedAdapter
from cat_cluster.errors import SupersededError
from cat_cluster.pipeline.job import JobListener
from cat_cluster.pipeline.prepare import PreparedAdapter
from cat_cluster.registry import Registry
from cat_cluster.runs.progress import ENDED_ADAPTER, RunProgress, RunState, timestamp
from cat_cluster.runs.progress_writer import ProgressWriter
from cat_cluster.runs.run import Attempt, FencedStore
from cat_cluster.spec.job import JobSpec


@dataclass(frozen=True, eq=False)
class HeldRun:
    """A run that this process works on: what it holds it by, and who is told how it goes."""

    job: JobSpec
    attempt: Attempt
    writer: ProgressWriter
    listener: JobListener

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self.attempt.run.run_id

    def note(self, adapter_id: str, **changes: Any) -> None:
        """Change fields of one adapter's record. Whether the run is held yet is for its holder to find out."""
        if changes.get("state") in ENDED_ADAPTER:
            changes["ended"] = timestamp()
        with suppress(SupersededError):
            self.writer.adapter(adapter_id, **changes)

    def note_step(self, adapter_id: str, step: int, losses: Mapping[str, Mapping[str, float | None]]) -> None:
        """Note the step that an adapter has reached, and its losses by token."""
        first = self.writer.progress.adapter(adapter_id).first_step or timestamp()
        self.note(adapter_id, step=step, losses=losses, first_step=first)

    def end(self, state: RunState | None = None, reason: str | None = None, *, permanent: bool = False) -> None:
        """End the record: in a state or, if none is given, in the one that its adapters say."""
        progress = self.writer.leave()
        found = state or progress.outcome()
        is_permanent = permanent if state is not None else progress.is_permanent()
        self._write(progress.changed(state=found, reason=reason, permanent=is_permanent))

    def give_back(self) -> None:
        """Let go of the run, which waits for whoever claims it next and goes on from its checkpoints."""
        progress = self.writer.leave()
        left = [one if one.state in ENDED_ADAPTER else one.changed(state="waiting") for one in progress.adapters]
        self._write(progress.changed(state="waiting", attempt=self.attempt.number + 1, adapters=tuple(left)))

    def _write(self, progress: RunProgress) -> None:
        self.attempt.check()
        self.attempt.run.write_progress(progress.changed(updated=timestamp()))

    @property
    def registry(self) -> Registry:
        """Where its adapters are published, as long as the run is held."""
        return Registry(FencedStore(self.attempt))


@dataclass(frozen=True, eq=False)
class Work:
    """One adapter of a held run."""

    run: HeldRun
    adapter: PreparedAdapter

    @property
    def adapter_id(self) -> str:
        """The adapter's id, its own in its run."""
        return self.adapter.resolved.id

    @property
    def name(self) -> str:
        """The adapter's name among all attempts of all runs: one that was stopped may be back before workers know."""
        return f"{self.run.run_id}-{self.run.attempt.number}/{self.adapter_id}"

    @property
    def identity(self) -> tuple[str, str]:
        """The adapter's id and revision, which several runs may ask for."""
        return self.adapter_id, self.adapter.revision

    @property
    def steps(self) -> int:
        """How many it takes in all."""
        return self.adapter.resolved.training.steps

    def ordered(self) -> OrderedAdapter:
        """Return it as the workers are told."""
        return OrderedAdapter(
            self.name,
            self.adapter.resolved,
            self.adapter.revision,
            self.run.run_id,
            self.run.attempt.number,
            self.run.job.monitoring,
        )


def by_run(works: Iterable[Work]) -> dict[HeldRun, list[Work]]:
    """Return works by the run that they are for."""
    found: dict[HeldRun, list[Work]] = {}
    for work in works:
        found.setdefault(work.run, []).append(work)
    return found


def names_of(works: Iterable[Work]) -> str:
    """Return what people call a group of works."""
    names = [work.adapter_id for work in works]
    if not names:
        return "workers without adapters"
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
