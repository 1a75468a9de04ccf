"""A service whose last engine ends when nobody asks, on real Ray Serve: a request starts one, and questions do not."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cat_cluster.models.base_model import load_base_model
from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore
from serve.settings import ProbeSettings, ServeSettings
from tests.support.ingress_server import picture
from tests.support.serving import ask, deployment_of, pixels_of, publish_random, served, until

# A minute and a half of it is waiting: the law itself is held by quick tests too (tests/unit/serve/test_app.py).
pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(600)]

SLEEP_S = 60.0


def test_a_request_that_finds_no_engine_waits_for_one(tiny_base_folder: Path, tmp_path: Path) -> None:
    registry = Registry(LocalStore(tmp_path / "storage"))
    manifest = publish_random(registry, load_base_model(str(tiny_base_folder)), "cup", 1)
    settings = ServeSettings(
        base=str(tiny_base_folder),
        storage=str(tmp_path / "storage"),
        device="cpu",
        threads=1,
        probes=ProbeSettings(enabled=False),
    )
    with served(deployment_of(settings, min_engines=0, sleep_after_s=SLEEP_S)) as service, service.http() as http:

        def engines() -> int:
            return int(service.tell("states").get("Engine", {}).get("RUNNING", 0))

        assert engines() == 1, "the deployment starts one, to see that it can"
        awake = ask(http, "cup", 4)
        assert awake.status_code == 200, awake.text
        until(lambda: engines() == 0, SLEEP_S + 120, pause=1.0)

        # Nobody asks for an image: the service is well, and stays without an engine.
        assert http.get("/ready").status_code == 200
        assert http.get("/v1/status").json()["engines"] == 0
        metrics = http.get("/metrics")
        assert metrics.status_code == 200
        assert "cat_http_requests_total" in metrics.text
        assert http.post("/v1/adapters/cup/load").json()["error"]["code"] == "engine_stopped"
        time.sleep(10)
        assert engines() == 0

        # A request for an image waits for an engine, and so does an edit, whose ingress knows no size yet.
        form = {"model": "cup", "prompt": "a photo of a cup", "num_inference_steps": "4"}
        with ThreadPoolExecutor(1) as pool:
            files = {"image": ("photo.png", picture())}
            editing = pool.submit(http.post, "/v1/images/edits", data=form, files=files)
            woken, edited = ask(http, "cup", 4), editing.result()
        assert woken.status_code == 200, woken.text
        assert woken.json()["model"] == awake.json()["model"] == manifest.name
        assert (pixels_of(woken.json()["data"][0]) == pixels_of(awake.json()["data"][0])).all()
        assert edited.status_code == 200, edited.text
        assert engines() == 1
