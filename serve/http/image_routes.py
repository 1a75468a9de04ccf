"""POST /v1/images/generations and edits: a request becomes a call, and the engine's events a response or a stream."""

from __future__ import annotations

import asyncio
import io
import json
import secrets
import time
from base64 import b64encode
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, cast
from urllib.parse import quote

from fastapi import APIRouter, Depends
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response

from cat_cluster.errors import AdapterNotFoundError, CancelledRequestError, EngineStoppedError, FlaggedImageError
from cat_cluster.registry.stacks import stack_name
from serve.calls import Accepted, Event, Failed, Finished, ImageCall, Preview, Progress, Refused
from serve.http.access import Caller
from serve.http.answers import ImagesResponse
from serve.http.edits import edit_form, read_edit
from serve.http.field_notes import field_notes
from serve.http.http_errors import error_responses, http_error_of
from serve.http.request_log import CLIENT_CLOSED, RequestEntry, log_unexpected
from serve.http.routes import IngressDep, KeyedRoute, RouteParts, StrictRequest, bearer, caller_of, request_entry
from serve.http.schema import ANY_SEED, DrawingRequest, ImageRequest
from serve.http.stacks import RequestedStack
from serve.http.streams import GRACE_S, EventStream, cancelled_on_disconnect

_NO_TOKENS = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
_EVENTS = """The images. With `stream`, server-sent events instead: `image_generation.partial_image`,
`image_generation.completed` for each image, with `progress` also `image_generation.progress`, and `error` where the
call fails after its start. Those of edits begin with `image_edit`."""

_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ImagesResponse,
        "description": _EVENTS,
        "content": {"text/event-stream": {}},
        "headers": {
            "x-cat-model": {"description": "The model that serves the call.", "schema": {"type": "string"}},
            "x-cat-drift": {"description": "Drift state of the revision.", "schema": {"type": "string"}},
            "x-cat-safety": {
                "description": "The worst that a safety checker found in the images of the call, refused ones too.",
                "schema": {"type": "string", "enum": ["passed", "unchecked", "flagged"]},
            },
        },
    },
    **error_responses(400, 401, 404, 408, 409, 413, 415, 422, 429, 499, 503, 504),
}

router = APIRouter(prefix="/v1/images", route_class=KeyedRoute, tags=["images"], dependencies=[Depends(bearer)])


@router.post(
    "/generations",
    response_model=None,
    summary="Generate images",
    responses=_RESPONSES,
)
async def create_image(body: ImageRequest, request: Request, ingress: IngressDep) -> Response:
    """Generate `n` images of a prompt, with an adapter, with several whose changes add up, or with the base alone.

    The parameters are those of OpenAI's images API, and some of this service's own. Those of OpenAI's that mean nothing
    here (quality, complexity, style, moderation, user, safety_identifier) are accepted, and `note` says that they
    change nothing.
    """
    stack = RequestedStack.of(body, ingress.settings)
    call = to_call(body, stack, request_entry(request).request_id, ingress)
    return await _respond(_Answer("image_generation", body, call), stack, request, ingress)


@router.post(
    "/edits",
    response_model=None,
    summary="Edit an image",
    responses=_RESPONSES,
    openapi_extra={"requestBody": edit_form()},
)
async def edit_image(request: Request, ingress: IngressDep) -> Response:
    """Draw `n` images that begin with an image, or draw a part of it anew: what a mask marks, or its transparent areas.

    The form is that of OpenAI's image edits, with the fields of generations, but for `strength`, which is how far the
    image may change.
    """
    edit = await read_edit(cast(StrictRequest, request))
    stack = RequestedStack.of(edit.body, ingress.settings)
    call = to_call(edit.body, stack, request_entry(request).request_id, ingress)
    call = replace(call, size=edit.size, edit=edit.edit, deadline_s=edit.deadline_s)
    return await _respond(_Answer("image_edit", edit.body, call, edit.notes), stack, request, ingress)


async def _respond(answer: _Answer, stack: RequestedStack, request: Request, ingress: RouteParts) -> Response:
    """Have the engine draw what an answer is to have."""
    entry = request_entry(request)
    call = replace(answer.call, trace=entry.span.carrier)
    answer = replace(answer, call=call)
    named = stack_name(str(member.reference) for member in call.adapters)
    entry.facts.update(model=named or ingress.settings.base, images=call.count)
    if entry.may_quote:
        entry.facts["prompt"] = call.prompt
    limit_s = ingress.settings.deadline_s + GRACE_S
    events = _events(ingress, caller_of(request), call, stack, stream=bool(answer.body.stream))
    async with cancelled_on_disconnect(request.receive, limit_s):
        accepted = cast(Accepted, await anext(events))
        entry.facts["model"] = accepted.model
        headers = {"x-cat-model": quote(accepted.model, safe="@/:+"), "x-cat-drift": accepted.drift}
        answer = replace(answer, accepted=accepted)
        if not answer.body.stream:
            ended = [event async for event in events if isinstance(event, Finished | Refused)]
            finished = sorted((event for event in ended if isinstance(event, Finished)), key=lambda image: image.index)
            refused = sorted((event for event in ended if isinstance(event, Refused)), key=lambda image: image.index)
            content = await asyncio.to_thread(answer.whole, finished, refused)
    if not answer.body.stream:
        headers |= _safety_header(finished, refused)
        if refused:
            entry.facts["refused"] = len(refused)
        return Response(content, headers=headers, media_type="application/json")
    return EventStream(
        events,
        answer.event,
        lambda error: _error_event(error, entry),
        limit_s=limit_s,
        headers=headers,
    )


def to_call(body: DrawingRequest, stack: RequestedStack, request_id: str, ingress: RouteParts) -> ImageCall:
    """Return the engine's call for a request and the adapters that it names."""
    return ImageCall(
        request_id=request_id,
        prompt=stack.prompt,
        adapters=stack.members,
        negative_prompt=body.negative_prompt,
        count=body.n,
        size=body.pixels,
        # 32 bits, so that a browser's numbers can hold the seed and give it back.
        seed=secrets.randbits(32) if body.seed is None or body.seed == ANY_SEED else body.seed,
        steps=body.num_inference_steps,
        guidance=body.guidance_scale,
        sampler=body.sampler,
        weighting=body.weighting or ingress.settings.weighting,
        prompt_chunks=ingress.settings.max_prompt_chunks,
        gate=body.gate,
        previews=body.partial_images if body.stream else 0,
        progress=body.progress and body.stream,
        deadline_s=ingress.settings.deadline_s,
        file=body.file,
    )


async def _events(
    ingress: RouteParts, caller: Caller, call: ImageCall, stack: RequestedStack, *, stream: bool
) -> AsyncGenerator[Event, None]:
    """Yield the engine's events within the caller's limit; a call that fails, or ends early, raises.

    So does one of which no image is left, and a stream, for which that is the only event that all clients read, behind
    the images that are not refused.
    """
    left, refused = call.count, list[Refused]()
    with ingress.access.images(caller, call.count):
        # Closing the iterator cancels the call, so those of EngineClient are generators.
        generated = cast(AsyncGenerator[Event, None], ingress.engine().generate(call))
        async with aclosing(generated) as events:
            async for event in events:
                if isinstance(event, Failed):
                    error = event.to_error()
                    if isinstance(error, AdapterNotFoundError):
                        raise await stack.not_found(error, ingress.registry_listing)
                    raise stack.blamed(error)
                left -= isinstance(event, Finished | Refused)
                if isinstance(event, Refused):
                    refused.append(event)
                yield event
    if refused and (stream or len(refused) == call.count):
        raise _refusal_of(refused, call.count)
    if left:
        raise EngineStoppedError("the engine stopped before the images were done; try again")


_NOT_YET = Accepted("")


@dataclass(frozen=True)
class _Answer:
    """What the response to a request has beside its images, and in which form it has these.

    kind: what its events' names begin with; notes: on what became of the request before the call.
    """

    kind: str
    body: DrawingRequest
    call: ImageCall
    notes: tuple[str, ...] = ()
    accepted: Accepted = _NOT_YET

    @cached_property
    def cat(self) -> Mapping[str, Any]:
        """This service's own facts."""
        notes = [self.accepted.note, *self.notes, *field_notes(self.body, self.call)]
        note = "; ".join(note for note in notes if note) or None
        return {"request_id": self.call.request_id, "drift": self.accepted.drift, "note": note}

    def whole(self, finished: list[Finished], refused: list[Refused]) -> bytes:
        """Return the body of a response with all images, and what is told of those that were refused."""
        prefix = f"data:{self.call.file.media_type};base64," if self.body.response_format == "url" else None
        items = [
            _with_image(image.image, {"seed": image.seed, "revised_prompt": None, **_told(image)}, prefix)
            for image in finished
        ]
        rest = {
            "created": int(time.time()),
            "model": self.accepted.model,
            "size": _size(finished[0].image),
            "output_format": self.call.file.kind,
            "cat": {**self.cat, "refused": [_refused_item(image) for image in refused]} if refused else self.cat,
        }
        return b'{"data":[' + b",".join(items) + b"]," + json.dumps(rest).encode()[1:]

    def event(self, event: Event) -> bytes:
        """Return an event as OpenAI's clients read it, with this service's fields beside theirs."""
        if isinstance(event, Preview):
            kind = f"{self.kind}.partial_image"
            own = {"partial_image_index": event.number, "index": event.index, "step": event.step, "steps": event.steps}
            data = _with_image(event.image, {"type": kind, **self._image_fields(event.image), **own})
        elif isinstance(event, Finished):
            kind = f"{self.kind}.completed"
            done = {"index": event.index, "seed": event.seed, "model": self.accepted.model, "usage": _NO_TOKENS}
            more = {**_told(event), "cat": self.cat}
            data = _with_image(event.image, {"type": kind, **self._image_fields(event.image), **done, **more})
        elif isinstance(event, Progress):
            kind = f"{self.kind}.progress"
            data = json.dumps({"type": kind, "index": event.index, "step": event.step, "steps": event.steps}).encode()
        else:
            return b""
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)

    def _image_fields(self, image: bytes) -> dict[str, Any]:
        look = {"quality": "auto", "background": "opaque", "output_format": self.call.file.kind}
        return {"created_at": int(time.time()), "size": _size(image), **look}


def _told(image: Finished) -> dict[str, Any]:
    return {"facts": dict(image.facts), "safety": None if image.safety is None else asdict(image.safety)}


def _safety_header(finished: Sequence[Finished], refused: Sequence[Refused]) -> dict[str, str]:
    """Return the worst verdict on the images, refused ones too, as a header; none where nothing checks them."""
    found = {image.safety.flagged for image in finished if image.safety is not None}
    # What is refused was flagged or, of those that no verdict was found on, may have been.
    found |= {True if image.failure.kind == FlaggedImageError.__name__ else None for image in refused}
    worst = "flagged" if True in found else "unchecked" if None in found else "passed"
    return {"x-cat-safety": worst} if found else {}


def _refused_item(image: Refused) -> dict[str, Any]:
    return {"index": image.index, "seed": image.seed, **http_error_of(image.failure.to_error()).body()}


def _refusal_of(refused: Sequence[Refused], count: int) -> Exception:
    """Return the error of a call with refused images; that of a flagged one first, since no second try ends it."""
    kind = FlaggedImageError.__name__
    failure = min(refused, key=lambda image: (image.failure.kind != kind, image.index)).failure
    if count == 1:
        return failure.to_error()
    seeds = ", ".join(str(image.seed) for image in sorted(refused, key=lambda image: image.index))
    return replace(failure, message=f"{len(refused)} of {count} images (seed {seeds}): {failure.message}").to_error()


def _error_event(error: Exception, entry: RequestEntry) -> bytes:
    """Return the last event of a stream that fails, and add its error to the request log."""
    http_error = http_error_of(error)
    entry.code = http_error.code
    if http_error.status_code == 500:
        log_unexpected(entry, error)
    if isinstance(error, CancelledRequestError):
        entry.status = CLIENT_CLOSED
    return b"event: error\ndata: %b\n\n" % json.dumps(http_error.body()).encode()


def _with_image(image: bytes, fields: Mapping[str, Any], url_prefix: str | None = None) -> bytes:
    """Return JSON of the fields and `b64_json`, or `url` where it has a prefix; neither needs escaping.

    A JSON encoder would check it all the same, and block the interpreter, and so the event loop, over megabytes.
    """
    start = b'{"b64_json":"' if url_prefix is None else b'{"url":"' + url_prefix.encode()
    return start + b64encode(image) + b'",' + json.dumps(fields).encode()[1:]


def _size(image: bytes) -> str:
    """Return WIDTHxHEIGHT, as a file's header has them."""
    with Image.open(io.BytesIO(image)) as opened:
        return f"{opened.width}x{opened.height}"
