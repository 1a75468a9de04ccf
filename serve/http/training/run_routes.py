"""/v1/runs: a whole job spec as a run, and every run that a caller may see."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request

from serve.http.http_errors import HttpError, error_responses
from serve.http.routes import IngressDep, KeyedRoute, bearer, caller_of, ingress_of
from serve.http.training.answers import RunCard, RunList
from serve.http.training.entering import enter
from serve.http.training.guards import (
    AfterQuery,
    LimitQuery,
    RunPath,
    own_page_only,
    seen_run,
    stopped_run,
    training_on,
    unknown_after,
)
from serve.http.training.job_bodies import Deadline, Priority, valid_job
from serve.http.training.told import run_card

router = APIRouter(
    prefix="/v1/runs", route_class=KeyedRoute, tags=["training"], dependencies=[Depends(bearer), Depends(training_on)]
)


class _Turn(BaseModel):
    """When a run is wanted: what its body has beside the spec."""

    model_config = ConfigDict(strict=True, extra="ignore")

    priority: Priority = 0
    deadline: Deadline | None = None


@router.post(
    "",
    summary="Enter a run",
    responses=error_responses(400, 401, 403, 408, 409, 413, 415, 429, 499, 503, 504),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/RunRequest"}}},
        }
    },
    dependencies=[Depends(own_page_only)],
)
async def create_run(request: Request) -> RunCard:
    """Enter a job spec into the queue; `images` are ids of the caller's files. It is the run of `submit --queue`.

    `priority` and `deadline` stand beside the keys of the spec.
    """
    body = await request.json()
    if not isinstance(body, dict):
        raise HttpError(400, "send a job spec as a JSON object", "invalid_value")
    turn = _turn(body)
    spec = {name: value for name, value in body.items() if name not in _Turn.model_fields}
    spec.setdefault("base", ingress_of(request).settings.base)
    seen = await enter(request, valid_job(spec), "run", priority=turn.priority, deadline=turn.deadline)
    return run_card(seen)


@router.get("", summary="List runs", responses=error_responses(400, 401, 403, 429, 503, 504))
async def list_runs(
    request: Request,
    ingress: IngressDep,
    limit: LimitQuery = 20,
    after: AfterQuery = None,
    every: Annotated[
        bool, Query(alias="all", description="All runs of the storage, by their ids; needs an admin key.")
    ] = False,
) -> RunList:
    """List what the caller has asked for over HTTP, the newest first; with `all` every run, whoever entered it."""
    caller, submissions = caller_of(request), ingress.training.submissions
    if every:
        ingress.access.check_admin(caller)
        page = await ingress.training.call(submissions.page_of_all, caller, limit, after or None)
    else:
        found = await ingress.training.call(submissions.page, caller, limit, after or None)
        if found is None:
            raise unknown_after(after)
        page = found
    return RunList.of([run_card(seen) for seen in page.runs], has_more=page.has_more)


@router.get("/{run_id}", summary="Describe a run", responses=error_responses(400, 401, 403, 404, 429, 503, 504))
async def get_run(run_id: RunPath, request: Request) -> RunCard:
    """Return how far a run is: each adapter's state, step and losses, and once it was measured its scores."""
    return run_card(await seen_run(request, run_id))


@router.post(
    "/{run_id}/stop",
    summary="Stop a run",
    responses=error_responses(400, 401, 403, 404, 409, 429, 503, 504),
    dependencies=[Depends(own_page_only)],
)
async def stop_run(run_id: RunPath, request: Request) -> RunCard:
    """Ask a run to stop, which it does within seconds; 409 where it has ended. Its checkpoints stay.

    Entered again it goes on from them.
    """
    return run_card(await stopped_run(request, run_id))


def _turn(body: dict[str, Any]) -> _Turn:
    try:
        return _Turn.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        told = first["msg"].removeprefix("Value error, ")
        raise HttpError(400, f"{name}: {told}", "invalid_value", param=name) from None
