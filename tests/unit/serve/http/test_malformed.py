"""Well over a thousand requests that are wrong in some way: each is refused in OpenAI's shape, and touches nothing."""

from __future__ import annotations

import http.client
import json
import random
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.support.ingress_server import Live, furnish, serving

pytestmark = pytest.mark.slow

PATH = "/v1/images/generations"
GOOD: dict[str, Any] = {"prompt": "a sks cup", "model": "cup", "n": 1, "num_inference_steps": 2, "size": "16x16"}
TRICKS = [
    "..", "../..", "../../etc/passwd", "/etc/passwd", "\\..\\..", "....//", "cup/../mug", "cup/..", "./cup", "cup\0",
    "cup\n", "cup%00", "%2e%2e%2f", "cup@../latest", "cup@r-../../x", "cup@latest/..", "cup@@latest", "@cup", "cup@",
    "cup@r-", "cup@r-zzzzzzzzzzzz", "cup@r-0123456789abcdef", "s3://bucket/cup", "file:///etc/passwd", "cup?x=1",
    "cup;rm -rf", "cup#x", "$(id)", "`id`", "' OR 1=1 --", "<script>alert(1)</script>", "{{7*7}}", "%s%s%n",
    "CUP", "Cup", " cup", "cup ", "-cup", "c" * 64, "c" * 1000, "\u0441\u0443\u0440", "cup\u200b", "\u202ecup",
    "\U0001f600", "cup\u0301", "aliases", "objects", "manifest.json", "adapters/cup", "quarantine/cup", "nobody",
    "cupp", "null", "None", "~", "*",
]  # fmt: skip


@pytest.fixture(scope="module")
def live(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(furnish(tiny_base_folder, tmp_path_factory.mktemp("storage"), max_body_bytes=4096)) as live:
        yield live


def wrong_texts() -> Iterator[bytes]:
    """Bodies that are no JSON object, or not one that can be trusted."""
    text, chance = json.dumps(GOOD), random.Random(0)
    yield from (text[:end].encode() for end in range(len(text)))
    yield from (chance.randbytes(chance.randrange(1, 200)) for _ in range(150))
    yield from (b'{"prompt": "a", "seed": %b}' % n for n in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 4000))
    yield from (
        b'{"prompt": "a", "guidance_scale": %b}' % n for n in (b"NaN", b"1e999", b"-1e999", b"0x10", b"1.", b"+1")
    )
    yield from (
        b'{"prompt": "a", "adapters": [{"model": "cup", "strength": %b}]}' % n for n in (b"NaN", b"1e999", b"-1", b".5")
    )
    yield from (b'{"prompt": "a", "adapters": %b}' % (b"[" * depth + b"]" * depth) for depth in (2, 100, 2000))
    yield from (b"[" * depth for depth in (1, 100, 2000, 4000))
    yield from (b"[" * depth + b"]" * depth for depth in (1, 100, 1000, 2000))
    yield from (b'{"prompt":' * depth + b"1" + b"}" * depth for depth in (10, 300))
    yield from (b'{"prompt": "a", "prompt": "b"}', b'{"prompt": "a", "n": 1, "n": 2}', b'{"prompt": "a"} {"n": 1}')
    yield from (
        b"null",
        b"true",
        b"0",
        b'"prompt"',
        b"[]",
        b"{}",
        b"  ",
        b"\0",
        b"{'prompt': 'a'}",
        b'{"prompt": "a",}',
    )
    yield from (text.encode(name) for name in ("utf-16", "utf-32", "utf-8-sig", "cp037"))
    yield from (
        b'{"prompt": "%b"}' % bad for bad in (b"\xff\xfe", b"\xc3(", b"\xed\xa0\x80", b"\n", b"\\x41", b"\\ud800")
    )
    yield from (b'{"prompt": "%b"}' % (b"a" * size) for size in (4090, 5000, 100_000, 2_000_000))
    yield from (b" " * size for size in (4097, 1_000_000))


def wrong_fields() -> Iterator[dict[str, Any]]:
    """Objects with one field that is wrong."""
    huge = [2**63, -(2**63), 2**64, 10**30, -2, 1.5, 1e308]
    others: list[Any] = ["1", "", [], [1], {}, {"a": 1}, "\0", "\u202e"]
    for name in ("n", "seed", "num_inference_steps", "partial_images", "output_compression"):
        yield from ({name: value} for value in (*huge, *others, True, False))
    for name in ("guidance_scale", "strength"):
        yield from ({name: value} for value in (-1, -0.001, 51, 2**63, 10**30, *others, True))
    for name in ("stream", "progress"):
        yield from ({name: value} for value in (0, 1, 2.0, "true", "false", *others))
    for name in ("prompt", "negative_prompt", "model", "size", "response_format", "sampler", "output_format", "user"):
        yield from ({name: value} for value in (1, 0.5, True, [], ["a"], {}, {"a": "b"}))
    for name in ("prompt", "negative_prompt"):
        yield from ({name: f"a{chr(code)}b"} for code in (*range(9), 11, 12, *range(14, 32), 127))
        yield from ({name: value} for value in ("a" * 4090, "\udc80", "\ud83d"))
    yield from ({"prompt": value} for value in ("", None))
    sizes = ["0x0", "16", "x16", "16x", "16X16", "-16x16", "16x16x16", "1e2x16", " 16x16", "16x16\n", "99999x99999",
             "17x16", "16 x 16", "\u0661\u0666x16", "17x17", "1024x1024", "large", "AUTO", "\0"]  # fmt: skip
    yield from ({"size": size} for size in sizes)
    yield from ({"response_format": value} for value in ("URL", "file", "B64_JSON", ""))
    yield from ({"output_format": value} for value in ("gif", "svg", "jpg", "PNG", ""))
    yield from ({"sampler": value} for value in ("DDIM", "euler_a", "", "ddim\n"))
    yield from ({"seed": 2**63 - 1, "n": n} for n in range(2, 11))
    yield from ({"num_inference_steps": steps} for steps in (0, 101, 1000, 1001))
    yield from ({"model": value} for value in (*TRICKS, "\ud800", "x" * 3000))
    yield from ({"model": f"cup+{value}"} for value in (*TRICKS, "\ud800", "x" * 3000, "cup", ""))
    yield from ({"model": value} for value in ("+", "++", "cup+mug+", "+".join(["mug"] * 900), "mug+cup@stable+cup"))
    yield from ({"prompt": f"a <lora:{tag}> cup"} for tag in ("", "a b", "cup:", "cup:x", "cup:3", "cup:1:1", "\udc80"))
    tricks = [trick for trick in TRICKS if not set("<>") & set(trick)]  # with these it is text
    yield from ({"prompt": f"a <lora:{tag}> cup"} for tag in (*tricks, "cup", "mug><lora:mug", "mug:1e999", "mug:nan"))
    yield {"prompt": "".join(f"<lora:a{n}>" for n in range(300))}


def wrong_stacks() -> Iterator[Any]:
    """What `adapters` must not be."""
    others: list[Any] = ["1", "", [], [1], {}, {"a": 1}, "\0", "\u202e"]
    yield from (1, "cup", "[]", True, {}, {"model": "cup"}, ["cup"], [1], [None], [[]], [{}], [[{"model": "cup"}]])
    yield from ([{"model": value}] for value in (*TRICKS, 1, None, [], {}, "\ud800", "x" * 3000, "cup+mug"))
    yield from ([{"model": "mug"}, {"model": value}] for value in (*TRICKS, None, "mug", "mug@latest"))
    yield from ([{"model": "cup", "strength": value}] for value in (-1, 2.1, 10**30, *others, True))
    yield from ([{"model": "cup", name: 1}] for name in ("weight", "Model", "__proto__", ""))
    yield from ([{"model": f"a{n}"} for n in range(count)] for count in (9, 33, 100))


def wrong_names() -> Iterator[dict[str, Any]]:
    """Objects with a field that there is none of."""
    chance = random.Random(1)
    letters = string.printable + "\u00e9\u4e2d\u202e\U0001f600"
    for _ in range(150):
        yield {"".join(chance.choices(letters, k=chance.randrange(1, 30))): chance.choice([1, None, "a", [], {}])}
    names = ["Prompt", "prompt ", "lora", "loras", "adapter_id", "__proto__", "__class__", "", "\ud800", "x" * 3000]
    yield from ({name: 1} for name in names)


def wrong_paths() -> Iterator[tuple[str, str]]:
    """Methods and paths that name nothing that is there, or name it in a way that must not work."""
    for trick in TRICKS:
        for path in (quote(trick, safe=""), quote(trick, safe="/@")):
            yield "GET", f"/v1/adapters/{path}"
            yield "GET", f"/v1/adapters/{path}/drift"
            yield "GET", f"/v1/adapters/{path}/samples/sample-0-with-0.png"
            yield "GET", f"/v1/adapters/cup/samples/{path}"
            yield "GET", f"/v1/models/{path}"
            yield "POST", f"/v1/adapters/{path}/load"
            yield "POST", f"/v1/adapters/cup/{path}"
            yield "GET", f"/page/{path}"
            yield "GET", f"/docs/assets/{path}"
    yield from (("GET", f"/v1/adapters/cup/drift?hours={hours}") for hours in ("0", "x", "1e9", "-1", "9" * 30, "%00"))
    yield from ((method, PATH) for method in ("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE"))


def test_what_is_wrong_is_refused_and_touches_nothing(live: Live) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", int(live.url.rpartition(":")[2]), timeout=60)
    codes: Counter[int] = Counter()

    def refused(method: str, path: str, body: bytes | None = None) -> str | None:
        """See that it is refused; the field that is said to be wrong."""
        headers = {} if body is None else {"Content-Type": "application/json"}
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        param, content, told = None, answer.read(), f"{method} {path[:100]} {(body or b'')[:100]!r}"
        assert 400 <= answer.status < 500, f"{told}: {answer.status} {content[:300]!r}"
        if method != "HEAD":
            error = json.loads(content)["error"]
            assert set(error) == {"message", "type", "param", "code"}, told
            assert error["message"], told
            param = error["param"]
            assert isinstance(error["code"], str), told
            assert len(content) < 8192, told
        assert answer.headers["x-request-id"], told
        codes[answer.status] += 1
        return param

    for text in wrong_texts():
        refused("POST", PATH, text)
    for fields in (*wrong_fields(), *wrong_names()):
        refused("POST", PATH, json.dumps({**GOOD, **fields}).encode())
    for adapters in wrong_stacks():
        blamed = refused("POST", PATH, json.dumps({**GOOD, "model": None, "adapters": adapters}).encode())
        assert str(blamed).startswith("adapters"), (adapters, blamed)
    refused("POST", PATH, json.dumps({**GOOD, "adapters": [{"model": "mug"}]}).encode())  # beside `model`
    for method, path in wrong_paths():
        refused(method, path)
    connection.close()

    assert codes.total() >= 1500
    assert set(codes) == {400, 404, 405, 413}
    status = live.call(live.engine.status())
    assert status["adapters"]["held"] == status["adapters"]["host"] == []
    assert status["images"] == {"waiting": 0, "active": 0, "in_flight": 0}


def test_what_is_odd_but_right_is_served(live: Live) -> None:
    with live.http() as client:
        for fields in (
            {"prompt": "\U0001f600 \u4e2d\u6587 e\u0301 <b>\"'`\\ \t\n\r {} %s"},
            {"prompt": " "},
            {"prompt": "a" * 3000, "negative_prompt": "\u202e"},
            {"seed": 2**63 - 1},
            {"seed": 0, "strength": 0, "guidance_scale": 0},
            {"strength": 2.0, "guidance_scale": 50},
            {"model": "mug+cup@stable"},
            {"adapters": [], "prompt": "<lora:mug:1e-3> <lora:cup"},
            {
                "model": None,
                "adapters": [{"model": "mug", "strength": 2}, {"model": "cup", "strength": 0}],
                "strength": 2,
            },
            {"prompt": "<LORA: mug@latest:.5 >"},
        ):
            response = client.post(PATH, json={**GOOD, "n": 1, **fields})
            assert response.status_code == 200, response.text
