"""The bodies of HTTP requests: those of OpenAI's images API, and this service's own fields."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from cat_cluster.models.edit_steps import DEFAULT_MASKED_STRENGTH, DEFAULT_STRENGTH
from cat_cluster.registry.stacks import MAX_STRENGTH
from cat_cluster.spec.characters import CONTROLS, control_character
from cat_cluster.spec.choices import SamplerName, Weighting
from serve.calls import FileFormat, FileKind
from serve.settings import MAX_STACK

MAX_SEED = 2**63 - 1
MAX_PROMPT = 32_000  # characters, as OpenAI has it
ANY_SEED = -1
_TEXT = f"^[^{CONTROLS}]*$"
_SIZE = r"^(auto|[1-9][0-9]{1,3}x[1-9][0-9]{1,3})$"


def _no_controls(text: str) -> str:
    """Refuse control characters: the PNG and the tokenizer have no place for them."""
    if (control := control_character(text)) is not None:
        raise PydanticCustomError(
            "control_character",
            "holds the control character {control}; remove it (tabs and line ends may stay)",
            {"control": repr(control)},
        )
    return text


# The patterns are for the API's description: what breaks one is refused in words.
Text = Annotated[str, AfterValidator(_no_controls), Field(json_schema_extra={"pattern": _TEXT})]
Ignored = Annotated[
    str, Field(max_length=256, description="Accepted for OpenAI's clients; it changes nothing here, as `note` says.")
]

# Values of OpenAI's that would make another image than is asked for, and what to do instead.
_REFUSED = {
    ("background", "transparent"): "images have no transparency; leave it out, or send 'opaque'",
    ("output_format", "gif"): "images do not move; send 'png', 'jpeg' or 'webp'",
    ("output_format", "svg"): "images are made of pixels; send 'png', 'jpeg' or 'webp'",
}


def _describe(schema: dict[str, Any]) -> None:
    """Add to the JSON schema that null means an absent field, as OpenAI's clients send it, and examples."""
    for name, field in schema["properties"].items():
        if name not in schema["required"] and "anyOf" not in field:
            outer = {key: field.pop(key) for key in ("title", "description", "default", "examples") if key in field}
            schema["properties"][name] = {**outer, "anyOf": [field, {"type": "null"}]}
    schema["examples"] = [
        {"prompt": "a photo of a sks cup on grass", "model": "striped-cup", "n": 2, "seed": 7},
        {
            "prompt": "a sks cup beside a zwx fish",
            "adapters": [{"model": "striped-cup"}, {"model": "clown-fish", "strength": 0.7}],
        },
        {"prompt": "a photo of a cup in snow", "size": "64x64", "stream": True, "partial_images": 2},
    ]


class RequestBody(BaseModel):
    """An object of a request's body. Null means an absent field."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None or name not in cls.model_fields}


class AdapterChoice(RequestBody):
    """An adapter of a stack, and how much of it is applied."""

    @model_validator(mode="before")
    @classmethod
    def _is_object(cls, data: Any) -> Any:
        if isinstance(data, dict | cls):
            return data
        name = json.dumps(data[:80]) if isinstance(data, str) else "ID"
        raise PydanticCustomError(
            "adapter_choice", "{told}", {"told": f'is no adapter: write {{"model": {name}}}, and "strength" beside it'}
        )

    model: str = Field(
        max_length=127, description="The adapter: `id`, `id@alias` or `id@r-...`.", examples=["clown-fish"]
    )
    strength: float = Field(
        default=1.0, ge=0, le=MAX_STRENGTH, allow_inf_nan=False, description="Its strength; 0: none."
    )


class DrawingRequest(RequestBody):
    """A prompt, and how its images are drawn: what generations and edits share."""

    prompt: Annotated[Text, Field(min_length=1, max_length=MAX_PROMPT)] = Field(
        description="What the image shows. An adapter's concept appears only where its token is a word of the prompt. "
        "`<lora:id:0.8>` in it names an adapter, and is not drawn.",
        examples=["a photo of a sks cup on grass"],
    )
    model: str | None = Field(
        default=None,
        max_length=4096,
        description="An adapter (`id`, `id@alias` or `id@r-...`), several with a + between them (a stack: their "
        "changes add up), or the base model's name; absent: the base model.",
        examples=["striped-cup", "striped-cup+clown-fish"],
    )
    adapters: list[AdapterChoice] = Field(
        default=[],
        max_length=MAX_STACK,
        description="A stack, in place of `model`: adapters, each with its strength.",
    )
    n: int = Field(default=1, ge=1, le=10, description="Number of images; image i has seed + i.")
    size: str = Field(
        default="auto",
        json_schema_extra={"pattern": _SIZE},
        description="WIDTHxHEIGHT in pixels, or auto: the base model's own.",
    )
    response_format: Literal["b64_json", "url"] = Field(
        default="b64_json", description="url: as a data URL. Images are part of the response and are not kept."
    )
    seed: int | None = Field(
        default=None,
        ge=ANY_SEED,
        le=MAX_SEED,
        description="Seed of the first image; absent or -1: a random one, which is returned.",
    )
    num_inference_steps: int = Field(default=25, ge=1, le=1000, description="Denoising steps.")
    guidance_scale: float = Field(
        default=4.0, ge=0, le=50, allow_inf_nan=False, description="Classifier-free guidance; 1 or less: none."
    )
    negative_prompt: Text = Field(default="", max_length=4000, description="What the image must not show.")
    sampler: SamplerName = Field(default="ddim", description="The sampler.")
    weighting: Weighting | None = Field(
        default=None,
        description="`a1111`: words of both prompts have weights, as `(word:1.2)`, `(word)` and `[word]`, and BREAK "
        "starts a new chunk; `none`: that is text. Absent: as the service is set.",
    )
    gate: bool = Field(
        default=False, description="Leave out adapters none of whose tokens is a word of the prompt; `note` names them."
    )
    stream: bool = Field(default=False, description="Send server-sent events.")
    partial_images: int = Field(default=0, ge=0, le=8, description="Previews of each image, with stream.")
    progress: bool = Field(default=False, description="An event for every denoising step, with stream.")
    output_format: FileKind = Field(default="png", description="Format of images and previews.")
    output_compression: int | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Quality of JPEG and WebP: 0 is the smallest file, 100 (as if absent) the best image.",
    )
    background: Literal["auto", "opaque"] = Field(default="auto", description="Images are opaque.")
    user: Ignored | None = None
    safety_identifier: Ignored | None = None
    quality: Ignored | None = None
    complexity: Ignored | None = None
    style: Ignored | None = None
    moderation: Ignored | None = None

    @field_validator("background", "output_format", mode="before")
    @classmethod
    def _say_why(cls, value: Any, field: ValidationInfo) -> Any:
        reason = _REFUSED.get((field.field_name or "", value)) if isinstance(value, str) else None
        if reason is not None:
            raise PydanticCustomError("not_offered", "{reason}", {"reason": f"{value!r} is not offered: {reason}"})
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _whole_characters(cls, value: Any) -> Any:
        half = re.search("[\ud800-\udfff]", value) if isinstance(value, str) else None
        if half is not None:
            raise PydanticCustomError(
                "half_a_character",
                "holds {half}, which is half of a character (a lone surrogate); send the character whole",
                {"half": repr(half[0])},
            )
        return value

    @field_validator("prompt", mode="before")
    @classmethod
    def _not_empty(cls, prompt: Any) -> Any:
        if prompt == "":
            raise PydanticCustomError("empty", "is empty; write what the image shows")
        return prompt

    @field_validator("size")
    @classmethod
    def _is_size(cls, size: str) -> str:
        if not re.fullmatch(_SIZE, size):
            raise PydanticCustomError(
                "size",
                "{given} is no size; write WIDTHxHEIGHT in pixels, such as 512x512, or auto",
                {"given": repr(size)},
            )
        return size

    @model_validator(mode="after")
    def _seeds_fit(self) -> Self:
        if self.seed is not None and self.seed > MAX_SEED - (self.n - 1):
            raise PydanticCustomError("seed_range", "seed: the last image's seed, seed + n - 1, must be below 2**63")
        return self

    @property
    def pixels(self) -> tuple[int, int] | None:
        """(width, height), or None for the base model's own."""
        sides = re.fullmatch(r"(\d+)x(\d+)", self.size)
        return None if sides is None else (int(sides[1]), int(sides[2]))

    @property
    def file(self) -> FileFormat:
        """How the images are written."""
        return FileFormat(self.output_format, 100 if self.output_compression is None else self.output_compression)


class ImageRequest(DrawingRequest):
    """A prompt, and how to generate its images. Fields but the prompt may be absent or null; no others are accepted."""

    model_config = ConfigDict(json_schema_extra=_describe)

    strength: float = Field(
        default=1.0,
        ge=0,
        le=MAX_STRENGTH,
        allow_inf_nan=False,
        description="Strength of the adapter; 0: none. Of a stack, it multiplies the strength of each.",
    )


class EditRequest(DrawingRequest):
    """The text fields of a form with an image to edit; an empty one counts as absent, and no others are accepted."""

    strength: float | None = Field(
        default=None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="How far the image may change: the share of the denoising steps that are made of it. Absent: "
        f"{DEFAULT_STRENGTH}, with a mask {DEFAULT_MASKED_STRENGTH:g}, where the marked areas begin as noise alone. "
        "Adapters have theirs in `adapters`.",
    )
    input_fidelity: Ignored | None = None
