"""The service on real Ray Serve, over HTTP, with its adapters in a real S3 server: one service for all tests.

Pictures are compared with what the library and a stock pipeline draw alone: both may round to the next of 256 levels.
"""

from __future__ import annotations

import base64
import io
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from cat_cluster.lora.formats import write_adapter
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.pipeline.published_adapters import DrawRequest, draw_images
from cat_cluster.registry import Manifest, Registry
from cat_cluster.registry.stacks import parse_member
from cat_cluster.store import open_store
from serve.settings import ProbeSettings, ServeSettings
from tests.integration.conftest import Published
from tests.support.motifs import Motif
from tests.support.s3_server import S3Server
from tests.support.serving import (
    LEVELS,
    PATH,
    Gallery,
    Pixels,
    Served,
    ask,
    deployment_of,
    pixels_of,
    publish_random,
    served,
    until,
)
from tests.support.tiny_jobs import Finished

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

KEY, ADMIN = "a-key", "an-admins-key"
STEPS, LONG = 4, 900  # LONG takes seconds
TTL_S = 1.0
PROMPT = "a photo of a sks cup"
MOTIF = Motif(PROMPT)


@dataclass(frozen=True)
class Site:
    """The service with two engines, its registry, and clients with a user's and an admin's key."""

    service: Served
    registry: Registry
    base: BaseModel
    settings: ServeSettings
    http: httpx2.Client
    admin: httpx2.Client

    def publish(self, adapter_id: str, seed: int) -> Manifest:
        return publish_random(self.registry, self.base, adapter_id, seed)

    def gallery(self, *manifests: Manifest) -> Gallery:
        gallery = Gallery(self.registry, self.base, STEPS)
        for manifest in manifests:
            gallery.add(manifest, (MOTIF,), range(1, 3))
        gallery.check_it_tells_apart()
        return gallery

    def engines(self) -> list[dict[str, Any]]:
        return self.service.tell("engines")

    def images(self, state: str = "in_flight") -> int:
        return sum(one["images"][state] for one in self.engines())

    def holders(self, adapter_id: str) -> list[int]:
        """The processes of the engines that hold an adapter."""
        return [
            one["pid"] for one in self.engines() if any(n.startswith(f"{adapter_id}@") for n in one["adapters"]["host"])
        ]

    def await_engines(self, count: int) -> list[dict[str, Any]]:
        def settled() -> list[dict[str, Any]] | None:
            states = self.service.tell("states")["Engine"]
            found = self.engines()
            return found if states == {"RUNNING": count} and len(found) == count else None

        return until(settled, 90)


@pytest.fixture(scope="module")
def site(
    first_run: tuple[Published, Finished], s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    published, finished = first_run
    assert finished.code == 0, finished.err
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "CAT_API", "CAT_ADMIN"))]:
            patch.delenv(name)
        nothing = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
        for name, value in {**s3_server.environment, **nothing, "AWS_EC2_METADATA_DISABLED": "true"}.items():
            patch.setenv(name, value)
        storage = f"{s3_server.create_bucket(f'serve-{uuid.uuid4().hex[:12]}')}/prod"
        store, trained = open_store(storage), open_store(published.storage)
        for key in trained.list(""):
            if not key.startswith("runs/"):
                store.put(key, trained.get(key))
        settings = ServeSettings(
            base=str(published.base),
            storage=storage,
            device="cpu",
            threads=1,
            slots=4,
            max_rows=8,
            alias_ttl_s=TTL_S,
            missing_ttl_s=TTL_S,
            max_steps=LONG,
            probes=ProbeSettings(policy="fallback", canonical_every_s=3600),
        )
        base = load_base_model(str(published.base))
        began = time.monotonic()
        with served(deployment_of(settings, min_engines=2), CAT_API_KEYS=KEY, CAT_ADMIN_KEYS=ADMIN) as service:
            http, admin = (service.http(headers={"Authorization": f"Bearer {key}"}) for key in (KEY, ADMIN))
            with http, admin:
                until(lambda: http.get("/ready").status_code == 200, 120)
                assert time.monotonic() - began < 120
                yield Site(service, Registry(store), base, settings, http, admin)


def drawn_alone(site: Site, model: str, out: Path) -> Pixels:
    """What `cat-cluster generate` draws."""

    class Silent:
        def images(self, adapter_id: str, done: int, total: int) -> None: ...

        def message(self, text: str) -> None: ...

    (path,) = draw_images(
        DrawRequest(PROMPT, [parse_member(model)], seed=1, steps=STEPS), out, site.registry, "cpu", Silent()
    )
    return np.asarray(Image.open(path), dtype=np.int16)


def stock_picture(site: Site, model: str, folder: Path) -> Pixels:
    """What a stock pipeline draws with the exported adapter."""
    weights = site.registry.load_weights(site.registry.resolve(model))
    path = write_adapter(weights, folder, "diffusers", adapter_id=model, metadata={})
    pipeline = StableDiffusionPipeline.from_pretrained(site.settings.base)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(str(folder), weight_name=path.name)
    generator = torch.Generator("cpu").manual_seed(1)
    image = pipeline(PROMPT, num_inference_steps=STEPS, guidance_scale=4.0, generator=generator).images[0]
    return np.asarray(image, dtype=np.int16)


class Traffic:
    """Clients that ask for one model again and again until the end of the block; every answer and when it was asked."""

    def __init__(self, site: Site, model: str, clients: int = 4) -> None:
        self._site, self._model, self._clients = site, model, clients
        self._stop = threading.Event()
        self.answers: list[tuple[float, httpx2.Response]] = []

    def __enter__(self) -> Traffic:
        self._pool = ThreadPoolExecutor(self._clients)
        self._running = [self._pool.submit(self._ask) for _ in range(self._clients)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        for one in self._running:
            one.result()

    def _ask(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            self.answers.append((began, ask(self._site.http, self._model, STEPS, prompt=PROMPT, n=2)))

    def check(self, gallery: Gallery) -> None:
        """Every answer was a success, and its pictures are of the revision it names."""
        assert len(self.answers) > 10
        assert [answer.text for _, answer in self.answers if answer.status_code != 200] == []
        assert [seed for _, answer in self.answers for seed in gallery.wrong(answer.json(), MOTIF)] == []


def test_a_picture_in_a_mixed_batch_is_the_one_drawn_alone(site: Site, tmp_path: Path) -> None:
    for seed in (21, 22):
        site.publish(f"beside-{seed}", seed)
    with ThreadPoolExecutor(9) as pool:
        others = [pool.submit(ask, site.http, f"beside-{21 + n % 2}", 40 + n, guidance_scale=1.0 + n) for n in range(8)]
        answer = ask(site.http, "cup", STEPS, prompt=PROMPT).json()
        assert [other.result().status_code for other in others] == [200] * 8
    ours, bare = pixels_of(answer["data"][0]), ask(site.http, site.settings.base, STEPS, prompt=PROMPT).json()
    assert np.abs(ours - drawn_alone(site, "cup", tmp_path / "alone.png")).max() <= LEVELS
    assert np.abs(ours - stock_picture(site, "cup", tmp_path)).max() <= LEVELS
    assert np.abs(ours - pixels_of(bare["data"][0])).max() > 10 * LEVELS


def test_openais_client_and_keys(site: Site) -> None:
    with openai.OpenAI(base_url=f"{site.service.url}/v1", api_key=KEY, max_retries=0) as client:
        assert [model.id for model in client.models.list()][:2] == [site.settings.base, "beside-21"]
        answer = client.images.generate(model="cup", prompt=PROMPT, n=2, extra_body={"num_inference_steps": STEPS})
        pictures = [Image.open(io.BytesIO(base64.b64decode(one.b64_json or ""))) for one in answer.data or []]
        assert [picture.size for picture in pictures] == [(16, 16)] * 2
        with client.images.generate(model="cup", prompt=PROMPT, stream=True, partial_images=1) as stream:
            assert [event.type for event in stream][-1] == "image_generation.completed"
        with pytest.raises(openai.NotFoundError, match="no adapter 'cupp': did you mean cup"):
            client.images.generate(model="cupp", prompt=PROMPT)
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").images.generate(model="cup", prompt=PROMPT)
    assert site.http.post("/v1/adapters/cup/load").status_code == 403
    assert site.admin.post("/v1/adapters/nobody/load").status_code == 404
    refused = site.admin.post("/v1/adapters/cup/unpin")  # an engine's own words reach the client
    assert (refused.status_code, "is not pinned" in refused.json()["error"]["message"]) == (409, True)
    assert site.admin.post("/v1/adapters/cup/load").json()["result"]["tier"] == "slot"


def test_a_moved_alias_is_served_soon_and_fails_nobody(site: Site) -> None:
    first, second = site.publish("moving", 31), site.publish("moving", 32)
    site.registry.set_alias("moving", "live", first.revision)
    gallery = site.gallery(first, second)
    with Traffic(site, "moving@live") as traffic:
        time.sleep(1.0)
        site.registry.set_alias("moving", "live", second.revision)
        moved = time.monotonic()
        time.sleep(TTL_S + 2.0)
    traffic.check(gallery)
    assert {answer.json()["model"] for began, answer in traffic.answers if began < moved - 0.5} == {first.name}
    assert {answer.json()["model"] for began, answer in traffic.answers if began > moved + TTL_S + 1} == {second.name}


def test_a_deleted_adapter_is_gone_soon_and_what_is_drawn_is_finished(site: Site) -> None:
    manifest = site.publish("going", 41)
    with ThreadPoolExecutor(1) as pool:
        drawn = pool.submit(ask, site.http, "going", LONG)
        until(lambda: site.images("active"))
        site.registry.remove_alias("going", "latest")
        site.registry.delete("going", manifest.revision)
        until(lambda: ask(site.http, "going", STEPS).status_code == 404, TTL_S + 10)
        assert drawn.result().json()["model"] == manifest.name


def test_a_quarantined_revision_is_not_served(site: Site) -> None:
    first, second = site.publish("ill", 51), site.publish("ill", 52)
    site.registry.quarantine("ill", second.revision, "an operator's word")
    until(lambda: ask(site.http, "ill", STEPS).json()["model"] == first.name)
    assert "an operator's word" in ask(site.http, "ill", STEPS).json()["cat"]["note"]
    refused = ask(site.http, second.name, STEPS)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_quarantined")
    assert site.admin.post("/v1/adapters/ill/release").status_code == 200
    until(lambda: ask(site.http, "ill", STEPS).json()["model"] == second.name)


def test_a_probe_is_in_the_drift_history(site: Site) -> None:
    probed = site.admin.post("/v1/adapters/cup/probe")
    assert (probed.status_code, probed.json()["result"]["verdict"]) == (200, "ok"), probed.text
    drift = until(lambda: site.http.get("/v1/adapters/cup/drift").json()["history"])
    assert {(record["kind"], record["verdict"]) for record in drift} == {("canonical", "ok")}
    assert ask(site.http, "cup", STEPS).headers["x-cat-drift"] == "ok"


@pytest.mark.parametrize("stream", [False, True])
def test_images_end_when_their_client_goes(site: Site, stream: bool) -> None:
    body = {"model": "cup", "prompt": PROMPT, "n": 4, "num_inference_steps": LONG, "stream": stream, "progress": stream}
    with site.service.http(headers={"Authorization": f"Bearer {KEY}"}) as leaving:
        if stream:
            with leaving.stream("POST", PATH, json=body) as answer:
                lines = answer.iter_lines()  # kept, for the connection ends with it
                assert next(lines) == "event: image_generation.progress"
                assert site.images() == 4
        else:
            with pytest.raises(httpx2.TimeoutException):
                leaving.post(PATH, json=body, timeout=1.5)
    until(lambda: not site.images() + sum(one["rows"]["in_use"] for one in site.engines()), 2.0)
    held = [slot for one in site.engines() for slot in one["adapters"]["held"]]
    assert [slot for slot in held if slot["leases"]] == []


def test_an_adapter_has_an_engine_until_that_is_full(site: Site) -> None:
    names = [f"own-{n}" for n in range(10)]
    for seed, name in enumerate(names, 60):
        site.publish(name, seed)
        for _ in range(3):
            assert ask(site.http, name, STEPS).status_code == 200
    homes = {name: site.holders(name) for name in names}
    assert [len(pids) for pids in homes.values()] == [1] * 10, homes
    assert len({pids[0] for pids in homes.values()}) == 2, homes
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda seed: ask(site.http, names[0], 100, seed=seed), range(24)))
    assert {answer.status_code for answer in answers} == {200}
    assert len(site.holders(names[0])) == 2


def test_metrics_and_logs(site: Site) -> None:
    secret = f"secret{uuid.uuid4().hex[:8]}"
    assert ask(site.http, "cup", STEPS, prompt=secret).status_code == 200
    for n in range(3):
        assert site.http.get(f"/madeup{n}").status_code == 404
        assert ask(site.http, f"madeup{n}", STEPS).status_code == 404

    wanted = {"cat_http_requests_total", "cat_adapter_slots_used", "cat_serve_images_total"}

    def scraped() -> str | None:
        text = httpx2.get(site.service.metrics).text
        return text if {f"ray_{name}" for name in wanted} <= names_of(text) else None

    def names_of(text: str) -> set[str]:
        return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}

    ray, own = until(scraped, 60, 1.0), site.http.get("/metrics").text
    assert wanted <= names_of(own)
    families = [family.name for family in text_string_to_metric_families(own)]
    assert len(families) == len(set(families))
    assert "madeup" not in ray + own
    lines = [line for line in site.service.log().splitlines() if line.startswith("{")]
    told = [line for line in map(json.loads, lines) if line.get("route") == PATH and line["status"] == 200]
    assert {"request_id", "ms", "key", "model", "images"} <= told[-1].keys()
    assert secret not in site.service.log()
    assert KEY not in site.service.log()


def test_a_new_version_and_fewer_engines_lose_no_request(site: Site) -> None:
    manifest = site.publish("through", 91)
    gallery = site.gallery(manifest)
    before = {one["pid"] for one in site.engines()}
    changed = site.settings.model_copy(update={"load_timeout_s": 31.0})
    with Traffic(site, "through") as traffic:
        time.sleep(1.0)
        site.service.tell("deploy", deployment_of(changed, min_engines=1))
        time.sleep(1.0)
    traffic.check(gallery)
    (engine,) = site.await_engines(1)
    assert engine["pid"] not in before
