"""The engines behind a Ray Serve handle, with handles that do what a test tells them."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Generator
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError

from cat_cluster.errors import (
    AdapterNotFoundError,
    CancelledRequestError,
    DeadlineError,
    EngineStoppedError,
    OverloadedError,
)
from serve.calls import Accepted, Event, Failed, Finished, ImageCall, Preview, Progress, Refused
from serve.handle_client import TRIES, HandleClient
from serve.http.log_format import JsonLines
from tests.support.services import stack

CALL = ImageCall("r", "a cup", adapters=stack("cup@live:0.5"), count=2, deadline_s=30.0)
REVISION = "cup@r-0123456789ab"
DIED, NOBODY = ActorDiedError(), DeploymentUnavailableError(DeploymentID("Engine", "cat-cluster"))
STOPPED = Failed("EngineStoppedError", "the engine is stopping")

Step = Event | Exception | None  # None: nothing comes any more


class Stream:
    """What a handle returns for a call."""

    def __init__(self, steps: list[Step]) -> None:
        self._steps = self._run(steps)
        self.cancelled = False

    async def _run(self, steps: list[Step]) -> AsyncIterator[Event]:
        for step in steps:
            if isinstance(step, Exception):
                raise step
            if step is None:
                await asyncio.sleep(3600)
            else:
                yield step

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Event:
        return await anext(self._steps)

    def cancel(self) -> None:
        self.cancelled = True


class Reply:
    """What a handle returns for a question to one engine: after `wait_s` an answer, or an error."""

    def __init__(self, answer: Any, wait_s: float = 0.0) -> None:
        self._answer, self._wait_s = answer, wait_s
        self.cancelled = False

    def __await__(self) -> Generator[Any, None, Any]:
        yield from asyncio.sleep(self._wait_s).__await__()
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    def cancel(self) -> None:
        self.cancelled = True


class Answers:
    """What a broadcast returns."""

    def __init__(self, answers: list[Any]) -> None:
        self._answers = answers

    async def results_async(self, *, timeout_s: float | None, return_exceptions: bool) -> list[Any]:
        assert return_exceptions
        for answer in self._answers:
            if isinstance(answer, DeploymentUnavailableError | TimeoutError):
                raise answer
        return self._answers


class Handle:
    """A handle whose n-th call goes as `tries[n]` says."""

    def __init__(self, *tries: list[Step], answers: list[Any] | None = None) -> None:
        self._tries = list(tries)
        self._answers = answers or []
        self.calls: list[ImageCall] = []
        self.sessions: list[str] = []
        self.streams: list[Stream] = []
        self.here = [Reply(TimeoutError())]  # the status of the engine that Ray Serve would choose
        self.asked: list[Reply] = []

    def options(self, *, stream: bool, session_id: str) -> Handle:
        assert stream
        self.sessions.append(session_id)
        return self

    @property
    def generate(self) -> Any:
        return type("Method", (), {"remote": staticmethod(self._remote)})

    @property
    def status(self) -> Any:
        def remote() -> Reply:
            self.asked.append(self.here.pop(0))
            return self.asked[-1]

        return type("Method", (), {"remote": staticmethod(remote)})

    def broadcast(self, *_: str) -> Answers:
        return Answers(self._answers)

    def _remote(self, call: ImageCall) -> Stream:
        self.calls.append(call)
        self.streams.append(Stream(self._tries.pop(0)))
        return self.streams[-1]


def client(handle: Handle) -> HandleClient:
    return HandleClient(handle, patience_s=0.02, retry_s=0.0)  # type: ignore[arg-type]


def events(handle: Handle, call: ImageCall = CALL) -> list[Event]:
    async def run() -> list[Event]:
        return [event async for event in client(handle).generate(call)]

    return asyncio.run(run())


def done(index: int) -> Finished:
    return Finished(index, index, b"png")


@pytest.mark.parametrize("end", [DIED, STOPPED])
def test_another_engine_draws_what_is_left_of_the_same_revision(end: Step) -> None:
    first: list[Step] = [Accepted(REVISION), Progress(0, 1, 4), Preview(1, 0, 2, 4, b"p"), done(0), end]
    again: list[Step] = [Accepted(REVISION), Progress(0, 1, 4), done(0), Preview(1, 0, 2, 4, b"p"), Progress(1, 3, 4)]
    handle = Handle(first, [*again, done(1)])
    assert events(handle) == [*first[:4], Progress(1, 3, 4), done(1)]
    assert [call.adapters for call in handle.calls] == [stack("cup@live:0.5"), stack(f"{REVISION}:0.5")]
    assert handle.sessions == ["cup"]
    assert [stream.cancelled for stream in handle.streams] == [True, True]
    assert 29.0 < (handle.calls[1].deadline_s or 0) < 30.0


def test_an_image_that_was_refused_is_refused_once() -> None:
    refused = Refused(0, 0, Failed("FlaggedImageError", "kept back"))
    handle = Handle([Accepted(REVISION), refused, DIED], [Accepted(REVISION), refused, Progress(0, 4, 4), done(1)])
    assert events(handle) == [Accepted(REVISION), refused, done(1)]


def test_every_member_of_a_stack_keeps_its_revision_and_its_strength() -> None:
    call = replace(CALL, adapters=stack("cup@live:0.5", "mug"))
    handle = Handle([Accepted(f"{REVISION}+mug@r-ba9876543210"), DIED], [done(0), done(1)])
    assert events(handle, call)[1:] == [done(0), done(1)]
    assert handle.calls[1].adapters == stack(f"{REVISION}:0.5", "mug@r-ba9876543210")
    assert handle.sessions == ["cup"], "the engine is that of the first adapter"


def test_it_is_tried_a_few_times() -> None:
    handle = Handle(*[[DIED]] * TRIES)
    (failed,) = events(handle)
    assert isinstance(failed, Failed)
    assert (failed.kind, len(handle.calls)) == ("EngineStoppedError", TRIES)


def test_what_cannot_be_drawn_is_not_tried_again() -> None:
    refused = Failed("AdapterNotFoundError", "no adapter 'cup'")
    handle = Handle([refused])
    assert events(handle) == [refused]
    late = Handle([DIED])
    assert isinstance(events(late, ImageCall("r", "a cup", deadline_s=0.0))[0], Failed)
    assert len(late.calls) == 1


def test_a_full_service_says_when_to_ask_again() -> None:
    (failed,) = events(Handle([BackPressureError(9, 9)]))
    assert isinstance(failed, Failed)
    assert (failed.kind, failed.retry_after) == ("OverloadedError", 0.0)


@pytest.mark.parametrize("steps", [[NOBODY], [None]])
def test_without_an_engine_it_is_said(steps: list[Step]) -> None:
    """At once where Ray Serve has given up, else when the patience ends: this call has no deadline."""
    handle = Handle(steps, answers=[NOBODY])
    (failed,) = events(handle, replace(CALL, deadline_s=None))
    assert failed == Failed("EngineStoppedError", "no engine is running: try again")
    assert handle.streams[0].cancelled


@pytest.mark.parametrize(
    ("steps", "kinds"),
    [
        ([NOBODY], ["EngineStoppedError"]),
        ([BackPressureError(9, 9)], ["OverloadedError"]),
        ([Failed("AdapterNotFoundError", "no adapter 'cup'")], ["AdapterNotFoundError"]),
        ([DIED], ["EngineStoppedError"]),
        ([RequestCancelledError("r")], [CancelledRequestError]),
        ([Accepted(REVISION), done(0)], []),
    ],
)
def test_a_call_that_cannot_be_cancelled_ends_as_it_ended(steps: list[Step], kinds: list[Any]) -> None:
    """As in Ray, where cancelling raises again what a call failed with before it had an engine."""

    class Stubborn(Stream):
        def cancel(self) -> None:
            super().cancel()
            raise steps[0] if isinstance(steps[0], Exception) else DIED

    streams: list[Stream] = []

    def remote(_: ImageCall) -> Stream:
        streams.append(Stubborn(list(steps)))
        return streams[-1]

    handle = Handle()
    handle._remote = remote  # type: ignore[method-assign]
    if kinds == [CancelledRequestError]:
        with pytest.raises(CancelledRequestError):
            events(handle)
    else:
        assert [event.kind for event in events(handle) if isinstance(event, Failed)] == kinds
    assert all(stream.cancelled for stream in streams)


def test_a_call_that_finds_no_engine_is_held_until_there_is_one() -> None:
    class Late(Stream):
        async def __anext__(self) -> Event:
            await asyncio.sleep(0.08)  # four times the patience: a replacement loads its base
            return await super().__anext__()

    handle = Handle(answers=[NOBODY])
    handle._remote = lambda call: Late([Accepted(REVISION), done(0), done(1)])  # type: ignore[method-assign]
    assert events(handle) == [Accepted(REVISION), done(0), done(1)]


def test_without_an_engine_a_call_ends_with_its_deadline() -> None:
    """As while the service stops; the patience may be longer."""
    client = HandleClient(Handle([None], answers=[NOBODY]))  # type: ignore[arg-type]

    async def run() -> list[Event]:
        async with asyncio.timeout(5.0):
            return [event async for event in client.generate(replace(CALL, deadline_s=0.05))]

    assert asyncio.run(run()) == [Failed("EngineStoppedError", "no engine is running: try again")]


def test_a_client_that_goes_is_no_fault() -> None:
    """Ray Serve cancels what its request has called, with an error of its own."""
    with pytest.raises(CancelledRequestError):
        events(Handle([Accepted(REVISION), RequestCancelledError("r")]))


def test_a_call_that_lost_its_engine_waits_for_another_until_its_deadline() -> None:
    class Late(Stream):
        async def __anext__(self) -> Event:
            if not late:
                late.append(await asyncio.sleep(0.3))  # many times the patience: a replacement loads its base
            return await super().__anext__()

    late: list[None] = []
    handle = Handle(answers=[NOBODY])
    tries = [Stream([Accepted(REVISION), done(0), DIED]), Late([Accepted(REVISION), done(1)])]
    handle._remote = lambda call: tries.pop(0)  # type: ignore[method-assign]
    assert events(handle) == [Accepted(REVISION), done(0), done(1)]


def test_a_call_that_lost_its_engine_fails_at_its_deadline() -> None:
    handle = Handle([Accepted(REVISION), DIED], [None], answers=[NOBODY])
    began = time.monotonic()
    *_, failed = events(handle, replace(CALL, deadline_s=0.3))
    assert failed == Failed("EngineStoppedError", "no engine is running: try again")
    assert 0.3 <= time.monotonic() - began < 3.0


def test_a_busy_engine_is_waited_for() -> None:
    class Slow(Stream):
        async def __anext__(self) -> Event:
            await asyncio.sleep(0.1)
            return await super().__anext__()

    handle = Handle(answers=[{}])
    handle._remote = lambda call: Slow([Accepted(REVISION), done(0)])  # type: ignore[method-assign]
    assert events(handle) == [Accepted(REVISION), done(0)]


def test_an_engine_that_draws_is_waited_for_while_the_application_is_deleted() -> None:
    """Ray Serve then says that there is no engine any more, but lets those that have begun end."""

    class Slow(Stream):
        async def __anext__(self) -> Event:
            event = await super().__anext__()
            if isinstance(event, Finished):
                await asyncio.sleep(0.2)  # many times the patience
            return event

    handle = Handle(answers=[NOBODY])
    handle._remote = lambda call: Slow([Accepted(REVISION), done(0)])  # type: ignore[method-assign]
    assert events(handle) == [Accepted(REVISION), done(0)]


def test_closing_cancels_the_call() -> None:
    async def run(handle: Handle) -> None:
        generated: Any = client(handle).generate(CALL)
        assert await anext(generated) == Accepted(REVISION)
        await generated.aclose()

    handle = Handle([Accepted(REVISION), None])
    asyncio.run(run(handle))
    assert handle.streams[0].cancelled


def asked(answers: list[Any], ask: Callable[[HandleClient], Any]) -> Any:
    return asyncio.run(ask(client(Handle(answers=answers))))


def drift(state: str, **probes: int) -> dict[str, Any]:
    return {REVISION: {"state": state, "probes": probes}}


@pytest.mark.parametrize(
    ("seen", "told"),
    [
        ([drift("alarm", live=1), drift("ok", canonical=9)], drift("alarm", live=1)),
        ([drift("ok", canonical=9), drift("warning", live=1), drift("unknown")], drift("warning", live=1)),
        ([drift("unknown"), drift("ok", live=1)], drift("ok", live=1)),
        ([drift("ok", canonical=3, live=2), drift("ok", canonical=4)], drift("ok", canonical=3, live=2)),
    ],
)
def test_the_worst_drift_is_told(seen: list[Any], told: Any) -> None:
    for order in (seen, seen[::-1]):
        assert asked([{"drift": one} for one in order], lambda one: one.status())["drift"] == told


def test_an_engine_that_sleeps_is_no_fault_and_is_not_woken_by_questions() -> None:
    """A handle that has no method `metrics`: a plain call of it would wait in Ray Serve's queue, and so start one."""

    async def main() -> None:
        asleep = HandleClient(Handle(answers=[NOBODY]), is_asleep=lambda: True)  # type: ignore[arg-type]
        assert await asleep.status() == {"engines": 0, "drift": {}}
        starting = HandleClient(Handle(answers=[NOBODY]), is_asleep=lambda: False)  # type: ignore[arg-type]
        with pytest.raises(EngineStoppedError, match="no engine responds"):
            await starting.status()
        with pytest.raises(EngineStoppedError, match="no engine responds"):
            await asleep.metrics()
        with pytest.raises(EngineStoppedError, match="no engine responds"):
            await asleep.admin("load", "cup")
        awake = HandleClient(Handle(answers=[b"# metrics"]), is_asleep=lambda: True)  # type: ignore[arg-type]
        assert await awake.metrics() == b"# metrics"

    asyncio.run(main())


def sizes(wait_s: float, *replies: Reply) -> tuple[Handle, list[str]]:
    handle = Handle(answers=[NOBODY])  # whoever broadcasts finds nobody
    handle.here = list(replies)
    asleep = HandleClient(handle, retry_s=0.0, is_asleep=lambda: True)  # type: ignore[arg-type]
    return handle, asyncio.run(asleep.sizes(wait_s))


def test_sizes_are_waited_for_in_the_queue_which_starts_an_engine() -> None:
    """Also from another engine than the first one, which is lost."""
    handle, found = sizes(5.0, Reply(DIED, 0.05), Reply({"sizes": ["16x16", "24x16"]}, 0.05))
    assert (found, len(handle.asked)) == (["16x16", "24x16"], 2)


def test_sizes_of_a_deployment_that_failed_are_not_waited_for() -> None:
    with pytest.raises(EngineStoppedError, match="no engine is running: try again"):
        sizes(3600.0, Reply(NOBODY))


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Reply({}, 3600), EngineStoppedError("no engine is running: try again")),
        (Reply(BackPressureError(9, 9)), OverloadedError("every engine has as many requests as it takes", 0.0)),
        (Reply(RequestCancelledError("r")), CancelledRequestError("the client has disconnected")),
    ],
)
def test_sizes_that_nobody_tells_are_an_error(reply: Reply, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        sizes(0.05, reply)
    assert reply.cancelled == isinstance(error, EngineStoppedError), "what still waits leaves the queue"


def test_one_engine_that_is_late_hides_no_other() -> None:
    handle = Handle(answers=[TimeoutError()])
    handle.here = [Reply({"pid": 2, "drift": drift("ok")})]
    assert asyncio.run(client(handle).status()) == {"pid": 2, "engines": 1, "drift": drift("ok")}


def test_status_is_of_the_engines_that_live() -> None:
    here, there = {"pid": 1, "drift": drift("unknown")}, {"pid": 2, "drift": drift("ok", canonical=3)}
    status = asked([here, DIED, there], lambda one: one.status())
    assert status == {"pid": 1, "engines": 2, "drift": drift("ok", canonical=3)}
    for answers in ([DIED], [NOBODY], [TimeoutError()]):
        with pytest.raises(EngineStoppedError, match="no engine responds"):
            asked(answers, lambda one: one.status())


@pytest.mark.parametrize(
    ("failed", "error"),
    [
        (Failed("AdapterNotFoundError", "no adapter 'cupp'"), AdapterNotFoundError("no adapter 'cupp'")),
        (Failed("OverloadedError", "full", 7.0), OverloadedError("full", 7.0)),
        (Failed("DeadlineError", "late", 9.0), DeadlineError("late", 9.0)),
        (Failed("StoreMovedError", "new to us"), RuntimeError("StoreMovedError: new to us")),
    ],
)
def test_an_error_keeps_its_class_and_words(failed: Failed, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        asked([{"tier": "slot"}, failed], lambda one: one.admin("load", "cupp"))
    assert str(caught.value) == str(error)
    assert getattr(caught.value, "retry_after", None) == getattr(error, "retry_after", None)


def test_a_probe_that_one_engine_alarms_at_is_an_alarm() -> None:
    records = [{"verdict": verdict, "replica": str(n)} for n, verdict in enumerate(("ok", "alarm", "warning", "alarm"))]
    assert asked([dict(record) for record in records], lambda one: one.admin("probe", "cup")) == records[1]


def test_log_lines_are_json() -> None:
    lines, logger = JsonLines(), logging.getLogger("cat_cluster.serve.test")
    record = logger.makeRecord(logger.name, logging.INFO, "f", 1, '{"route": "/"}', (), None)
    assert lines.format(record) == '{"route": "/"}'
    try:
        raise ValueError("no")
    except ValueError:
        record = logger.makeRecord(logger.name, logging.ERROR, "f", 1, "a %s", ("probe",), sys.exc_info())
    line = json.loads(lines.format(record))
    assert (line["level"], line["message"]) == ("error", "a probe")
    assert "ValueError: no" in line["trace"]
    for nothing in (None, False):  # as a caller has it who asks for a trace by a condition
        record = logger.makeRecord(logger.name, logging.INFO, "f", 1, "calm", (), nothing)  # type: ignore[arg-type]
        assert "trace" not in json.loads(lines.format(record))
