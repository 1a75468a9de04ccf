"""The events of a job as they come, as server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import suppress

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from cat_cluster.errors import DeadlineError, StoreError
from cat_cluster.runs.run import Run
from serve.http.http_errors import HttpError
from serve.http.routes import caller_of, ingress_of
from serve.http.streams import EventStream
from serve.http.training.guards import seen_run
from serve.http.training.submissions import SeenRun
from serve.http.training.told import events_of

_POLL_S = 1.0  # a driver writes its record every two seconds
_POLLS = 4  # between two looks at what the record does not say, such as a request to stop
_QUIET_LOOKS = 4  # looks without an event, after which a comment says that the stream lives
_LONGEST_S = 3600.0  # then the stream ends, and a client goes on with Last-Event-ID
_COMMENT = b": waiting\n\n"
_DONE = b"data: [DONE]\n\n"


class JobEvents(EventStream[bytes]):
    """The response with a run's events. seen: the run as it is now; after: the event that the client had last."""

    def __init__(self, request: Request, seen: SeenRun, after: str | None) -> None:
        super().__init__(
            _events(request, seen, after or ""),
            lambda event: event,
            lambda error: b"",  # the client goes on where it ended
            limit_s=_LONGEST_S + 60.0,
            headers={},
        )
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; HttpError 429 and 503, before the first, where there are too many streams."""
        with ingress_of(self._request).access.stream(caller_of(self._request)):
            await super().__call__(scope, receive, send)


async def _events(request: Request, seen: SeenRun, after: str) -> AsyncGenerator[bytes, None]:
    told, quiet, until = set[str](), 0, time.monotonic() + _LONGEST_S
    while time.monotonic() < until:
        for event in events_of(seen):
            if event.id > after and event.id not in told:
                told.add(event.id)
                quiet = 0
                data = event.model_dump_json().encode()
                yield b"id: %b\nevent: fine_tuning.job.event\ndata: %b\n\n" % (event.id.encode(), data)
        if seen.has_ended:
            yield _DONE
            return
        quiet += 1
        if quiet % _QUIET_LOOKS == 0:
            yield _COMMENT
        seen = await _changed(request, seen)


async def _changed(request: Request, seen: SeenRun) -> SeenRun:
    """Return the run once its record has changed, or after a few seconds; what the store has lost stays as it was."""
    training = ingress_of(request).training
    run = Run(ingress_of(request).registry_listing.registry.store, seen.run_id)
    with suppress(StoreError, DeadlineError, HttpError):  # an outage is waited for
        before = await training.call(run.listed_record)
        for _ in range(_POLLS):
            await asyncio.sleep(_POLL_S)
            if await training.call(run.listed_record) != before:
                break
        return await seen_run(request, seen.run_id, claims=True)
    await asyncio.sleep(_POLL_S)
    return seen
