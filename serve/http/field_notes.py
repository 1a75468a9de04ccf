"""Fields of a request that change nothing, for the `note` of its response: what is asked for is not lost in silence."""

from __future__ import annotations

from collections.abc import Iterator

from serve.calls import ImageCall
from serve.http.schema import DrawingRequest, ImageRequest

_WITHOUT_MEANING = (
    *("quality", "complexity", "style", "moderation", "user", "safety_identifier"),
    "input_fidelity",
)


def field_notes(body: DrawingRequest, call: ImageCall) -> Iterator[str]:
    """Yield a note for each field, or kind of fields, that was given and does not change the response."""
    given = body.model_fields_set
    ignored = [name for name in _WITHOUT_MEANING if name in given and getattr(body, name) != "auto"]
    if ignored:
        yield f"{', '.join(ignored)}: accepted, but without meaning here"
    if "output_compression" in given and body.output_format == "png":
        yield "output_compression: a PNG loses nothing; it counts for jpeg and webp"
    if body.response_format == "url" and body.stream:
        yield "response_format: events have b64_json, as OpenAI's"
    streamed = [name for name in ("partial_images", "progress") if getattr(body, name) and not body.stream]
    if streamed:
        yield f"{', '.join(streamed)}: only with stream"
    if not call.adapters and isinstance(body, ImageRequest) and body.strength != 1.0:
        yield "strength: the base model alone has no adapter"
    if not call.adapters and body.gate:
        yield "gate: the base model alone has no adapter"
    if body.negative_prompt and call.guidance <= 1.0:
        yield "negative_prompt: it needs a guidance_scale above 1"
