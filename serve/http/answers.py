"""The bodies of HTTP responses: those of OpenAI's images API, and this service's own fields."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve.calls import AdminAction, FileKind


class CatFacts(BaseModel):
    """This service's fields beside OpenAI's."""

    request_id: str = Field(description="As in the header x-request-id.")
    drift: str = Field(description="Drift state of the revision: ok, warning, alarm or unknown; the worst of a stack.")
    note: str | None = Field(
        description="Why another revision than the requested one was used, what of the prompts is not read or not as "
        "it may be meant, and which fields of the request change nothing, if so."
    )
    refused: list[dict[str, Any]] | None = Field(
        default=None, description="Images that the safety checker kept back: index, seed and error of each."
    )


class ImageItem(BaseModel):
    """One image."""

    b64_json: str | None = Field(default=None, description="The file in base64; its metadata has the parameters.")
    url: str | None = Field(default=None, description="The same as a data URL, with response_format url.")
    seed: int
    revised_prompt: None = Field(default=None, description="Prompts are never rewritten.")
    facts: dict[str, Any] = Field(description="Waiting and denoising times, batch sizes.")
    safety: dict[str, Any] | None = Field(
        default=None, description="What the safety checker found: flagged (null: it failed), label, score; null: none."
    )


class ImagesResponse(BaseModel):
    """The images of a request."""

    created: int = Field(description="Unix time.")
    data: list[ImageItem]
    model: str = Field(
        description="The model used: `id@r-...`, of a stack each with a + between them, or the base model's name."
    )
    size: str = Field(description="WIDTHxHEIGHT of the images.")
    output_format: FileKind
    cat: CatFacts


class ErrorDetail(BaseModel):
    """What went wrong, and what to do about it."""

    message: str
    type: str
    param: str | None = Field(default=None, description="The field with the error.")
    code: str


class ErrorResponse(BaseModel):
    """Every response that is not a success, in OpenAI's shape."""

    error: ErrorDetail


class ModelCard(BaseModel):
    """Something that `model` may name."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time of publication; 0 for the base model.")
    owned_by: str = "cat-cluster"
    root: str = Field(description="What it refers to now: `id@r-...`, or the base model itself.")
    parent: str | None = Field(description="The base model of an adapter.")


class Page(BaseModel):
    """A part of a list, as OpenAI's lists have it; the next one is that `after` the last id."""

    object: Literal["list"] = "list"
    first_id: str | None = Field(description="Of `data`; null if there is none.")
    last_id: str | None = Field(description="Of `data`; null if there is none.")
    has_more: bool = Field(description="Whether there are entries behind these.")


class ModelList(Page):
    """The base model, then every adapter with a `latest` revision."""

    data: list[ModelCard]


class ConceptCard(BaseModel):
    """A concept of an adapter: its trigger token and its class noun."""

    token: str
    class_noun: str
    alpha: float | None = Field(description="Weight of the CAT loss; null: not known.")


class RevisionCard(BaseModel):
    """One revision, as published."""

    name: str = Field(description="`id@r-...`")
    revision: str
    status: str
    created: str
    base: str
    base_fingerprint: str
    method: str
    rank: int
    targets: str
    concepts: list[ConceptCard]
    metrics: dict[str, float | None] = Field(description="Scores under the judge; docs/kps.md explains each.")
    intervals: dict[str, Any] = Field(description="95% intervals of the scores.")
    leak_matrix: Any = None
    judge: dict[str, Any] | None = None
    samples: list[str] = Field(description="Images at /v1/adapters/{reference}/samples/{name}; photos for admins.")


class AdapterCard(BaseModel):
    """An adapter: its names, its revisions (newest first) and what `latest` is."""

    id: str
    aliases: dict[str, str] = Field(description="Alias -> revision.")
    revisions: list[str]
    damaged: list[str] = Field(description="Revisions whose manifest cannot be read.")
    damaged_aliases: list[str] = Field(description="Aliases whose record cannot be read.")
    latest: RevisionCard | None


class AdapterList(Page):
    """Adapters of the registry, in the order of their ids, of which `cup-2` comes before `cup`."""

    data: list[AdapterCard]


class AdapterDetail(RevisionCard):
    """The revision that a reference names, and the names of its adapter."""

    id: str
    aliases: dict[str, str]
    revisions: list[str]


class ReferenceScore(BaseModel):
    """A score over the pairs that were measured when the revision was published."""

    mean: float
    std: float
    count: int


class DriftResponse(BaseModel):
    """How a revision's scores have moved since it was measured."""

    name: str
    state: str = Field(description="ok, warning, alarm or unknown.")
    reason: str | None = Field(description="Of a warning or an alarm.")
    quarantined: dict[str, str] | None = Field(description="Why the revision is out of service, since when, by whom.")
    states: dict[str, str] = Field(description="State of every revision of the adapter that is being probed.")
    policy: str = Field(description="What an alarm does.")
    canonical_every_s: float = Field(description="Seconds between canonical probes of a resident adapter.")
    reference: dict[str, ReferenceScore] = Field(description="By score: kps, identity, base_drift, decoy_drift.")
    detectors: Any = Field(default=None, description="By token, score and detector: its statistic over its limit.")
    history: list[dict[str, Any]] = Field(description="Probe records of all replicas, oldest first.")


class ActionResponse(BaseModel):
    """What an action on an adapter did."""

    action: AdminAction
    reference: str
    result: dict[str, Any]


class StatusResponse(BaseModel):
    """The engine's state."""

    model_config = ConfigDict(extra="allow")


class HealthResponse(BaseModel):
    """Whether the process is running, or ready."""

    status: Literal["ok", "ready"]
