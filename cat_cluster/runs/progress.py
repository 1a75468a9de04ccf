"""The progress record of a run, which its driver keeps in the store and everybody else reads."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from cat_cluster.spec.choices import AdapterPhase, Outcome
from cat_cluster.spec.job import JobSpec

HEARTBEAT_SECONDS = 10.0  # a driver writes its record at least this often
MISSED_HEARTBEATS = 6  # in a row, until the driver counts as lost: a minute covers a slow store and skewed clocks

RunState = Literal["waiting", "running", "done", "failed", "stopped"]
ENDED_RUN: tuple[RunState, ...] = ("done", "failed", "stopped")
ENDED_ADAPTER: tuple[AdapterPhase, ...] = get_args(Outcome)


def _finite(value: float | None) -> float | None:
    """Return the value if it is finite, else None: JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


Measure = Annotated[float | None, AfterValidator(_finite)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, from_attributes=True)

    def changed(self, **changes: Any) -> Self:
        """Return a copy with some fields replaced; the new values are validated."""
        return type(self).model_validate({**dict(self), **changes})


class TokenLoss(_Record):
    """The last losses of one token; cat is None where no row carried the CAT term."""

    identity: Measure
    cat: Measure = None


class AdapterProgress(_Record):
    """The progress of one adapter: its state, the step it has reached, last losses by token, metrics once evaluated.

    first_step, ended: when this attempt had taken the adapter's first step, and brought it to its end; ISO 8601 in UTC.
    permanent: it failed in a way in which the same job would fail again.
    """

    id: str
    revision: str | None = None
    state: AdapterPhase = "waiting"
    step: int = 0
    steps: int = 0
    first_step: str | None = None
    ended: str | None = None
    losses: dict[str, TokenLoss] = Field(default_factory=dict)
    reason: str | None = None
    permanent: bool = False
    metrics: dict[str, Measure] = Field(default_factory=dict)


class RunProgress(_Record):
    """The progress of a run. attempt: the attempt that writes the record, or will; times are ISO 8601 in UTC.

    started: when that attempt began, or a waiting run was submitted. reason: why the run as a whole failed; permanent:
    whether the same job would fail again, in all that has failed; untried: how many attempts have tried nothing since
    the one that found that.
    """

    run_id: str
    name: str
    state: RunState
    attempt: int
    started: str
    updated: str
    adapters: tuple[AdapterProgress, ...]
    reason: str | None = None
    permanent: bool = False
    untried: int = 0

    @classmethod
    def begin(cls, run_id: str, job: JobSpec, *, state: RunState, attempt: int) -> RunProgress:
        """Return the first record of an attempt, in which no adapter has begun."""
        now = timestamp()
        adapters = tuple(AdapterProgress(id=one.id, steps=one.training.steps) for one in job.resolved())
        return cls(
            run_id=run_id, name=job.name, state=state, attempt=attempt, started=now, updated=now, adapters=adapters
        )

    @property
    def ended(self) -> bool:
        """Whether no driver works on the run any more."""
        return self.state in ENDED_RUN

    def is_over(self, *, is_stopping: bool) -> bool:
        """Say whether nobody works on the run any more, or will: it has ended, or was asked to stop while it waited."""
        return self.ended or (is_stopping and self.state == "waiting")

    def adapter(self, adapter_id: str) -> AdapterProgress:
        """Return the progress of an adapter; KeyError if the run has no such adapter."""
        for adapter in self.adapters:
            if adapter.id == adapter_id:
                return adapter
        raise KeyError(adapter_id)

    def with_adapter(self, adapter_id: str, **changes: Any) -> RunProgress:
        """Return the record with some fields of one adapter replaced; KeyError if the run has no such adapter."""
        changed = self.adapter(adapter_id).changed(**changes)
        return self.changed(adapters=tuple(changed if one.id == adapter_id else one for one in self.adapters))

    def outcome(self) -> RunState:
        """Return the state in which the run ends: done when each adapter has ended and none failed, else failed."""
        succeeded = all(adapter.state in ENDED_ADAPTER and adapter.state != "failed" for adapter in self.adapters)
        return "done" if succeeded else "failed"

    def is_permanent(self) -> bool:
        """Say whether adapters failed, and all that did would fail again: others may succeed in another attempt."""
        failed = [adapter.permanent for adapter in self.adapters if adapter.state == "failed"]
        ended = all(adapter.state in ENDED_ADAPTER for adapter in self.adapters)
        return bool(failed) and ended and all(failed)

    def silent_seconds(self, now: datetime | None = None) -> float:
        """Return the seconds since the record was last written; the clocks of two machines may differ."""
        return silent_seconds(self.updated, now)


def silent_seconds(updated: str, now: datetime | None = None) -> float:
    """Return the seconds since a record's time of writing; the clocks of two machines may differ."""
    return ((now or datetime.now(UTC)) - datetime.fromisoformat(updated)).total_seconds()


def is_lost(silent: float) -> bool:
    """Say whether who keeps a record has been silent for so many seconds that it counts as lost."""
    return silent >= HEARTBEAT_SECONDS * MISSED_HEARTBEATS


def is_alive(progress: RunProgress, now: datetime | None = None) -> bool:
    """Say whether a driver works on the run: its record says so and was written within the last minute."""
    return progress.state == "running" and not is_lost(progress.silent_seconds(now))


def timestamp() -> str:
    """Return the current time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
