"""The body of POST /v1/images/edits: a form with an image, its mask and the fields of a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from cat_cluster.data.edit_image import read_edit_image
from cat_cluster.models.edit_steps import edit_strength, steps_made
from serve.calls import Edit
from serve.http.forms import Part, boundary_of, read_parts, refused_part
from serve.http.http_errors import HttpError
from serve.http.routes import StrictRequest, caller_of, ingress_of, strict_json
from serve.http.schema import EditRequest
from serve.http.streams import GRACE_S, cancelled_on_disconnect

_IMAGE_NAMES = {"image": "image", "image[]": "image", "mask": "mask"}  # OpenAI's client sends a list as image[]
_A_STACK = 'send a list such as [{"model": "cup", "strength": 0.7}]'
# One at a time: a picture takes far more memory while it is read than its file.
_READING = ThreadPoolExecutor(1, "uploads")


@dataclass(frozen=True)
class RequestedEdit:
    """An edit's fields, the (width, height) that is drawn, its image at that size, and notes on what was done to it.

    deadline_s: what is left of it, since an engine may have been waited for.
    """

    body: EditRequest
    size: tuple[int, int]
    edit: Edit
    notes: tuple[str, ...]
    deadline_s: float


async def read_edit(request: StrictRequest) -> RequestedEdit:
    """Read the body of a request; HttpError, SpecError or RequestValidationError, each with the field to blame."""
    ingress, loop = ingress_of(request), asyncio.get_running_loop()
    boundary = boundary_of(request.headers.get("content-type", ""))
    with ingress.access.upload(caller_of(request)):
        content = await request.upload()
        began, limit_s = time.monotonic(), ingress.settings.deadline_s
        fields, files = await loop.run_in_executor(_READING, _read_form, content, boundary)
        del content
        body = _validated(fields, files)
        if body.strength is not None or "mask" in files:  # else its own transparency may be its mask
            steps_made(body.num_inference_steps, edit_strength(body.strength, masked=True))
        async with cancelled_on_disconnect(request.receive, limit_s + GRACE_S):
            size = await ingress.served_sizes.choose(body.pixels, limit_s)
        read = await loop.run_in_executor(_READING, read_edit_image, files["image"], files.get("mask"), size)
    strength = edit_strength(body.strength, masked=read.mask is not None)
    steps_made(body.num_inference_steps, strength)
    edit = Edit(read.pixels.tobytes(), None if read.mask is None else read.mask.tobytes(), strength)
    return RequestedEdit(body, size, edit, read.notes, began + limit_s - time.monotonic())


def edit_form() -> dict[str, Any]:
    """Return the description of the body for OpenAPI: the fields of EditRequest as a form has them, and the files."""
    schema = EditRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    for field in schema["properties"].values():
        given = [kind for kind in field.get("anyOf", ()) if kind != {"type": "null"}]
        if given:  # a form has no null: a field is there or not
            del field["anyOf"], field["default"]
            field.update(given[0])
    about = schema["properties"]["adapters"]["description"]
    schema["properties"]["adapters"] = {
        "type": "string",
        "contentMediaType": "application/json",
        "title": "Adapters",
        "description": f"{about} As JSON, or in the form of OpenAI's client: adapters[][model], adapters[][strength].",
    }
    picture = {"type": "string", "format": "binary"}
    schema["properties"] = {
        "image": {
            **picture,
            "description": "The image to edit: JPEG, PNG, WebP and others. It is turned upright, converted to sRGB, "
            "scaled to cover `size` and cropped to its middle. Without a mask its transparent areas are edited alone.",
        },
        "mask": {
            **picture,
            "description": "What is edited, in an image of the same width and height: its transparent areas, or, where "
            "none of it is transparent, the white areas of a black and white one.",
        },
        **schema["properties"],
    }
    schema["required"] = ["image", *schema["required"]]
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


def _read_form(content: bytes, boundary: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the text fields and the files of a form."""
    texts: dict[str, str] = {}
    files: dict[str, bytes] = {}
    members: dict[str, list[str]] = {"model": [], "strength": []}
    for part in read_parts(content, boundary):
        if part.name in _IMAGE_NAMES:
            _add_file(files, part)
            continue
        member = part.name.removeprefix("adapters[][").removesuffix("]")
        if member in members and part.name == f"adapters[][{member}]":
            members[member].append(part.text())
            continue
        if part.name not in EditRequest.model_fields:
            raise refused_part(part, "no such parameter; see /docs for those there are", "unknown_parameter")
        if part.name in texts:
            raise refused_part(part, "was sent twice; send it once")
        texts[part.name] = part.text()
    fields: dict[str, Any] = {name: text for name, text in texts.items() if text}
    if "adapters" in fields:
        fields["adapters"] = _from_json(fields["adapters"])
    if members["model"] or members["strength"]:
        if "adapters" in fields:
            raise _bad_adapters("were named twice, as JSON and as adapters[][model]; leave one of the two out")
        fields["adapters"] = _from_brackets(**members)
    return fields, files


def _add_file(files: dict[str, bytes], part: Part) -> None:
    name = _IMAGE_NAMES[part.name]
    if not part.filename and not part.content:  # an input of a page's form that was left empty
        return
    if part.filename is None:
        raise refused_part(
            Part(name), "is a file, and was sent as text; send it with a file name, as curl -F name=@file"
        )
    if name in files:
        raise refused_part(Part(name), "was sent more than once; one image, with one mask, is edited at a time")
    files[name] = part.content


def _from_json(text: str) -> Any:
    try:
        return strict_json(text)
    except RecursionError:
        raise _bad_adapters(f"is nested too deeply; {_A_STACK}") from None
    except ValueError as error:
        raise _bad_adapters(f"is no JSON ({error}); {_A_STACK}") from None


def _from_brackets(model: Sequence[str], strength: Sequence[str]) -> list[dict[str, str]]:
    """Return the stack that OpenAI's client has taken apart, which keeps the order of names and of strengths alone."""
    if not strength:
        return [{"model": name} for name in model]
    if len(strength) != len(model):
        raise _bad_adapters("give each of them a strength, or none, or send the list as JSON text")
    return [{"model": name, "strength": value} for name, value in zip(model, strength, strict=True)]


def _bad_adapters(why: str) -> HttpError:
    return refused_part(Part("adapters"), why)


def _validated(fields: dict[str, Any], files: dict[str, bytes]) -> EditRequest:
    """Return the fields, each read from its text; every bad one, and an image that is missing, is named."""
    found: list[Any] = []
    if "image" not in files:
        found.append({"type": "missing", "loc": ("body", "image"), "msg": "Field required; send the image as a file"})
    try:
        body = EditRequest.model_validate(fields, strict=False)
    except ValidationError as error:
        found += [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
    if found:
        raise RequestValidationError(found)
    return body
