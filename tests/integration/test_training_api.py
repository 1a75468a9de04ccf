"""Photos that OpenAI's client sends become an adapter that the service draws with; it is trained on a real Ray."""

from __future__ import annotations

import base64
import io
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore
from cat_cluster.telemetry import SERVING_METRICS, Metrics, PrometheusBackend
from serve.calls import EngineClient
from serve.http.access import Access
from serve.service import Service
from serve.settings import ProbeSettings, ServeSettings
from tests.support.ingress_server import listening
from tests.support.tiny_jobs import start_process
from tests.support.training_http import KEYS, client_of, photos_zip

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

STEPS = 12


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """A folder for Ray, not one of pytest's: the paths of its sockets must stay under 108 characters."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_photos_sent_by_openais_client_become_a_model(tmp_path: Path, tiny_base_folder: Path, ray_folder: Path) -> None:
    store, base = LocalStore(tmp_path / "store"), str(tiny_base_folder)
    settings = ServeSettings(
        base=base, storage=store.url, device="cpu", threads=1, alias_ttl_s=0, probes=ProbeSettings(enabled=False)
    )

    @asynccontextmanager
    async def opened() -> AsyncIterator[EngineClient]:
        async with Service.open(settings, Metrics(PrometheusBackend(), SERVING_METRICS)) as service:
            yield service

    trainer = start_process("train-service", "--storage", store.url, "--base", base, RAY_TMPDIR=str(ray_folder))
    try:
        access = Access.from_environment(settings, KEYS)
        with listening(opened(), Registry(store), settings, access) as live, client_of(live, "ann") as client:
            file = client.files.create(file=("cups.zip", photos_zip(2)), purpose="fine-tune")
            job = client.fine_tuning.jobs.create(
                model=base,
                training_file=file.id,
                suffix="my-cup",
                method={"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 2}}},
                extra_body={
                    "token": "sks",
                    "class_noun": "cup",
                    "steps": STEPS,
                    "rank": 2,
                    "learning_rate": 0.02,
                    "evaluation": {"enabled": False},
                },
            )
            assert job.status in ("queued", "validating_files")
            with live.http(headers={"authorization": "Bearer ann"}) as http:
                events = http.get(f"/v1/fine_tuning/jobs/{job.id}/events?stream=true", timeout=200).text
            assert events.endswith("data: [DONE]\n\n")
            job = client.fine_tuning.jobs.retrieve(job.id)
            assert (job.status, job.error) == ("succeeded", None)
            assert job.fine_tuned_model is not None
            assert f"Published {job.fine_tuned_model}" in events
            told = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
            assert told[0] == "Done"
            assert told[-1] == f"Created {job.id}"
            assert any("began with it" in message for message in told)
            (point,) = client.fine_tuning.jobs.checkpoints.list(job.id)
            assert (point.fine_tuned_model_checkpoint, point.step_number) == (job.fine_tuned_model, STEPS)

            def draw(model: str) -> bytes:
                answer: Any = client.images.generate(
                    model=model, prompt="a photo of a sks cup", extra_body={"seed": 3, "num_inference_steps": 2}
                )
                pixels = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
                return pixels.tobytes()

            deadline = time.monotonic() + 20
            while "my-cup" not in [model.id for model in client.models.list()]:
                assert time.monotonic() < deadline, "the list is some seconds old"
                time.sleep(0.5)
            assert draw(job.fine_tuned_model) == draw("my-cup") != draw(base)
            assert client.files.delete(file.id).deleted
    finally:
        trainer.terminate()
        _, said = trainer.communicate(timeout=60)
    assert trainer.returncode == 0, said
    assert "Traceback" not in said
