"""Who may train here, and the terms that the routes of training share."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query
from starlette.requests import Request

from serve.http.http_errors import HttpError
from serve.http.routes import caller_of, ingress_of, request_entry
from serve.http.sites import is_own_page
from serve.http.training.submissions import SeenRun

MOST_ENTRIES = 100

RunPath = Annotated[str, Path(max_length=100, description="The id of a run.", examples=["run-0123456789ab"])]
LimitQuery = Annotated[int, Query(ge=1, le=MOST_ENTRIES, description="Entries of a page, at most.")]
AfterQuery = Annotated[
    str | None, Query(max_length=100, description="Id of the last entry of the page before: those behind it follow.")
]


def training_on(request: Request) -> None:
    """Refuse with 403 where the service takes no training."""
    if not ingress_of(request).settings.training:
        raise HttpError(403, "this service takes no training: set training to true where it runs", "training_off")


def own_page_only(request: Request) -> None:
    """Refuse with 403 pages of other sites, those of `cors_origins` too: they may draw and read, and not train."""
    if not is_own_page(request):
        raise HttpError(403, "pages of other sites may not train", "foreign_origin")


async def seen_run(request: Request, run_id: str, *, claims: bool = False) -> SeenRun:
    """Return a run that the caller may see; 404 where there is none."""
    training = ingress_of(request).training
    seen = await training.call(training.submissions.find, caller_of(request), run_id, claims=claims)
    if seen is None:
        raise HttpError(404, f"no run {run_id[:80]!r} of yours: GET /v1/runs lists those there are", "run_not_found")
    return seen


async def stopped_run(request: Request, run_id: str) -> SeenRun:
    """Ask a run that the caller may see to stop, and return it as it is then; ConflictError where it has ended."""
    seen = await seen_run(request, run_id)
    training = ingress_of(request).training
    await training.call(training.submissions.stop, seen)
    request_entry(request).facts["run"] = run_id
    return await seen_run(request, run_id)


def unknown_after(after: str | None) -> HttpError:
    """Return the 400 for an `after` that is none of the list's."""
    return HttpError(
        400, f"after: {(after or '')[:80]!r} is not of this list; send the last id of the page before", "invalid_value",
        param="after",
    )  # fmt: skip
