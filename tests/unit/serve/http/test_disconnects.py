"""Clients that disconnect, servers that cancel, engines that hang, and big images: none holds anything up."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import pytest

from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore
from serve.calls import Accepted, AdminAction, Event, Finished, ImageCall
from serve.http.access import Access
from serve.settings import ServeSettings
from tests.support.ingress_server import (
    PATH,
    Live,
    ScriptedEngine,
    ask,
    assert_refused,
    draw,
    events_of,
    listening,
    only,
    picture,
    scope,
    until,
)


def waiting(seconds: float = 60.0) -> Callable[[ImageCall], AsyncIterator[Event]]:
    async def wait(call: ImageCall) -> AsyncIterator[Event]:
        yield Accepted("base")
        await asyncio.sleep(seconds)
        yield Finished(0, 0, picture())

    return wait


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_the_work(live: Live, engine: ScriptedEngine, stream: bool) -> None:
    engine.script = waiting()
    with live.http() as http, pytest.raises(httpx2.TimeoutException):  # noqa: PT012
        http.timeout = httpx2.Timeout(0.5)
        with http.stream("POST", PATH, json={"prompt": "a", "stream": stream}) as response:
            response.read()
    until(lambda: len(engine.closed) == 1)
    engine.script = draw
    with live.http() as http:
        assert ask(http, n=10).status_code == 200  # and its images no longer count


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_cancels_the_task_ends_the_work(live: Live, engine: ScriptedEngine, stream: bool) -> None:
    """As Ray Serve does: no http.disconnect is ever received."""
    engine.script = waiting()

    async def call() -> None:
        body = json.dumps({"prompt": "a", "stream": stream}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            return messages.pop() if messages else await asyncio.Event().wait()

        async def send(message: Any) -> None: ...

        task = asyncio.create_task(live.app(scope("POST", PATH), receive, send))
        while not engine.calls:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(engine.closed) == 1

    live.call(call())


def test_an_engine_that_hangs_is_given_up(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.http.image_routes.GRACE_S", 0.2)
    engine, settings = ScriptedEngine(waiting()), ServeSettings(base="base", deadline_s=0.3)
    with (
        listening(only(engine), Registry(LocalStore(tmp_path)), settings, Access(settings)) as live,
        live.http() as http,
    ):
        assert_refused(ask(http), 504, "deadline_exceeded")
        assert events_of(ask(http, stream=True))[-1][1]["error"]["code"] == "deadline_exceeded"
    assert len(engine.closed) == 2


class HangingAdmin(ScriptedEngine):
    async def admin(self, action: AdminAction, reference: str) -> dict[str, Any]:
        self.actions.append((action, reference))
        try:
            return await asyncio.Event().wait()  # type: ignore[return-value]
        finally:
            self.closed.append(action)


@pytest.mark.parametrize("deadline_s", [0.1, 120.0])
def test_an_action_ends_with_its_time_or_its_client(tmp_path: Any, deadline_s: float) -> None:
    engine, settings = HangingAdmin(), ServeSettings(base="base", deadline_s=deadline_s)
    with (
        listening(only(engine), Registry(LocalStore(tmp_path)), settings, Access(settings)) as live,
        live.http() as http,
    ):
        if deadline_s < 1.0:
            assert_refused(http.post("/v1/adapters/cup/load"), 504, "deadline_exceeded")
        else:
            with pytest.raises(httpx2.TimeoutException):
                http.post("/v1/adapters/cup/load", timeout=0.1)
        until(lambda: engine.closed == ["load"])


def test_big_pictures_do_not_hold_up_the_loop(live: Live, engine: ScriptedEngine) -> None:
    big = picture() + bytes(1_500_000)  # as a viewer sees it: bytes after the end of a PNG are not looked at

    async def paint(call: ImageCall) -> AsyncIterator[Event]:
        yield Accepted("base")
        for index in range(call.count):
            yield Finished(index, index, big)

    engine.script = paint
    waits: list[float] = []

    async def beat(stop: threading.Event) -> None:
        while not stop.is_set():
            before = time.perf_counter()
            await asyncio.sleep(0.005)
            waits.append(time.perf_counter() - before)

    stop = threading.Event()
    beating = asyncio.run_coroutine_threadsafe(beat(stop), live.loop)
    with live.http() as http:
        assert len(ask(http, n=10).json()["data"]) == 10
    stop.set()
    beating.result(10)
    assert sorted(waits)[-2] < 0.25  # tens of ms where this machine is idle; JSON of it all at once takes many more


def status_for(live: Live, *messages: dict[str, Any]) -> int:
    """The status for a client that sends these; then comes an error, as Ray Serve raises for one that is gone."""
    left = list(messages)

    async def call() -> int:
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            if not left:
                raise RuntimeError("the request was cancelled")
            return left.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        await live.app(scope("POST", PATH), receive, send)
        return int(sent[0]["status"])

    return live.call(call())


@pytest.mark.parametrize("last", [[{"type": "http.disconnect"}], []])
def test_a_client_that_goes_while_it_sends(live: Live, engine: ScriptedEngine, last: list[dict[str, Any]]) -> None:
    assert status_for(live, {"type": "http.request", "body": b'{"pro', "more_body": True}, *last) == 499
    assert not engine.calls


def test_a_client_whose_server_says_so_with_an_error(live: Live, engine: ScriptedEngine) -> None:
    engine.script = waiting()
    body = json.dumps({"prompt": "a"}).encode()
    assert status_for(live, {"type": "http.request", "body": body, "more_body": False}) == 499
