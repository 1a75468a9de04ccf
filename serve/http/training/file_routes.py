"""/v1/files: photos to train with, as OpenAI's client sends and lists files."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Depends, Path, Query
from starlette.requests import Request

from cat_cluster.errors import StoreRefusedError
from serve.http.forms import FormReader, Part, boundary_of, refused_part
from serve.http.http_errors import HttpError, error_responses
from serve.http.routes import IngressDep, KeyedRoute, StrictRequest, bearer, caller_of, ingress_of, request_entry
from serve.http.training.answers import FileCard, FileDeleted, FileFacts, FileList
from serve.http.training.guards import AfterQuery, LimitQuery, own_page_only, training_on, unknown_after
from serve.http.training.job_limits import own_file
from serve.http.training.stored_files import StoredFile

_PURPOSE = "fine-tune"
_FORM_BYTES = 2**14  # of an upload beside its file
_UPLOAD: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {
                        "type": "string",
                        "format": "binary",
                        "description": "A zip of photos, with their captions and masks as in a folder of photos, or "
                        "one photo.",
                    },
                    "purpose": {"type": "string", "enum": [_PURPOSE]},
                },
                "additionalProperties": False,
            }
        }
    },
}

router = APIRouter(
    prefix="/v1/files",
    route_class=KeyedRoute,
    tags=["training"],
    dependencies=[Depends(bearer), Depends(training_on)],
)

FileIdPath = Annotated[str, Path(max_length=100, examples=["file-anonymous-0123456789abcdef01234567"])]


@router.post(
    "",
    summary="Upload photos",
    responses=error_responses(400, 401, 403, 408, 409, 413, 415, 429, 499, 503, 504),
    openapi_extra={"requestBody": _UPLOAD},
    dependencies=[Depends(own_page_only)],
)
async def upload_file(request: Request) -> FileCard:
    """Store photos to train with, once each has been read; where one cannot be used, nothing is stored.

    The same photos sent again are the same file.
    """
    ingress, caller = ingress_of(request), caller_of(request)
    training = ingress.training
    boundary = boundary_of(request.headers.get("content-type", ""))
    with tempfile.TemporaryDirectory(prefix="cat-cluster-") as folder, ingress.access.upload(caller):
        form = FormReader(boundary, FilePath(folder))
        most = ingress.settings.max_photos_bytes + _FORM_BYTES
        await cast(StrictRequest, request).upload_into(form.write, most)
        file = _file_of(form.finish())
        assert file.path is not None
        name = file.filename or "photo"
        held = await training.photos.check(file.path, name, training.limits)
        archive = await asyncio.to_thread((FilePath(folder) / "archive").read_bytes)
        size = file.path.stat().st_size
        try:
            stored = await training.call(training.files.put, caller.name, name[:200], size, archive, held)
        except StoreRefusedError as error:
            raise HttpError(
                403,
                "the storage of this service takes no uploads: give its credentials the right to write, or set "
                "training to false where it runs",
                "storage_refuses",
            ) from error
    request_entry(request).facts["file"] = stored.id
    return _card(stored)


@router.get("", summary="List files", responses=error_responses(400, 401, 403, 429, 503, 504))
async def list_files(
    request: Request,
    ingress: IngressDep,
    limit: LimitQuery = 100,
    after: AfterQuery = None,
    order: Annotated[Literal["asc", "desc"], Query(description="By the time of upload.")] = "desc",
    purpose: Annotated[Literal["fine-tune"] | None, Query(description="All have this one.")] = None,
) -> FileList:
    """List the caller's files, page by page."""
    files = ingress.training.files
    page = await ingress.training.call(
        files.page, caller_of(request).name, limit, after or None, newest_first=order == "desc"
    )
    if page is None:
        raise unknown_after(after)
    return FileList.of([_card(file) for file in page.files], has_more=page.has_more)


@router.get("/{file_id}", summary="Describe a file", responses=error_responses(400, 401, 403, 404, 429, 503, 504))
async def get_file(file_id: FileIdPath, request: Request) -> FileCard:
    """Describe an upload: its photos, masks and captions, by their names."""
    return _card(await _own(request, file_id))


@router.delete(
    "/{file_id}",
    summary="Delete a file",
    responses=error_responses(400, 401, 403, 404, 409, 429, 503, 504),
    dependencies=[Depends(own_page_only)],
)
async def delete_file(file_id: FileIdPath, request: Request) -> FileDeleted:
    """Delete an upload; 409 while a run that has not ended reads it. Adapters that were made of it stay."""
    file = await _own(request, file_id)
    training = ingress_of(request).training
    await training.call(training.files.delete, file)
    return FileDeleted(id=file.id)


async def _own(request: Request, file_id: str) -> StoredFile:
    training = ingress_of(request).training
    file = await training.call(own_file, training.files, caller_of(request), file_id)
    if file is None:
        raise HttpError(
            404, f"no file {file_id[:80]!r} of yours: GET /v1/files lists those there are", "file_not_found"
        )
    return file


def _file_of(parts: Sequence[Part]) -> Part:
    """Return the part that is the file, of a form that has it and its purpose, each once, and nothing else."""
    found: dict[str, Part] = {}
    for part in parts:
        if part.name not in ("file", "purpose"):
            raise refused_part(part, "no such parameter; see /docs for those there are", "unknown_parameter")
        if part.name in found:
            raise refused_part(part, "was sent twice; send it once")
        found[part.name] = part
    for name, remedy in (("purpose", f"send {_PURPOSE}"), ("file", "send a zip of photos, or one photo")):
        if name not in found:
            raise refused_part(Part(name), f"is missing; {remedy}", "missing_parameter")
    if (purpose := found["purpose"].text()) != _PURPOSE:
        raise refused_part(found["purpose"], f"{purpose[:80]!r} has no meaning here; send {_PURPOSE}")
    if found["file"].filename is None:
        raise refused_part(found["file"], "was sent as text; send it with a file name, as curl -F file=@photos.zip")
    if found["file"].path is None:
        raise refused_part(found["file"], "is empty (0 bytes); send a zip of photos, or one photo")
    return found["file"]


def _card(file: StoredFile) -> FileCard:
    return FileCard(
        id=file.id,
        bytes=file.bytes,
        created_at=file.created_at,
        filename=file.filename,
        cat=FileFacts(
            photos=list(file.photos), masks=list(file.masks), captions=list(file.captions), sha256=file.sha256
        ),
    )
