"""From what the store knows of a run to what clients are told: status, job, events and checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

from cat_cluster.registry.references import Reference
from cat_cluster.runs.progress import ENDED_ADAPTER, AdapterProgress
from serve.http.training.answers import Checkpoint, FineTuningJob, JobError, JobEvent, JobFacts, JobStatus, RunCard
from serve.http.training.submissions import SeenRun

EVENT_ID = r"^ftevent-[0-9a-f]{12}-[0-9]{8}-[0-9]-[0-9]{12}$"
# What an event is of, in the order in which it comes within an attempt.
_CREATED, _BEGUN, _STEP, _MEASURED, _STOPPING, _ENDED = range(6)
_PUBLISHED = ("published", "already published")


def status_of(seen: SeenRun) -> JobStatus:
    """Return OpenAI's word for the state of a run.

    A run that was asked to stop before anybody began with it is cancelled: nothing will be done for it.
    """
    progress = seen.progress
    if progress.state == "waiting":
        return "cancelled" if seen.has_ended else "queued"
    if progress.state != "running":
        ended: Mapping[str, JobStatus] = {"done": "succeeded", "failed": "failed", "stopped": "cancelled"}
        return ended[progress.state]
    if all(adapter.state == "waiting" for adapter in progress.adapters):
        # Whoever holds it reads its photos first; then it waits for a place.
        return "queued" if any(adapter.revision for adapter in progress.adapters) else "validating_files"
    return "running"


def run_card(seen: SeenRun) -> RunCard:
    """Return a run as its routes tell it."""
    asked = seen.asked
    return RunCard(
        id=seen.run_id,
        created_at=_created(seen),
        status=status_of(seen),
        owner=None if asked is None else asked.owner,
        priority=None if asked is None else asked.priority,
        deadline=_deadline(seen),
        is_stopping=seen.is_stopping,
        progress=seen.progress,
    )


def job_of(seen: SeenRun) -> FineTuningJob:
    """Return a run of one adapter as OpenAI's job; one that was not entered as a job has no file."""
    asked = {} if seen.asked is None else seen.asked.asked
    adapter = seen.progress.adapters[0] if seen.progress.adapters else AdapterProgress(id="")
    hyperparameters = asked.get("hyperparameters") or {}
    return FineTuningJob(
        id=seen.run_id,
        created_at=_created(seen),
        finished_at=_unix(seen.progress.updated) if seen.has_ended else None,
        model=asked.get("model") or "",
        fine_tuned_model=_model_of(adapter),
        organization_id="" if seen.asked is None else seen.asked.owner,
        status=status_of(seen),
        training_file=asked.get("training_file") or "",
        hyperparameters=hyperparameters,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        seed=asked.get("seed") or 0,
        metadata=asked.get("metadata"),
        error=_error_of(seen, adapter),
        cat=JobFacts(
            run=seen.run_id,
            adapter=adapter.id,
            phase=adapter.state,
            step=adapter.step,
            steps=adapter.steps,
            losses={token: loss.model_dump() for token, loss in adapter.losses.items()},
            metrics=adapter.metrics,
            is_stopping=seen.is_stopping,
            priority=0 if seen.asked is None else seen.asked.priority,
            deadline=_deadline(seen),
        ),
    )


def events_of(seen: SeenRun) -> list[JobEvent]:
    """Return what has happened to a run, the oldest first; ids sort by when.

    The store keeps the last record of a run and who began with it when, so of its steps only the last is told.
    """
    return sorted(_events(seen), key=lambda event: event.id)


def checkpoints_of(seen: SeenRun, steps: Mapping[str, Sequence[int]]) -> list[Checkpoint]:
    """Return the checkpoints of a run, the newest first. steps: by adapter, of those that the store has."""
    found, at = [], _unix(seen.progress.updated)
    for adapter in seen.progress.adapters:
        if (model := _model_of(adapter)) is not None:
            metrics = {"step": adapter.steps, **adapter.metrics}
            found.append(_checkpoint(seen, adapter, adapter.steps, at, model, metrics))
        found += [_checkpoint(seen, adapter, step, at, None, {"step": step}) for step in steps.get(adapter.id, ())]
    return found


def _checkpoint(
    seen: SeenRun, adapter: AdapterProgress, step: int, at: int, model: str | None, metrics: Mapping[str, object]
) -> Checkpoint:
    kind = "step" if model is None else "model"
    return Checkpoint(
        id=f"ftckpt-{seen.run_id.removeprefix('run-')}-{adapter.id}-{kind}-{step:08d}",
        created_at=at,
        fine_tuned_model_checkpoint=model,
        fine_tuning_job_id=seen.run_id,
        step_number=step,
        metrics=dict(metrics),
    )


def _events(seen: SeenRun) -> Iterator[JobEvent]:
    progress, attempt, at = seen.progress, seen.progress.attempt, _unix(seen.progress.updated)
    yield JobEvent(id=_id(seen, 0, _CREATED), created_at=_created(seen), message=f"Created {seen.run_id}")
    for number, claim in seen.claims.items():
        by = "" if claim.service is None else f" {claim.service}"
        message = f"The training service{by} began with it (attempt {number})"
        yield JobEvent(id=_id(seen, number, _BEGUN), created_at=_unix(claim.time), message=message)
    for index, adapter in enumerate(progress.adapters):
        if adapter.step > 0:
            yield _step_event(seen, adapter, index, at)
        if adapter.state == "evaluating":
            message = f"{adapter.id}: trained, and is measured"
            yield JobEvent(id=_id(seen, attempt, _MEASURED, index), created_at=at, message=message)
        if adapter.state in ENDED_ADAPTER:
            yield _end_event(seen, adapter, index, at)
    if seen.is_stopping:
        yield JobEvent(id=_id(seen, attempt, _STOPPING, 0), created_at=at, level="warn", message="Asked to stop")
    if progress.ended:
        told = {"done": "Done", "failed": f"Failed: {progress.reason or 'see its adapters'}", "stopped": "Stopped"}
        yield JobEvent(
            id=_id(seen, attempt, _ENDED, 10**9),
            created_at=at,
            level="error" if progress.state == "failed" else "info",
            message=told[progress.state],
        )


def _step_event(seen: SeenRun, adapter: AdapterProgress, index: int, at: int) -> JobEvent:
    losses = [loss.identity for loss in adapter.losses.values() if loss.identity is not None]
    data = {
        "adapter": adapter.id,
        "step": adapter.step,
        "total_steps": adapter.steps,
        "train_loss": sum(losses) / len(losses) if losses else None,
        "losses": {token: loss.model_dump() for token, loss in adapter.losses.items()},
    }
    message = f"{adapter.id}: step {adapter.step} of {adapter.steps}"
    return JobEvent(
        id=_id(seen, seen.progress.attempt, _STEP, 1000 * adapter.step + index),
        created_at=at,
        message=message,
        type="metrics",
        data=data,
    )


def _end_event(seen: SeenRun, adapter: AdapterProgress, index: int, at: int) -> JobEvent:
    place = _id(seen, seen.progress.attempt, _ENDED, index)
    if adapter.state == "failed":
        message = f"{adapter.id}: failed: {adapter.reason}"
        return JobEvent(id=place, created_at=at, level="error", message=message)
    name = f"{adapter.id}@{adapter.revision}"
    why = f": {adapter.reason}" if adapter.reason else ""
    return JobEvent(
        id=place,
        created_at=at,
        level="warn" if adapter.state == "rejected" else "info",
        message=f"{adapter.state.capitalize()} {name}{why}",
        type="metrics",
        data={"adapter": adapter.id, "model": name, **adapter.metrics},
    )


def _id(seen: SeenRun, attempt: int, kind: int, number: int = 0) -> str:
    return f"ftevent-{seen.run_id.removeprefix('run-')}-{attempt:08d}-{kind}-{number:012d}"


def is_event_id(text: str) -> bool:
    """Say whether a text is the id of an event."""
    return re.fullmatch(EVENT_ID, text) is not None


def _error_of(seen: SeenRun, adapter: AdapterProgress) -> JobError | None:
    reason = seen.progress.reason or adapter.reason
    if seen.progress.state != "failed":
        return None
    return JobError(code="training_failed", message=reason or "the service gave no reason; its log has more")


def _model_of(adapter: AdapterProgress) -> str | None:
    if adapter.state not in _PUBLISHED or adapter.revision is None:
        return None
    return str(Reference(adapter.id, adapter.revision))


def _deadline(seen: SeenRun) -> str | None:
    return None if seen.asked is None or seen.asked.deadline is None else seen.asked.deadline.isoformat()


def _created(seen: SeenRun) -> int:
    return _unix(seen.progress.started) if seen.asked is None else seen.asked.created_at


def _unix(time: str) -> int:
    return int(datetime.fromisoformat(time).timestamp())
