"""POST /v1/images/edits before a scripted engine: what reaches it of a form, and what is refused, by the field."""

from __future__ import annotations

import asyncio
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from openai.types.image_edit_completed_event import ImageEditCompletedEvent
from openai.types.image_edit_partial_image_event import ImageEditPartialImageEvent
from PIL import Image

from cat_cluster.errors import EngineStoppedError
from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore
from serve.calls import Edit
from serve.http.access import Access
from serve.settings import ServeSettings
from tests.support.ingress_server import Live, ScriptedEngine, assert_refused, listening, only, until

PATH = "/v1/images/edits"
Files = dict[str, Any]


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(state={"sizes": ["16x16", "24x16"]})


@pytest.fixture
def live(engine: ScriptedEngine, tmp_path: Path) -> Iterator[Live]:
    settings = ServeSettings(base="base", max_upload_bytes=200_000, upload_timeout_s=0.5, max_uploads=2)
    with listening(only(engine), Registry(LocalStore(tmp_path)), settings, Access(settings)) as live:
        yield live


def photo(width: int = 16, height: int = 16, kind: str = "png") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    kept = io.BytesIO()
    Image.fromarray(pixels).save(kept, kind)
    return kept.getvalue()


def marks(width: int = 16, height: int = 16) -> bytes:
    """White in its left half."""
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (0, 0, width // 2, height))
    kept = io.BytesIO()
    mask.save(kept, "png")
    return kept.getvalue()


def form(content: bytes | None = None, mask: bytes | None = None) -> Files:
    files = {"image": ("a.png", photo() if content is None else content)}
    return files if mask is None else {**files, "mask": ("m.png", mask)}


def post(http: httpx2.Client, files: Files | None = None, **fields: Any) -> httpx2.Response:
    return http.post(PATH, data={"prompt": "a cup", **fields}, files=form() if files is None else files)


def sent(engine: ScriptedEngine) -> Edit:
    edit = engine.calls[-1].edit
    assert edit is not None
    return edit


def test_an_image_reaches_the_engine_as_pixels(http: httpx2.Client, engine: ScriptedEngine) -> None:
    response = post(http)
    assert response.status_code == 200, response.text
    assert response.json()["cat"]["note"] is None
    call, edit = engine.calls[-1], sent(engine)
    pixels = np.frombuffer(edit.pixels, np.uint8).reshape(16, 16, 3)
    assert (pixels == np.asarray(Image.open(io.BytesIO(photo())))).all()
    assert (edit.mask, edit.strength, call.size, call.prompt, call.steps) == (None, 0.8, (16, 16), "a cup", 25)

    assert post(http, form(mask=marks())).status_code == 200
    edit = sent(engine)
    assert edit.mask is not None
    assert (np.frombuffer(edit.mask, np.uint8).reshape(16, 16) == (np.arange(16) < 8)[None]).all()
    assert edit.strength == 1.0


def test_every_field_of_a_form_counts(http: httpx2.Client, engine: ScriptedEngine) -> None:
    fields = {
        "model": "",  # absent, as an input that was left empty
        "adapters": json.dumps([{"model": "cup"}, {"model": "mug@prod", "strength": 0.5}]),
        "n": "2",
        "size": "24x16",
        "seed": "9",
        "num_inference_steps": "10",
        "guidance_scale": "2.5",
        "negative_prompt": "caf\u00e9",
        "sampler": "euler",
        "strength": "0.3",
        "gate": "true",
        "output_format": "webp",
        "output_compression": "40",
        "response_format": "url",
        "user": "someone",
        "input_fidelity": "high",
    }
    response = post(http, **fields)
    assert response.status_code == 200, response.text
    call = engine.calls[-1]
    members = [(str(member.reference), member.strength) for member in call.adapters]
    assert members == [("cup@latest", 1.0), ("mug@prod", 0.5)]
    assert (call.count, call.size, call.seed, call.steps, call.guidance) == (2, (24, 16), 9, 10, 2.5)
    assert (call.negative_prompt, call.sampler, call.gate, call.file.kind) == ("caf\u00e9", "euler", True, "webp")
    assert (call.file.quality, sent(engine).strength) == (40, 0.3)
    note = response.json()["cat"]["note"]
    assert "image: 16x16 pixels, scaled and cropped to its middle for 24x16" in note
    assert "user, input_fidelity: accepted, but without meaning here" in note
    assert response.json()["data"][0]["url"].startswith("data:image/webp;base64,")


def test_openais_client_edits(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    answer = client.images.edit(
        model="cup",
        image=("photo.jpg", photo(kind="jpeg")),
        mask=io.BytesIO(marks()),
        prompt="a sks cup",
        n=2,
        size="auto",
        quality="high",
        input_fidelity="low",
        extra_body={"seed": 3, "strength": 0.5, "num_inference_steps": 8},
    )
    assert answer.data is not None
    assert (len(answer.data), answer.model) == (2, "cup@r-0123456789ab")  # type: ignore[attr-defined]
    assert (engine.calls[-1].seed, sent(engine).strength, sent(engine).mask is not None) == (3, 0.5, True)
    client.images.edit(image=[photo()], prompt="a cup", extra_body={"adapters": [{"model": "cup"}]})
    assert [member.strength for member in engine.calls[-1].adapters] == [1.0]
    stack = [{"model": "cup", "strength": 0.5}, {"model": "mug", "strength": 2}]
    client.images.edit(image=photo(), prompt="a cup", extra_body={"adapters": stack, "gate": True})
    found = [(member.reference.adapter_id, member.strength) for member in engine.calls[-1].adapters]
    assert (found, engine.calls[-1].gate) == ([("cup", 0.5), ("mug", 2.0)], True)


def test_openais_client_streams_an_edit(client: openai.OpenAI) -> None:
    with client.images.edit(image=photo(), prompt="a cup", stream=True, partial_images=2) as stream:
        *partial, last = list(stream)
    assert len(partial) == 2
    for event in partial:
        assert isinstance(event, ImageEditPartialImageEvent)
        ImageEditPartialImageEvent.model_validate(event.model_dump(), strict=True)
    assert isinstance(last, ImageEditCompletedEvent)
    ImageEditCompletedEvent.model_validate(last.model_dump(), strict=True)


def test_openais_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="one image, with one mask, is edited at a time") as refused:
        client.images.edit(image=[photo(), photo()], prompt="a cup")
    assert refused.value.param == "image"
    with pytest.raises(openai.BadRequestError, match="give each of them a strength, or none") as refused:
        client.images.edit(
            image=photo(), prompt="a", extra_body={"adapters": [{"model": "cup", "strength": 1}, {"model": "mug"}]}
        )
    assert refused.value.param == "adapters"


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": ""}, "missing_parameter", "prompt"),
        ({"n": "two"}, "invalid_value", "n"),
        ({"n": "11"}, "invalid_value", "n"),
        ({"strength": "0"}, "invalid_value", "strength"),
        ({"strength": "1.01"}, "invalid_value", "strength"),
        ({"strength": "nan"}, "invalid_value", "strength"),
        ({"strength": "0.03"}, "invalid_value", "strength"),  # no step of 25
        ({"size": "16"}, "invalid_value", "size"),
        ({"size": "32x32"}, "invalid_value", "size"),
        ({"seed": "1.5"}, "invalid_value", "seed"),
        ({"stream": "maybe"}, "invalid_value", "stream"),
        ({"sampler": "magic"}, "invalid_value", "sampler"),
        ({"background": "transparent"}, "invalid_value", "background"),
        ({"prompt": "a\0b"}, "invalid_value", "prompt"),
        ({"lora": "cup"}, "unknown_parameter", "lora"),
        ({"Image": "a"}, "unknown_parameter", "Image"),
        ({"image_url": "http://x/a.png"}, "unknown_parameter", "image_url"),
        ({"adapters": "cup"}, "invalid_value", "adapters"),
        ({"adapters": "[" * 9000}, "invalid_value", "adapters"),
        ({"adapters": '[{"model": "cup", "model": "mug"}]'}, "invalid_value", "adapters"),
        ({"adapters": '[{"model": "cup", "strength": 1, "strength": 0.5}]'}, "invalid_value", "adapters"),
        ({"adapters": '[{"model": "cup", "strength": NaN}]'}, "invalid_value", "adapters"),
        ({"adapters": '[{"model": "cup", "weight": 1}]'}, "unknown_parameter", "adapters.0.weight"),
        ({"adapters": '[{"model": "cup"}]', "adapters[][model]": "mug"}, "invalid_value", "adapters"),
        ({"adapters": '[{"model": "cup"}]', "model": "mug"}, "invalid_value", "model"),
        ({"user": ["a", "b"]}, "invalid_value", "user"),
    ],
)
def test_a_wrong_field_is_named(
    http: httpx2.Client, engine: ScriptedEngine, fields: dict[str, Any], code: str, param: str
) -> None:
    assert_refused(post(http, **fields), 400, code, param)
    assert engine.calls == []


@pytest.mark.parametrize(
    ("files", "code", "param", "said"),
    [
        ({"mask": ("m.png", marks())}, "missing_parameter", "image", "Field required"),
        ({"image": (None, "text")}, "invalid_value", "image", "was sent as text"),
        (form(b""), "invalid_value", "image", "is empty"),
        (form(b"GIF89a"), "invalid_value", "image", "not a readable image"),
        (form(mask=b"junk"), "invalid_value", "mask", "not a readable image"),
        (form(mask=marks(16, 17)), "invalid_value", "mask", "is 16x17 pixels and the image 16x16"),
        (form(mask=photo()), "invalid_value", "mask", "not black and white"),
        ([("image", ("a", photo())), ("image", ("b", photo()))], "invalid_value", "image", "more than once"),
        ([*form().items(), ("mask", ("m", marks())), ("mask", ("m", marks()))], "invalid_value", "mask", "once"),
        ({**form(), "markup": ("m.png", marks())}, "unknown_parameter", "markup", "no such parameter"),
        ({**form(), "user": ("u.txt", b"me")}, "invalid_value", "user", "send it as text"),
        ({**form(), "user": (None, b"\xff\xfe")}, "invalid_value", "user", "UTF-8"),
        ({**form(), "user": (None, b"a" * 150_000)}, "invalid_value", "user", "at most 256"),
    ],
)
def test_a_wrong_file_is_named(
    http: httpx2.Client, engine: ScriptedEngine, files: Any, code: str, param: str, said: str
) -> None:
    assert said in assert_refused(post(http, files), 400, code, param)["message"]
    assert engine.calls == []


def test_every_bad_field_is_named(http: httpx2.Client) -> None:
    response = http.post(PATH, data={"n": "x", "strength": "7"}, files={"mask": ("m.png", marks())})
    message = assert_refused(response, 400, "missing_parameter", "image")["message"]
    assert all(f"{name}: " in message for name in ("image", "prompt", "n", "strength"))


def test_one_step_is_enough_where_transparency_is_the_mask(http: httpx2.Client, engine: ScriptedEngine) -> None:
    kept = io.BytesIO()
    image = Image.open(io.BytesIO(photo()))
    image.putalpha(Image.open(io.BytesIO(marks())))
    image.save(kept, "png")
    response = post(http, form(kept.getvalue()), num_inference_steps="1")
    assert response.status_code == 200, response.text
    assert sent(engine).strength == 1.0
    refused = assert_refused(post(http, num_inference_steps="1"), 400, "invalid_value", "strength")
    assert refused["message"].startswith("strength: 0.8 of 1 steps leaves none to make")
    assert len(engine.calls) == 1


def test_an_input_of_a_page_that_was_left_empty_is_absent(http: httpx2.Client, engine: ScriptedEngine) -> None:
    assert post(http, {**form(), "mask": ("", b"")}).status_code == 200
    assert sent(engine).mask is None


@pytest.mark.parametrize(
    "content_type", [None, "application/json", "multipart/form-data", "multipart/mixed; boundary=x", "image/png"]
)
def test_only_a_form_is_read(http: httpx2.Client, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    assert_refused(http.post(PATH, content=b"{}", headers=headers), 415, "not_multipart")


def test_a_form_that_is_too_large_is_refused(http: httpx2.Client) -> None:
    refused = assert_refused(post(http, form(bytes(300_000))), 413, "body_too_large")
    assert "send a smaller image" in refused["message"]


def whole_form() -> tuple[bytes, dict[str, str]]:
    request = httpx2.Request("POST", "http://x" + PATH, data={"prompt": "a cup", "n": "1"}, files=form(mask=marks()))
    return request.read(), {"content-type": request.headers["content-type"]}


@pytest.mark.slow
def test_a_damaged_form_is_refused_or_read_as_it_is(http: httpx2.Client, engine: ScriptedEngine) -> None:
    """Cut off anywhere before its last boundary it is refused; changed anywhere it never breaks the service."""
    body, headers = whole_form()
    chance = random.Random(0)
    for end in [*range(200), *range(200, len(body) - 4, 37)]:
        response = http.post(PATH, content=body[:end], headers=headers)
        assert_refused(response, 400, "invalid_form")
    assert engine.calls == []
    for _ in range(300):
        damaged = bytearray(body)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        status = http.post(PATH, content=bytes(damaged), headers=headers).status_code
        assert status in (200, 400), bytes(damaged)


def test_an_engine_that_is_away_is_said(http: httpx2.Client, engine: ScriptedEngine) -> None:
    engine.refusal = EngineStoppedError("no engine responds: try again")
    assert_refused(post(http), 503, "engine_stopped")


def test_sizes_are_asked_for_once(http: httpx2.Client, engine: ScriptedEngine) -> None:
    assert post(http).status_code == 200
    engine.refusal = EngineStoppedError("no engine responds: try again")
    assert post(http, size="24x16").status_code == 200


class Sleeping(ScriptedEngine):
    """There is no engine, until a call that starts one has waited for it."""

    waits: list[float]
    begins_s = 0.3

    async def status(self) -> dict[str, Any]:
        return {"engines": 0, "drift": {}}

    async def sizes(self, wait_s: float) -> list[str]:
        self.waits = [*getattr(self, "waits", ()), wait_s]
        await asyncio.sleep(self.begins_s)
        return ["16x16", "24x16"]


def test_an_edit_wakes_a_service_that_sleeps_and_has_its_deadline_once(tmp_path: Path) -> None:
    engine, settings = Sleeping(), ServeSettings(base="base", deadline_s=30.0)
    with (
        listening(only(engine), Registry(LocalStore(tmp_path)), settings, Access(settings)) as live,
        live.http() as http,
    ):
        for size in ("auto", "24x16"):
            assert post(http, size=size).status_code == 200
    assert [call.size for call in engine.calls] == [(16, 16), (24, 16)]
    assert engine.waits == [30.0], "known sizes are not asked for again"
    assert 20.0 < (engine.calls[0].deadline_s or 0) < 30.0 - Sleeping.begins_s


def test_a_client_that_goes_while_an_engine_starts_leaves_room(tmp_path: Path) -> None:
    engine, settings = Sleeping(), ServeSettings(base="base", max_uploads=1)
    engine.begins_s = 60.0
    with (
        listening(only(engine), Registry(LocalStore(tmp_path)), settings, Access(settings)) as live,
        live.http() as http,
    ):
        with pytest.raises(httpx2.ReadTimeout):
            http.post(PATH, data={"prompt": "a cup"}, files=form(), timeout=0.5)
        engine.begins_s = 0.0
        until(lambda: post(http).status_code == 200)


def test_slow_uploads_are_few_and_have_a_limit(live: Live, http: httpx2.Client) -> None:
    """Two may be sent at once; a third is refused until they are given up."""
    body, headers = whole_form()

    async def main() -> None:
        host, _, port = live.url.removeprefix("http://").partition(":")
        head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {headers['content-type']}\r\n"
        slow = []
        for _ in range(2):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:50])
            await writer.drain()
            slow.append((reader, writer))
        await asyncio.sleep(0.15)
        refused = await asyncio.to_thread(post, http)
        assert assert_refused(refused, 503, "overloaded")
        assert refused.headers["retry-after"]
        for reader, writer in slow:
            answer = await asyncio.wait_for(reader.read(), 10)
            assert b" 408 " in answer.partition(b"\r\n")[0]
            assert b"body_timeout" in answer
            writer.close()

    asyncio.run(main())
    assert post(http).status_code == 200
