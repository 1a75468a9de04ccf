"""What OpenAI's clients send: it is done, it is refused by its name, or the note says that it changes nothing."""

from __future__ import annotations

import base64
import io
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from PIL import Image

from serve.calls import Accepted, Event, FileFormat, Finished, ImageCall
from tests.support.ingress_server import PATH, ScriptedEngine, ask, assert_refused, events_of, picture, until


def opened(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


def note_of(response: httpx2.Response) -> str:
    assert response.status_code == 200, response.text
    found = events_of(response)[-1][1] if "event: " in response.text else response.json()
    return found["cat"]["note"] or ""


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_images_have_the_format_that_was_asked_for(http: httpx2.Client, engine: ScriptedEngine, kind: str) -> None:
    fields = {"output_format": kind, "output_compression": 40}
    body = ask(http, **fields).json()
    assert engine.calls[0].file == FileFormat(kind, 40)  # type: ignore[arg-type]
    assert body["output_format"] == kind
    assert opened(body["data"][0]["b64_json"]).format == kind.upper()
    assert body["size"] == "16x16"
    for _, event in events_of(ask(http, **fields, stream=True, partial_images=1)):
        assert event["output_format"] == kind
        assert opened(event["b64_json"]).format == kind.upper()
    address = ask(http, **fields, response_format="url").json()["data"][0]
    assert "b64_json" not in address
    start, _, data = address["url"].partition(",")
    assert start == f"data:image/{kind};base64"
    assert opened(data).format == kind.upper()


def test_the_best_quality_is_the_default(http: httpx2.Client, engine: ScriptedEngine) -> None:
    ask(http, output_format="jpeg")
    ask(http, output_format="jpeg", output_compression=0)
    assert [call.file.quality for call in engine.calls] == [100, 0]


def test_seed_minus_one_is_any_and_the_answer_tells_which(http: httpx2.Client, engine: ScriptedEngine) -> None:
    drawn = [[item["seed"] for item in ask(http, seed=-1, n=2).json()["data"]] for _ in range(3)]
    assert [seeds[0] for seeds in drawn] == [call.seed for call in engine.calls]
    assert all(seeds[1] == seeds[0] + 1 and seeds[0] >= 0 for seeds in drawn)
    assert len({seeds[0] for seeds in drawn}) == 3


NOTED: list[tuple[dict[str, Any], str]] = [
    ({"quality": "hd"}, "quality"),
    ({"style": "vivid"}, "style"),
    ({"moderation": "low"}, "moderation"),
    ({"complexity": "high"}, "complexity"),
    ({"user": "u", "safety_identifier": "s"}, "user, safety_identifier"),
    ({"output_compression": 50}, "output_compression"),
    ({"partial_images": 2}, "partial_images"),
    ({"progress": True}, "progress"),
    ({"strength": 0.5}, "strength"),
    ({"negative_prompt": "red", "guidance_scale": 1.0}, "negative_prompt"),
]


@pytest.mark.parametrize(("fields", "named"), NOTED)
def test_a_field_that_changes_nothing_is_in_the_note(http: httpx2.Client, fields: dict[str, Any], named: str) -> None:
    assert note_of(ask(http, **fields)).startswith(f"{named}: ")
    assert note_of(ask(http, **fields, response_format="url")).startswith(f"{named}: ")
    if named not in ("partial_images", "progress"):
        assert note_of(ask(http, **fields, stream=True)).startswith(f"{named}: ")


def test_what_is_done_anyway_needs_no_note(http: httpx2.Client) -> None:
    done = {"quality": "auto", "moderation": "auto", "background": "opaque", "output_format": "png", "size": "auto"}
    assert note_of(ask(http, **done, response_format="url", seed=-1)) == ""
    assert note_of(ask(http, model="cup", strength=0.5, output_format="jpeg", output_compression=0)) == ""
    assert note_of(ask(http, negative_prompt="red")) == ""
    assert note_of(ask(http, stream=True, partial_images=2, progress=True, background="auto")) == ""
    assert note_of(ask(http, stream=True, response_format="url")).startswith("response_format: ")


def test_the_engines_note_is_kept_beside_it(http: httpx2.Client, engine: ScriptedEngine) -> None:
    async def told(call: ImageCall) -> AsyncIterator[Event]:
        yield Accepted("base", note="the engine's")
        yield Finished(0, 0, picture())

    engine.script = told
    for stream in (False, True):
        assert note_of(ask(http, style="vivid", stream=stream)).startswith("the engine's; style: ")


REFUSED = [
    ({"background": "transparent"}, "background", "'opaque'"),
    ({"background": "blue"}, "background", "'auto'"),
    ({"output_format": "gif"}, "output_format", "'webp'"),
    ({"output_format": "svg"}, "output_format", "'webp'"),
    ({"output_format": "jpg"}, "output_format", "'jpeg'"),
    ({"response_format": "file"}, "response_format", "'url'"),
    ({"prompt": "a" * 32_001}, "prompt", "prompt: has 32001 characters and may have at most 32000; shorten it"),
    ({"negative_prompt": "a" * 4001}, "negative_prompt", "has 4001 characters and may have at most 4000; shorten it"),
    ({"prompt": ""}, "prompt", "prompt: is empty; write what the image shows"),
    ({"size": "1024"}, "size", "'1024' is no size; write WIDTHxHEIGHT"),
    ({"prompt": "a\x01b"}, "prompt", r"the control character '\x01'; remove it"),
    ({"negative_prompt": "a\x85b"}, "negative_prompt", r"the control character '\x85'; remove it"),
    ({"seed": -2}, "seed", "greater than or equal to -1"),
    ({"seed": 2**63 - 1, "n": 2}, "seed", "2**63"),
]


@pytest.mark.parametrize(("fields", "param", "told"), REFUSED)
def test_a_value_that_cannot_be_done_is_refused_by_its_field(
    big: httpx2.Client, fields: dict[str, Any], param: str, told: str
) -> None:
    assert told in assert_refused(ask(big, **fields), 400, "invalid_value", param)["message"]


@pytest.mark.parametrize("param", ["prompt", "negative_prompt", "model", "size", "user", "n"])
def test_half_a_character_is_refused_by_its_field(big: httpx2.Client, param: str) -> None:
    body = json.dumps({"prompt": "a cup", param: "a\ud800"})
    response = big.post(PATH, content=body, headers={"content-type": "application/json"})
    message = assert_refused(response, 400, "invalid_value", param)["message"]
    assert message.startswith(rf"{param}: holds '\ud800', which is half of a character")


@pytest.mark.parametrize("letter", ["a", "\u4e2d", "\U0001f600"])
@pytest.mark.parametrize("escaped", [False, True])
def test_a_prompt_of_32000_characters_is_taken(
    big: httpx2.Client, engine: ScriptedEngine, letter: str, escaped: bool
) -> None:
    prompt = letter * 32_000
    body = json.dumps({"prompt": prompt, "negative_prompt": letter * 4000}, ensure_ascii=escaped).encode()
    response = big.post(PATH, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200, response.text
    assert engine.calls[0].prompt == prompt


@pytest.mark.slow
def test_the_largest_bodies_are_refused_at_once(big: httpx2.Client) -> None:
    many = ",".join(f'"{number}":0' for number in range(40_000))
    for body in (f'{{{many},"0":1}}', f'{{"prompt":"a",{many}}}', f'{{"prompt":"a",{many.replace("0,", "0 ,")}}}'):
        started = time.monotonic()
        response = big.post(PATH, content=body.encode(), headers={"content-type": "application/json"})
        assert response.status_code == 400
        assert time.monotonic() - started < 5
        assert len(response.content) < 2000


def test_a_head_is_logged_as_what_it_is(http: httpx2.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="cat_cluster.serve")
    response = http.head("/health")
    assert (response.status_code, response.content) == (200, b"")
    until(lambda: bool(caplog.messages))
    line = json.loads(caplog.messages[-1])
    assert (line["method"], line["route"], line["status"]) == ("HEAD", "/health", 200)
