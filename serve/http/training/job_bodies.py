"""The bodies that ask for training: OpenAI's fine-tuning job with this service's fields beside it, and a whole spec."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, JsonValue, field_validator
from pydantic_core import PydanticCustomError

from cat_cluster.errors import SpecError
from cat_cluster.runs.queue import HIGHEST_PRIORITY, LOWEST_PRIORITY
from cat_cluster.spec.choices import MethodName
from cat_cluster.spec.job import JobSpec, job_of_json, spec_json_schema
from cat_cluster.spec.sections import TrainingSpec
from serve.http.http_errors import HttpError
from serve.http.schema import RequestBody
from serve.http.training.stored_files import FILE_ID, StoredFile

MOST_EPOCHS, MOST_ROWS = 10_000, 64
_PARTS = re.compile(r"^(?:adapters\[0\]\.)?(?:concepts\[0\]\.)?(?=\S)")
_FIELDS = {"id": "suffix", "images": "training_file", "base": "model", "name": "suffix"}
_DIRECT = ("steps", "rank", "learning_rate", "seed")  # of `training`, which a job has at its top level too


def _with_zone(text: str) -> str:
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("write a time as ISO 8601 has it, such as 2026-12-01T18:00:00Z") from None
    if when.tzinfo is None:
        raise ValueError("give the zone of the time too, such as Z, or +01:00")
    return text


Priority = Annotated[
    int, Field(ge=LOWEST_PRIORITY, le=HIGHEST_PRIORITY, description="Of runs that wait, the highest goes first.")
]
Deadline = Annotated[
    str,
    AfterValidator(_with_zone),
    Field(
        json_schema_extra={"format": "date-time"},
        description="When it is needed: of one's own runs of a priority the earliest goes first.",
        examples=["2026-12-01T18:00:00Z"],
    ),
]
Auto = Literal["auto"]


class Hyperparameters(RequestBody):
    """OpenAI's hyperparameters; `auto`, and absent: as this service has it."""

    n_epochs: Annotated[int, Field(ge=1, le=MOST_EPOCHS)] | Auto = Field(
        default="auto",
        description="How often each photo is seen on average: it becomes `steps`, photos times epochs over the rows of "
        "a step.",
    )
    batch_size: Annotated[int, Field(ge=1, le=MOST_ROWS)] | Auto = Field(
        default="auto", description="Rows of each step: it becomes `training.rows_per_concept`."
    )
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | Auto = Field(
        default="auto", description="Times the default learning rate: it becomes `learning_rate`."
    )


class Supervised(RequestBody):
    """The hyperparameters of a supervised job."""

    hyperparameters: Hyperparameters = Hyperparameters()


class SupervisedMethod(RequestBody):
    """OpenAI's `method`; the others of OpenAI have no meaning for images."""

    type: Literal["supervised"]
    supervised: Supervised = Supervised()


class FineTuningRequest(RequestBody):
    """A job as OpenAI's client has it, and beside it this service's fields, where `extra_body` puts them."""

    model: str = Field(max_length=1024, description="The base model, as GET /v1/models lists it first.")
    training_file: str = Field(pattern=FILE_ID, description="The photos: a file of POST /v1/files.")
    suffix: str = Field(max_length=63, description="The name of the adapter: a-z, 0-9 and -.", examples=["my-cup"])
    hyperparameters: Hyperparameters | None = Field(default=None, description="As in `method`, whose older form it is.")
    method: SupervisedMethod | MethodName | None = Field(
        default=None, description="OpenAI's supervised method; or the adapter's: cat, or lora for plain LoRA."
    )
    seed: int | None = Field(default=None, ge=0, le=2**63 - 1, description="Seed of every random draw of the training.")
    metadata: dict[str, Annotated[str, Field(max_length=512)]] | None = Field(
        default=None, max_length=16, description="Pairs that the job tells again."
    )
    token: str | None = Field(default=None, max_length=100, description="The concept's rare trigger word, such as sks.")
    class_noun: str | None = Field(default=None, max_length=100, description="What it is an example of, such as cup.")
    alpha: float | None = Field(default=None, allow_inf_nan=False, description="Weight of the CAT term.")
    captions: str | None = Field(default=None, max_length=20, description="auto, txt, metadata or template.")
    template: str | None = Field(default=None, max_length=1000, description="Caption of photos that have none.")
    steps: int | None = Field(default=None, description="Optimiser steps, in place of n_epochs.")
    rank: int | None = Field(default=None, description="Rank of the adapter.")
    learning_rate: float | None = Field(default=None, allow_inf_nan=False, description="In place of the multiplier.")
    training: dict[str, JsonValue] = Field(default={}, description="Any other key of a job spec's `training`.")
    evaluation: dict[str, JsonValue] = Field(default={}, description="Any key of a job spec's `evaluation`.")
    priority: Priority = 0
    deadline: Deadline | None = None
    validation_file: str | None = Field(default=None, max_length=100, description="Refused: see `evaluation`.")
    integrations: list[JsonValue] | None = Field(default=None, max_length=10, description="Refused unless empty.")

    @field_validator("method", mode="before")
    @classmethod
    def _means_something(cls, method: Any) -> Any:
        kind = method.get("type") if isinstance(method, dict) else method
        allowed = ("supervised",) if isinstance(method, dict) else get_args(MethodName)
        if isinstance(kind, str) and kind not in allowed:
            raise PydanticCustomError(
                "method",
                "{kind} is no method here: send {allowed}, or leave it out",
                {"kind": repr(kind[:80]), "allowed": " or ".join(allowed)},
            )
        return method

    @property
    def given(self) -> Hyperparameters:
        """OpenAI's hyperparameters, wherever they stand."""
        if isinstance(self.method, SupervisedMethod) and "supervised" in self.method.model_fields_set:
            return self.method.supervised.hyperparameters
        return self.hyperparameters or Hyperparameters()

    def echoed(self) -> dict[str, Any]:
        """Return what the job tells again of its request."""
        return {
            "model": self.model,
            "training_file": self.training_file,
            "hyperparameters": self.given.model_dump(),
            "seed": self.seed,
            "metadata": self.metadata,
        }

    def to_job(self, file: StoredFile) -> JobSpec:
        """Return the job spec that is asked for; HttpError 400 that names each field and what to do."""
        self._refuse_meaningless()
        concept = {
            "token": self.token,
            "class_noun": self.class_noun,
            "alpha": self.alpha,
            "captions": self.captions,
            "template": self.template,
        }
        present = {name: value for name, value in concept.items() if value is not None}
        spec = {
            "name": self.suffix,
            "base": self.model,
            **({"method": self.method} if isinstance(self.method, str) else {}),
            "adapters": [{"id": self.suffix, "concepts": [{**present, "images": file.id}]}],
            "training": self._training(len(file.photos)),
            "evaluation": self.evaluation,
        }
        return valid_job(spec, as_fields=True)

    def _refuse_meaningless(self) -> None:
        if self.validation_file is not None:
            raise refused(
                "validation_file: adapters are measured by images of prompts, not by a file; leave it out, and see "
                "`evaluation`"
            )
        if self.integrations:
            raise refused("integrations: there are none here; leave them out, progress is in /events")
        if self.hyperparameters is not None and isinstance(self.method, SupervisedMethod):
            raise refused("hyperparameters: were given twice, here and in `method`; leave one of the two out")
        for name in _DIRECT:
            if name in self.training and getattr(self, name) is not None:
                raise refused(f"{name}: was given twice, here and in `training`; leave one of the two out")

    def _training(self, photos: int) -> dict[str, Any]:
        """Return the spec's section: what was given, and OpenAI's hyperparameters in this service's terms."""
        given, training = self.given, dict(self.training)
        training |= {name: value for name in _DIRECT if (value := getattr(self, name)) is not None}
        asked = {
            "batch_size": ("rows_per_concept", given.batch_size),
            "learning_rate_multiplier": ("learning_rate", given.learning_rate_multiplier),
            "n_epochs": ("steps", given.n_epochs),
        }
        for theirs, (ours, value) in asked.items():
            if value == "auto":
                continue
            if ours in training:
                raise refused(f"{theirs}: {ours} was given too, and it is made of this; leave one of the two out")
            training[ours] = value
        default = TrainingSpec()
        if given.learning_rate_multiplier != "auto":
            if training.get("optimizer", default.optimizer) != default.optimizer:
                raise refused(
                    f"learning_rate_multiplier: is of the learning rate of {default.optimizer}; give learning_rate"
                )
            training["learning_rate"] = default.learning_rate * given.learning_rate_multiplier
        if given.n_epochs != "auto":
            rows = [training.get(name, getattr(default, name)) for name in ("rows_per_concept", "accumulate")]
            if all(type(value) is int and value > 0 for value in rows):  # else the spec says what is wrong
                training["steps"] = math.ceil(given.n_epochs * photos / math.prod(rows))
        return training


def valid_job(spec: Mapping[str, Any], *, as_fields: bool = False) -> JobSpec:
    """Return a job spec; HttpError 400 with the lines of `cat-cluster spec check`, the first one's field as `param`.

    as_fields: it was made of a fine-tuning job, whose fields are named in place of the spec's.
    """
    try:
        return job_of_json(json.dumps(spec))
    except SpecError as error:
        raise refused(str(error), as_fields=as_fields) from error
    except RecursionError:
        raise HttpError(400, "the body is nested too deeply", "invalid_json") from None


def refused(lines: str, *, as_fields: bool = False) -> HttpError:
    """Return the 400 for lines that each begin with a field."""
    told = [as_field(line) if as_fields else line for line in lines.split("\n")]
    code = "missing_parameter" if ": is missing" in told[0] else "invalid_value"
    code = "unknown_parameter" if ": unknown key" in told[0] else code
    return HttpError(400, "; ".join(told), code, param=told[0].partition(":")[0][:80])


def as_field(line: str) -> str:
    """Return a line about a job spec with the field of a fine-tuning job that it is about."""
    place, colon, told = _PARTS.sub("", line).partition(":")
    section, dot, name = place.partition(".")
    if dot and section == "training" and name in _DIRECT:
        place = name
    return f"{_FIELDS.get(place, place)}{colon}{told}"


@cache
def run_schemas() -> dict[str, Any]:
    """Return, by name, the schemas that describe the body of POST /v1/runs: RunRequest and those it refers to."""
    schema: dict[str, Any] = json.loads(json.dumps(spec_json_schema()).replace("#/$defs/", "#/components/schemas/"))
    schema["properties"] |= {
        "priority": {"type": "integer", "minimum": LOWEST_PRIORITY, "maximum": HIGHEST_PRIORITY, "default": 0},
        "deadline": {"type": "string", "format": "date-time"},
    }
    schema["title"] = "RunRequest"
    return {**schema.pop("$defs"), "RunRequest": schema}
