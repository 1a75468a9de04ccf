"""The bodies of training's responses: OpenAI's files, fine-tuning jobs, events and checkpoints; and whole runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, Field

from cat_cluster.runs.progress import RunProgress

JobStatus = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]


class FileFacts(BaseModel):
    """What an upload holds, by the names of its members."""

    photos: list[str]
    masks: list[str]
    captions: list[str]
    sha256: str = Field(description="Of the archive as it is stored: equal photos and captions have the same.")


class FileCard(BaseModel):
    """An upload of photos."""

    id: str
    object: Literal["file"] = "file"
    bytes: int = Field(description="Of what was sent.")
    created_at: int = Field(description="Unix time.")
    expires_at: None = Field(default=None, description="A file stays until it is deleted.")
    filename: str
    purpose: Literal["fine-tune"] = "fine-tune"
    status: Literal["processed"] = "processed"
    status_details: None = None
    cat: FileFacts


class Listed(BaseModel):
    """A part of a list; the next one is that `after` the id of the last entry."""

    object: Literal["list"] = "list"
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool

    @classmethod
    def of(cls, data: Sequence[Any], *, has_more: bool) -> Self:
        """Return a part of a list with these entries, each of which has an id."""
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return cls.model_validate({"data": list(data), "first_id": first, "last_id": last, "has_more": has_more})


class FileList(Listed):
    """A caller's files."""

    data: list[FileCard]


class FileDeleted(BaseModel):
    """A file that is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class JobFacts(BaseModel):
    """This service's facts of a job."""

    run: str = Field(description="The run: GET /v1/runs/{run} and `cat-cluster jobs status` tell of it too.")
    adapter: str
    phase: str = Field(description="waiting, training, evaluating, published, already published, rejected or failed.")
    step: int
    steps: int
    losses: dict[str, Any] = Field(description="By token, the last losses.")
    metrics: dict[str, float | None] = Field(description="Once it was measured; docs/kps.md explains each.")
    is_stopping: bool = Field(description="Somebody has asked it to stop.")
    priority: int
    deadline: str | None


class FineTuningJob(BaseModel):
    """An adapter that is trained, as OpenAI's clients read it; its id is that of the run."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    model: str = Field(description="The base model.")
    fine_tuned_model: str | None = Field(description="The model to draw with, once it is published: `id@r-...`.")
    organization_id: str = Field(description="Whose it is: the name of the key.")
    status: JobStatus
    training_file: str
    validation_file: None = None
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    result_files: list[str] = []
    trained_tokens: None = Field(default=None, description="There are none.")
    estimated_finish: None = None
    integrations: list[Any] = []
    seed: int = 0
    metadata: dict[str, str] | None = None
    error: JobError | None
    cat: JobFacts


class JobList(Listed):
    """What a caller has asked for, the newest first."""

    data: list[FineTuningJob]


class JobEvent(BaseModel):
    """Something that has happened to a job. data: of `metrics`, the step, losses and, at the end, the scores."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"] = "info"
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] | None = None


class EventList(Listed):
    """A job's events, the newest first."""

    data: list[JobEvent]


class Checkpoint(BaseModel):
    """A step that training would go on from; and the adapter itself, which can be drawn with."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int = Field(description="Unix time of the run's last record, which is no older.")
    fine_tuned_model_checkpoint: str | None = Field(
        description="The published adapter; null: this step is kept for training to go on, and cannot be drawn with."
    )
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, Any]


class CheckpointList(Listed):
    """A job's checkpoints, the newest first."""

    data: list[Checkpoint]


class RunCard(BaseModel):
    """A run: a job of one adapter or many, and how far it is."""

    id: str
    object: Literal["run"] = "run"
    created_at: int
    status: JobStatus
    owner: str | None = Field(description="The name of the key that asked for it; null: it was entered elsewhere.")
    priority: int | None
    deadline: str | None
    is_stopping: bool = Field(description="Somebody has asked it to stop.")
    progress: RunProgress = Field(description="As `cat-cluster jobs status --json` tells it.")


class RunList(Listed):
    """Runs: a caller's own, the newest first; or all, by their ids."""

    data: list[RunCard]
