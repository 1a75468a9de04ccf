"""The HTTP service before the real engine: what it draws, what it lists, and OpenAI's own client in front of it."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import threading
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import httpx2
import openai
import pytest
from openai.types.image_gen_completed_event import ImageGenCompletedEvent
from openai.types.image_gen_partial_image_event import ImageGenPartialImageEvent
from PIL import Image

from cat_cluster.errors import StoreError
from cat_cluster.evaluation.drift import DriftMonitor
from cat_cluster.registry import AdapterPage, Registry
from serve.http.registry_listing import RegistryListing
from serve.probes.records import ProbeLog, ProbeRecord
from tests.support.ingress_server import REFERENCE, Live, Shop, furnish, picture, serving

PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def shop(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return furnish(tiny_base_folder, tmp_path_factory.mktemp("storage"))


@pytest.fixture(scope="module")
def live(shop: Shop) -> Iterator[Live]:
    with serving(shop) as live:
        yield live


def draw(http: httpx2.Client, **fields: Any) -> dict[str, Any]:
    response = http.post(PATH, json={"prompt": "a sks cup", "num_inference_steps": 2, "seed": 5, **fields})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def pixels(item: dict[str, Any] | Any) -> bytes:
    encoded = item["b64_json"] if isinstance(item, dict) else item.b64_json
    return Image.open(io.BytesIO(base64.b64decode(encoded))).tobytes()


def look_alike(one: bytes, other: bytes) -> bool:
    """Whether no value of two pictures is further apart than rounding, which depends on who shares a call."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 1


def test_models_are_drawn_by_whatever_names_them(http: httpx2.Client, shop: Shop) -> None:
    old, new = shop.cups
    base = draw(http)
    assert base["model"] == shop.settings.base
    assert look_alike(pixels(draw(http, model=shop.settings.base)["data"][0]), pixels(base["data"][0]))
    images = {}
    for reference, served in {
        "cup": new.name,
        "cup@latest": new.name,
        "cup@stable": old.name,
        new.name: new.name,
        "mug": shop.mug.name,
    }.items():
        body = draw(http, model=reference)
        assert body["model"] == served
        images.setdefault(served, set()).add(pixels(body["data"][0]))
    assert all(len(found) == 1 for found in images.values())
    assert len({pixels(base["data"][0]), *(found for one in images.values() for found in one)}) == 4


def test_image_i_has_seed_plus_i(http: httpx2.Client) -> None:
    three = draw(http, n=3, seed=5)
    assert [item["seed"] for item in three["data"]] == [5, 6, 7]
    assert look_alike(pixels(three["data"][2]), pixels(draw(http, seed=7)["data"][0]))
    again = draw(http, seed=draw(http, seed=None)["data"][0]["seed"])
    assert again["size"] == "16x16"
    assert "prompt" not in again


def test_what_the_engine_refuses(http: httpx2.Client) -> None:
    for fields, status, param in [
        ({"model": "nobody"}, 404, "model"),
        ({"model": "cup@nobody"}, 404, "model"),
        ({"size": "999x999"}, 400, "size"),
        ({"num_inference_steps": 1000}, 400, "num_inference_steps"),
    ]:
        response = http.post(PATH, json={"prompt": "a", **fields})
        assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text
    assert "did you mean mug" in http.post(PATH, json={"prompt": "a", "model": "mugg"}).text


def test_models_in_openais_list(http: httpx2.Client, shop: Shop) -> None:
    body = http.get("/v1/models").json()
    base = shop.settings.base
    assert [(model["id"], model["root"], model["parent"]) for model in body["data"]] == [
        (base, base, None),
        ("cup", shop.cups[1].name, base),
        ("mug", shop.mug.name, base),
    ]
    assert body["data"][1]["created"] > 1_700_000_000
    assert http.get("/v1/models/cup@stable").json()["root"] == shop.cups[0].name
    assert http.get(f"/v1/models/{base.replace('/', '%2F')}").json()["id"] == base
    assert http.get("/v1/models/nobody").json()["error"]["code"] == "model_not_found"


def test_adapters(http: httpx2.Client, shop: Shop) -> None:
    old, new = shop.cups
    cup, mug = http.get("/v1/adapters").json()["data"]
    assert (cup["id"], mug["id"]) == ("cup", "mug")
    assert cup["aliases"] == {"latest": new.revision, "stable": old.revision}
    assert cup["latest"]["name"] == new.name
    detail = http.get("/v1/adapters/cup@stable").json()
    assert detail["name"] == old.name
    assert detail["revisions"] == [new.revision, old.revision]
    assert detail["concepts"] == [{"token": "sks", "class_noun": "cup", "alpha": 2.0}]
    assert detail["metrics"] == {"kps": 0.2}
    assert detail["intervals"] == {"kps": [0.1, 0.3]}
    assert (detail["method"], detail["rank"]) == ("cat", 2)
    assert "photos" not in http.get("/v1/adapters/cup").text
    for reference in ("nobody", "cup@nobody", "cup@r-000000000000", "cup@", "@", "Cup", "..%2f", "%00", "cup@r-1"):
        response = http.get(f"/v1/adapters/{reference}")
        assert response.status_code == 404, reference
        assert response.json()["error"]["code"] in ("model_not_found", "not_found")


def test_samples_are_kept_by_browsers(http: httpx2.Client, shop: Shop) -> None:
    old = shop.cups[0]
    path = f"/v1/adapters/{old.name}/samples/sample-0-with-0.png"
    first = http.get(path)
    assert first.content == picture()
    assert first.headers["content-type"] == "image/png"
    assert "immutable" in first.headers["cache-control"]
    assert first.headers["etag"] == f'"{old.objects["sample-0-with-0.png"].sha256}"'
    again = http.get(path, headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    moving = http.get("/v1/adapters/cup/samples/sample-0-with-0.png")
    assert "immutable" not in moving.headers["cache-control"]
    for name in ("weights", "nobody.png", "..%2fmanifest.json", "%2e%2e"):
        assert http.get(f"/v1/adapters/{old.name}/samples/{name}").status_code == 404, name


def test_a_damaged_sample_is_not_served(http: httpx2.Client, shop: Shop) -> None:
    stored = shop.mug.objects["sample-0-without-0.png"]
    kept = shop.registry.store.get(stored.key)
    shop.registry.store.put(stored.key, kept[::-1])
    response = http.get("/v1/adapters/mug/samples/sample-0-without-0.png")
    shop.registry.store.put(stored.key, kept)
    assert (response.status_code, response.json()["error"]["code"]) == (422, "model_damaged")


def test_drift_has_reference_and_history(http: httpx2.Client, live: Live, shop: Shop) -> None:
    name = shop.cups[1]

    async def record() -> None:
        log = ProbeLog(shop.registry.store, "replica")
        scores = {"kps": 0.2, "identity": 0.6, "base_drift": 0.1}
        for age, verdict in ((0.0, "ok"), (7 * 86400.0, "alarm")):
            found = ProbeRecord(time=time.time() - age, replica="r", kind="canonical", verdict=verdict, scores=scores)
            await log.append("cup", name.revision, found)

    live.call(record())
    body = http.get("/v1/adapters/cup/drift").json()
    assert (body["name"], body["state"], body["quarantined"]) == (name.name, "unknown", None)
    assert body["reference"]["kps"] == {"mean": pytest.approx(0.24), "std": pytest.approx(0.02), "count": 10}
    assert body["reference"]["decoy_drift"] == {"mean": pytest.approx(0.02), "std": pytest.approx(0.01), "count": 2}
    assert [(probe["verdict"], probe["scores"]["kps"]) for probe in body["history"]] == [("ok", 0.2)]
    assert len(http.get("/v1/adapters/cup/drift?hours=400").json()["history"]) == 2
    for hours in ("0", "-1", "1e3", "nan", "99999999999999999999"):
        refused = http.get(f"/v1/adapters/cup/drift?hours={hours}")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "hours")
    shop.registry.quarantine("cup", name.revision, "an alarm")
    assert http.get("/v1/adapters/cup/drift").json()["quarantined"]["reason"] == "an alarm"
    shop.registry.release("cup", name.revision)


def test_drift_tells_how_far_detectors_have_gone(http: httpx2.Client, live: Live, shop: Shop) -> None:
    scores = {"kps": 0.9, "identity": 0.1, "base_drift": 0.9}
    monitor = DriftMonitor(REFERENCE)
    for _ in range(20):
        monitor.update(scores)
    found = ProbeRecord(
        time=time.time(), replica="r", kind="live", verdict="alarm", token="sks", scores=scores,
        detectors=monitor.to_json(),
    )  # fmt: skip
    live.call(ProbeLog(shop.registry.store, "other").append("mug", shop.mug.revision, found))
    detectors = http.get("/v1/adapters/mug/drift").json()["history"][-1]["detectors"]
    assert detectors["share"] >= 1.0
    assert detectors["shares"] == monitor.shares


def test_actions_reach_the_engine(http: httpx2.Client, shop: Shop) -> None:
    def held() -> dict[str, Any]:
        return {slot["model"]: slot for slot in http.get("/v1/status").json()["adapters"]["held"]}

    name = shop.mug.name
    for action in ("load", "pin"):
        body = http.post(f"/v1/adapters/mug/{action}").json()
        assert (body["action"], body["reference"]) == (action, "mug")
    assert held()[name]["pinned"]
    for action in ("unpin", "unload"):
        assert http.post(f"/v1/adapters/{name}/{action}").status_code == 200
    assert name not in held()
    assert http.post("/v1/adapters/nobody/load").status_code == 404
    assert http.post("/v1/adapters/mug/delete").status_code == 400
    assert http.post("/v1/adapters/mug/probe").status_code == 400  # probes are off here, and the answer says so


def test_openais_client(client: openai.OpenAI, shop: Shop) -> None:
    assert [model.id for model in client.models.list()] == [shop.settings.base, "cup", "mug"]
    page = client.models.list(extra_query={"limit": 2})
    assert ([model.id for model in page], page.has_more) == ([shop.settings.base, "cup"], True)  # type: ignore[attr-defined]
    page = client.models.list(extra_query={"limit": 2, "after": page.last_id})  # type: ignore[attr-defined]
    assert ([model.id for model in page], page.has_more) == (["mug"], False)  # type: ignore[attr-defined]
    assert client.models.retrieve("cup").owned_by == "cat-cluster"
    answer = client.images.generate(
        model="cup",
        prompt="a sks cup",
        n=2,
        size="auto",
        response_format="b64_json",
        quality="hd",
        style="vivid",
        user="someone",
        extra_body={"seed": 3, "num_inference_steps": 2, "negative_prompt": "a fish"},
    )
    assert answer.data is not None
    assert len(answer.data) == 2
    assert Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or ""))).size == (16, 16)
    assert (answer.size, answer.output_format, answer.model) == ("16x16", "png", shop.cups[1].name)  # type: ignore[attr-defined]


def test_openais_client_draws_a_stack_however_it_is_named(client: openai.OpenAI, shop: Shop) -> None:
    settings = {"seed": 3, "num_inference_steps": 2}
    stack = [{"model": "cup", "strength": 0.5}, {"model": shop.mug.name}]
    ways = [
        client.images.generate(model="cup+mug", prompt="a cup", extra_body={**settings, "strength": 0.5}),
        client.images.generate(prompt="a cup", extra_body={**settings, "adapters": stack}),
        client.images.generate(model="mug", prompt="a <lora:cup:0.5> cup", extra_body=settings),
    ]
    names = [f"{shop.cups[1].name}+{shop.mug.name}"] * 2 + [f"{shop.mug.name}+{shop.cups[1].name}"]
    assert [answer.model for answer in ways] == names  # type: ignore[attr-defined]
    images = [pixels({"b64_json": answer.data[0].b64_json}) for answer in ways if answer.data]
    assert look_alike(images[1], images[2])
    assert not look_alike(images[0], images[1])
    with pytest.raises(
        openai.NotFoundError, match=r"adapters\.1\.model: no adapter 'mugg': did you mean mug"
    ) as refused:
        client.images.generate(prompt="a", extra_body={"adapters": [{"model": "cup"}, {"model": "mugg"}]})
    assert refused.value.param == "adapters.1.model"


def test_openais_client_edits_an_image(client: openai.OpenAI, shop: Shop) -> None:
    photo = picture(kind="jpeg", shade=200)
    mask = Image.new("RGBA", (16, 16), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (8, 0, 16, 16))
    marks = io.BytesIO()
    mask.save(marks, "png")
    body = {"seed": 3, "num_inference_steps": 4, "strength": 0.75}
    answers = [
        client.images.edit(model="cup", image=photo, prompt="a sks cup", n=2, extra_body=body),
        client.images.edit(image=photo, prompt="a sks cup", extra_body={**body, "adapters": [{"model": "cup"}]}),
        client.images.edit(model="cup", image=photo, mask=marks.getvalue(), prompt="a sks cup", extra_body=body),
        client.images.generate(model="cup", prompt="a sks cup", extra_body={"seed": 3, "num_inference_steps": 4}),
    ]
    assert {answer.model for answer in answers} == {shop.cups[1].name}  # type: ignore[attr-defined]
    images = [[pixels(image) for image in answer.data or ()] for answer in answers]
    assert [len(one) for one in images] == [2, 1, 1, 1]
    assert look_alike(images[0][0], images[1][0])
    others = (images[0][0], images[0][1], images[2][0], images[3][0])
    assert not any(look_alike(one, other) for one, other in combinations(others, 2))
    with client.images.edit(model="cup", image=photo, prompt="a sks cup", stream=True, extra_body=body) as stream:
        assert look_alike(pixels(list(stream)[-1]), images[0][0])
    with pytest.raises(openai.NotFoundError, match="did you mean mug"):
        client.images.edit(model="mugg", image=photo, prompt="a")
    with pytest.raises(openai.BadRequestError, match="999x999 is not served; choose one of 16x16") as refused:
        client.images.edit(image=photo, prompt="a", size="999x999")  # type: ignore[call-overload]
    assert refused.value.param == "size"


def test_openais_client_asks_for_a_small_file_as_an_address(client: openai.OpenAI) -> None:
    prompt = "a cup on a table, <hypernet:cup:0.8> in (snow:1.2) " * 680
    answer = client.images.generate(
        prompt=prompt[:32_000],
        response_format="url",
        output_format="webp",
        output_compression=30,
        safety_identifier="a-hash",
        moderation="low",
        extra_body={"seed": -1, "num_inference_steps": 2},
    )
    assert answer.data is not None
    assert answer.output_format == "webp"
    assert answer.data[0].b64_json is None
    with urlopen(answer.data[0].url or "") as opened:  # any program that opens addresses opens this one
        assert opened.headers["content-type"] == "image/webp"
        assert Image.open(io.BytesIO(opened.read())).format == "WEBP"
    assert answer.data[0].seed >= 0  # type: ignore[attr-defined]
    note = answer.cat["note"]  # type: ignore[attr-defined]
    for told in (
        "tokens of the prompt, and not '",
        "<hypernet:cup:0.8>",
        "(snow:1.2)",
        "moderation, safety_identifier",
    ):
        assert told in note
    assert len(note) < 2000
    with client.images.generate(prompt="a (cup:1.2)", stream=True, extra_body={"num_inference_steps": 2}) as stream:
        assert "(cup:1.2)" in list(stream)[-1].cat["note"]  # type: ignore[union-attr]


def test_head_is_get_without_its_body(live: Live, http: httpx2.Client, shop: Shop) -> None:
    names = {"model": "cup", "reference": shop.cups[0].name, "name": "sample-0-with-0.png"}
    # What a file, a run or a job is asked for has tests of its own: there is none here.
    described = [
        path
        for path, operations in live.app.openapi()["paths"].items()
        if "get" in operations and set(re.findall(r"\{(\w+)\}", path)) <= names.keys()
    ]
    assert len(described) >= 12
    files = ("/", "/docs", "/docs/start.js", "/docs/assets/swagger-ui.css", "/openapi.json", "/page/app.js")
    for path in (*files, *(path.format(**names) for path in described)):
        get, head = http.get(path), http.head(path)
        assert (head.status_code, head.content) == (get.status_code, b"") == (200, b""), path
        same = ("content-type", "content-length", "etag", "cache-control")
        if path not in ("/metrics", "/v1/status"):  # whose numbers move
            assert [head.headers.get(name) for name in same] == [get.headers.get(name) for name in same], path
    assert http.head("/v1/adapters/nobody").status_code == 404
    assert http.head(PATH).status_code == 405


def test_openais_client_streams(client: openai.OpenAI) -> None:
    body = {"seed": 3, "num_inference_steps": 4}
    with client.images.generate(model="mug", prompt="a mug", stream=True, partial_images=2, extra_body=body) as stream:
        *partial, last = list(stream)
    assert partial
    for number, event in enumerate(partial):
        assert isinstance(event, ImageGenPartialImageEvent)
        ImageGenPartialImageEvent.model_validate(event.model_dump(), strict=True)
        assert event.partial_image_index == number
    assert isinstance(last, ImageGenCompletedEvent)
    ImageGenCompletedEvent.model_validate(last.model_dump(), strict=True)
    whole = client.images.generate(model="mug", prompt="a mug", extra_body=body)
    assert whole.data is not None
    assert look_alike(pixels(last), pixels(whole.data[0]))


def test_openais_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(model="nobody", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a", background="transparent")
    assert (refused.value.param, "'opaque'" in refused.value.message) == ("background", True)
    with pytest.raises(openai.BadRequestError, match="no such parameter"):
        client.images.generate(prompt="a", extra_body={"lora": "cup"})
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_openais_asynchronous_client(live: Live) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="any") as client:
            stream = await client.images.generate(prompt="a", stream=True, extra_body={"num_inference_steps": 2})
            return [event.type async for event in stream]

    assert asyncio.run(ask()) == ["image_generation.completed"]


def test_a_client_that_goes_frees_its_rows(http: httpx2.Client, live: Live) -> None:
    with (
        live.http() as leaver,
        leaver.stream(
            "POST", PATH, json={"prompt": "a", "n": 8, "num_inference_steps": 100, "stream": True, "progress": True}
        ) as response,
    ):
        next(response.iter_lines())
    for _ in range(200):
        images = http.get("/v1/status").json()["images"]
        if not any(images.values()):
            break
        threading.Event().wait(0.02)
    assert images == {"waiting": 0, "active": 0, "in_flight": 0}


def test_one_listing_serves_all_who_ask_at_once(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, now = [], [0.0]

    def listed(self: Registry, limit: int, *, after: str | None = None) -> AdapterPage:
        reads.append(threading.get_ident())
        if len(reads) == 3:
            raise StoreError("away")
        return original(self, limit, after=after)

    original = Registry.page
    monkeypatch.setattr(Registry, "page", listed)

    async def ask() -> None:
        listing = RegistryListing(shop.registry, clock=lambda: now[0])
        leaver = asyncio.create_task(listing.page(100))
        await asyncio.sleep(0)
        leaver.cancel()
        found = await asyncio.gather(*(listing.page(100) for _ in range(20)))
        assert all([item.adapter_id for item in one.adapters] == ["cup", "mug"] for one in found)
        assert len(reads) == 1
        now[0] = 4.9
        await listing.manifest("cup@stable")
        assert len(reads) == 1
        now[0] = 5.0
        await listing.page(100)
        assert len(reads) == 2
        now[0] = 11.0
        for _ in range(3):
            with pytest.raises(StoreError):
                await listing.page(100)
        now[0] = 17.0
        await listing.page(100)
        assert len(reads) == 4
        assert threading.get_ident() not in reads

    asyncio.run(ask())
