"""A valid job of a caller into the queue: its photos found and read, then entered."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

from starlette.requests import Request

from cat_cluster.errors import StoreRefusedError
from cat_cluster.spec.job import JobSpec
from serve.http.http_errors import HttpError
from serve.http.routes import caller_of, ingress_of, request_entry
from serve.http.training.job_bodies import as_field
from serve.http.training.job_limits import UsableJob, check_limits, with_photos
from serve.http.training.submissions import Asked, Kind, SeenRun


async def enter(
    request: Request,
    job: JobSpec,
    kind: Kind,
    *,
    priority: int,
    deadline: str | None,
    asked: dict[str, Any] | None = None,
) -> SeenRun:
    """Enter a job into the queue of the storage, and return the run that it is; see HttpError's table for refusals.

    asked: what is told again of the request.
    """
    ingress, caller = ingress_of(request), caller_of(request)
    training, as_fields = ingress.training, kind == "fine_tuning"
    check_limits(job, ingress.settings, as_fields=as_fields)
    with ingress.access.upload(caller):
        usable = await training.call(with_photos, job, caller, training.files, ingress.settings, as_fields=as_fields)
        digests = await _digests(request, usable, as_fields=as_fields)
    about = Asked(
        kind=kind,
        created_ms=int(time.time() * 1000),
        owner=caller.name,
        priority=priority,
        deadline=None if deadline is None else datetime.fromisoformat(deadline),
        asked=asked or {},
    )
    try:
        seen = await training.call(training.submissions.enter, caller, usable.job, digests, about, usable.files)
    except StoreRefusedError as error:
        raise HttpError(
            403,
            "the storage of this service takes no runs: give its credentials the right to write, or set training to "
            "false where it runs",
            "storage_refuses",
        ) from error
    request_entry(request).facts["run"] = seen.run_id
    return seen


async def _digests(request: Request, usable: UsableJob, *, as_fields: bool) -> list[list[str]]:
    """Read the photos; what cannot be used is told by the ids of files, and not by where they lie."""
    try:
        return await ingress_of(request).training.photos.digests(usable.job)
    except HttpError as error:
        told = error.detail
        for file in usable.files:
            told = told.replace(file.sha256, file.id)
        if as_fields:
            told = as_field(told.partition(": ")[2] if told.startswith("adapter ") else told)
        field = told.partition(":")[0] if as_fields else "images"
        raise HttpError(error.status_code, told, error.code, param=field) from error
