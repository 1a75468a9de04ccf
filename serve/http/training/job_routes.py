"""/v1/fine_tuning/jobs: an adapter of uploaded photos, as OpenAI's client asks for it and follows it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query
from starlette.requests import Request
from starlette.responses import Response

from serve.http.http_errors import HttpError, error_responses
from serve.http.routes import IngressDep, KeyedRoute, bearer, caller_of, ingress_of
from serve.http.training.answers import CheckpointList, EventList, FineTuningJob, JobList
from serve.http.training.entering import enter
from serve.http.training.event_stream import JobEvents
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
from serve.http.training.job_bodies import FineTuningRequest
from serve.http.training.job_limits import own_file
from serve.http.training.submissions import SeenRun
from serve.http.training.told import checkpoints_of, events_of, is_event_id, job_of

_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": EventList,
        "description": "A page of events; with `stream`, server-sent events: those there are, the oldest first, and "
        "each that comes, until the job has ended and `[DONE]` is sent.",
        "content": {"text/event-stream": {}},
    }
}

router = APIRouter(
    prefix="/v1/fine_tuning/jobs",
    route_class=KeyedRoute,
    tags=["training"],
    dependencies=[Depends(bearer), Depends(training_on)],
)


@router.post(
    "",
    summary="Train an adapter",
    responses=error_responses(400, 401, 403, 404, 408, 409, 413, 415, 429, 499, 503, 504),
    dependencies=[Depends(own_page_only)],
)
async def create_job(body: FineTuningRequest, request: Request) -> FineTuningJob:
    """Enter an adapter into the queue of the training service: `suffix`, of the photos of `training_file`.

    The same job asked for again is the same job, and goes on where it has been stopped.
    """
    training = ingress_of(request).training
    file = await training.call(own_file, training.files, caller_of(request), body.training_file)
    if file is None:
        raise HttpError(
            404,
            f"training_file: no file {body.training_file!r} of yours; send the photos by POST /v1/files",
            "file_not_found",
            param="training_file",
        )
    job = body.to_job(file)
    asked = body.echoed()
    seen = await enter(request, job, "fine_tuning", priority=body.priority, deadline=body.deadline, asked=asked)
    return job_of(seen)


@router.get("", summary="List jobs", responses=error_responses(400, 401, 403, 429, 503, 504))
async def list_jobs(request: Request, ingress: IngressDep, limit: LimitQuery = 20, after: AfterQuery = None) -> JobList:
    """List the jobs that the caller has asked for, the newest first."""
    submissions = ingress.training.submissions
    page = await ingress.training.call(submissions.page, caller_of(request), limit, after or None, kind="fine_tuning")
    if page is None:
        raise unknown_after(after)
    jobs = [job_of(seen) for seen in page.runs]
    return JobList.of(jobs, has_more=page.has_more)


@router.get("/{run_id}", summary="Describe a job", responses=error_responses(400, 401, 403, 404, 429, 503, 504))
async def get_job(run_id: RunPath, request: Request) -> FineTuningJob:
    """Return how far a job is, and once it has succeeded the model to draw with."""
    return job_of(await seen_run(request, run_id))


@router.post(
    "/{run_id}/cancel",
    summary="Cancel a job",
    responses=error_responses(400, 401, 403, 404, 409, 429, 503, 504),
    dependencies=[Depends(own_page_only)],
)
async def cancel_job(run_id: RunPath, request: Request) -> FineTuningJob:
    """Ask a job to stop: one that waits is cancelled, one that trains is within seconds; 409 where it has ended."""
    return job_of(await stopped_run(request, run_id))


@router.get(
    "/{run_id}/events",
    response_model=None,
    summary="Follow a job",
    responses={**_EVENTS, **error_responses(400, 401, 403, 404, 429, 503, 504)},
)
async def list_events(
    run_id: RunPath,
    request: Request,
    limit: LimitQuery = 20,
    after: AfterQuery = None,
    stream: Annotated[bool, Query(description="Send server-sent events.")] = False,
    last_event_id: Annotated[str | None, Header(max_length=100)] = None,
) -> Response | EventList:
    """Return what has happened to a job, the newest first; of its steps the last one that is known.

    With `stream` events are sent as they come; `Last-Event-ID` goes on behind an event.
    """
    for name, given in (("after", after), ("Last-Event-ID", last_event_id)):
        if given and not is_event_id(given):
            raise HttpError(400, f"{name}: {given[:80]!r} is no event's id", "invalid_value", param=name)
    seen = await seen_run(request, run_id, claims=True)
    if stream:
        return JobEvents(request, seen, last_event_id)
    events = [event for event in reversed(events_of(seen)) if not after or event.id < after]
    return EventList.of(events[:limit], has_more=len(events) > limit)


@router.get(
    "/{run_id}/checkpoints",
    summary="List a job's checkpoints",
    responses=error_responses(400, 401, 403, 404, 429, 503, 504),
)
async def list_checkpoints(
    run_id: RunPath, request: Request, limit: LimitQuery = 10, after: AfterQuery = None
) -> CheckpointList:
    """List the steps that the job would go on from, and once it is published the adapter itself."""
    seen: SeenRun = await seen_run(request, run_id)
    training = ingress_of(request).training
    found = checkpoints_of(seen, await training.call(training.submissions.checkpoints, seen))
    ids = [checkpoint.id for checkpoint in found]
    if after:
        if after not in ids:
            raise unknown_after(after)
        found = found[ids.index(after) + 1 :]
    return CheckpointList.of(found[:limit], has_more=len(found) > limit)
