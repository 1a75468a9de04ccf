"""Bodies that are sent slowly, in part, or not at all, over real sockets: they hold nobody else up."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore
from serve.http.access import Access
from serve.settings import ServeSettings
from tests.support.ingress_server import PATH, Live, ScriptedEngine, listening, only

pytestmark = pytest.mark.slow

BODY = json.dumps({"prompt": "a cup"}).encode()
JSON = {"content-type": "application/json"}
KEYS = ("one", "two", "three")


@contextmanager
def served(tmp_path: Path, **options: Any) -> Iterator[Live]:
    settings = ServeSettings(base="base", **options)
    access = Access(settings, api_keys=KEYS)
    with listening(only(ScriptedEngine()), Registry(LocalStore(tmp_path)), settings, access) as live:
        yield live


class Half:
    """A request of which the headers and a part of the body are sent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def sent(cls, live: Live, key: str, body: bytes = BODY[:5]) -> Half:
        place = urlsplit(live.url)
        half = cls(*await asyncio.open_connection(place.hostname, place.port))
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\n\r\n"
        )
        half.writer.write(head.encode() + body)
        await half.writer.drain()
        return half

    async def answer(self, seconds: float = 20.0) -> tuple[int, str]:
        """The status and the error's code; the connection stays open."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), seconds)
        size = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        assert size is not None
        found = json.loads(await self.reader.readexactly(int(size[1])))
        return int(re.split(rb"\s+", head)[1]), found.get("error", {}).get("code", "")

    async def is_closed(self) -> bool:
        return await asyncio.wait_for(self.reader.read(), 10) == b""


async def halves(live: Live, key: str, count: int) -> list[Half]:
    return [await Half.sent(live, key) for _ in range(count)]


async def one_refused(sent: list[Half], how: tuple[int, str]) -> list[Half]:
    """The others, when one of them has been refused; the server may read them in any order."""
    waiting = {asyncio.create_task(half.reader.read(1)): half for half in sent}
    done, left = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=10)
    for task in left:
        task.cancel()
    await asyncio.wait(left)
    (refused,) = done
    assert await waiting[refused].answer() == how
    return [half for task, half in waiting.items() if task is not refused]


def test_a_body_that_does_not_arrive_is_given_up(tmp_path: Path) -> None:
    async def stall(live: Live) -> None:
        began = time.monotonic()
        silent, dripping = await Half.sent(live, "one"), await Half.sent(live, "one", b"")
        drip = asyncio.create_task(drip_into(dripping))
        for half in (silent, dripping):
            assert await half.answer() == (408, "body_timeout")
            assert await half.is_closed()
        assert 2.0 <= time.monotonic() - began < 3.8  # of the whole body, not since its last byte
        await drip

    async def drip_into(half: Half) -> None:
        """Send for 1.8 s. What came after the connection's end would reset it, and the answer be lost."""
        for byte in BODY[:12]:
            half.writer.write(bytes([byte]))
            await asyncio.sleep(0.15)

    with served(tmp_path, body_timeout_s=2.0) as live:
        asyncio.run(stall(live))


def test_a_slow_body_in_time_is_served(tmp_path: Path) -> None:
    async def slow(live: Live) -> None:
        half = await Half.sent(live, "one", BODY[:3])
        await asyncio.sleep(0.5)
        half.writer.write(BODY[3:])
        assert (await half.answer())[0] == 200

    with served(tmp_path, body_timeout_s=10.0) as live:
        asyncio.run(slow(live))


def test_open_bodies_are_limited_by_caller_and_in_all(tmp_path: Path) -> None:
    async def fill(live: Live) -> None:
        ones = await one_refused(await halves(live, "one", 5), (429, "rate_limit_exceeded"))
        others = [*await halves(live, "two", 4), *await halves(live, "three", 1)]  # 8 in all: no room for more
        others = await one_refused(others, (503, "overloaded"))
        with live.http() as http:
            for path in ("/health", "/ready", "/metrics", "/"):
                assert http.get(path).status_code == 200
            for path in ("/v1/models", "/v1/status"):
                assert http.get(path, headers={"authorization": "Bearer three"}).status_code == 200
        for half in [*ones, *others]:
            half.writer.write(BODY[5:])
            assert (await half.answer())[0] == 200
        assert (await (await Half.sent(live, "three", BODY)).answer())[0] == 200

    with served(tmp_path, images_per_key=4, max_waiting=2, max_rows=4, body_timeout_s=60.0) as live:
        asyncio.run(fill(live))


def test_hundreds_of_half_sent_bodies_leave_the_service_to_others(tmp_path: Path) -> None:
    async def flood(live: Live) -> None:
        began = time.monotonic()
        sent = await halves(live, "one", 400)
        with live.http() as http:
            assert http.get("/health").status_code == 200
            other = http.post(PATH, content=BODY, headers={**JSON, "authorization": "Bearer two"})
            assert other.status_code == 200
        codes = [code for _, code in [await half.answer() for half in sent]]
        assert (codes.count("body_timeout"), codes.count("rate_limit_exceeded")) == (64, 336)
        assert time.monotonic() - began < 30

    with served(tmp_path, body_timeout_s=5.0) as live:
        asyncio.run(flood(live))


def test_a_client_that_disconnects_leaves_its_place(tmp_path: Path) -> None:
    async def leave(live: Live) -> None:
        for half in await halves(live, "one", 2):
            half.writer.close()
        for _ in range(50):
            status, _ = await (await Half.sent(live, "one", BODY)).answer()
            if status == 200:
                return
            await asyncio.sleep(0.1)
        pytest.fail("its place stays taken")

    with served(tmp_path, images_per_key=2, body_timeout_s=60.0) as live:
        asyncio.run(leave(live))
