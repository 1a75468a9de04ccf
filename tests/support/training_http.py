"""Training over HTTP in tests: a service on a real folder store, and zips of photos to send it."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
from PIL import Image

from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore, ObjectStore
from serve.http.access import Access
from serve.http.training.photo_process import PhotoProcess
from serve.settings import ServeSettings
from tests.support.ingress_server import Live, ScriptedEngine, listening, only

FILES, JOBS, RUNS = "/v1/files", "/v1/fine_tuning/jobs", "/v1/runs"
PHOTOS = PhotoProcess(60.0)
KEYS = {"CAT_API_KEYS": "ann,bob", "CAT_ADMIN_KEYS": "master"}


def photo_bytes(seed: int = 0, side: int = 40, kind: str = "png") -> bytes:
    """A photo of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    kept = io.BytesIO()
    Image.fromarray(pixels).save(kept, kind)
    return kept.getvalue()


def zip_of(members: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of these files."""
    kept = io.BytesIO()
    with zipfile.ZipFile(kept, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return kept.getvalue()


def photos_zip(count: int = 3, seed: int = 0, **more: bytes) -> bytes:
    """A zip of photos; more: other members, `__` in their names stands for a dot."""
    photos = {f"{number}.png": photo_bytes(seed + number) for number in range(count)}
    return zip_of({**photos, **{name.replace("__", "."): content for name, content in more.items()}})


@contextmanager
def training_service(
    store: ObjectStore | Path, keys: Mapping[str, str] | None = None, **options: Any
) -> Iterator[Live]:
    """A service without an engine that takes training; all of a test process share one process for photos."""
    settings = ServeSettings(base="base", **options)
    access = Access.from_environment(settings, keys or {})
    opened = store if not isinstance(store, Path) else LocalStore(store)
    with listening(only(ScriptedEngine()), Registry(opened), settings, access) as live:
        live.app.state.ingress.training.photos = PHOTOS
        yield live


@contextmanager
def client_of(live: Live, key: str = "any") -> Iterator[openai.OpenAI]:
    """OpenAI's client as a caller has it."""
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0) as client:
        yield client


def send(http: httpx2.Client, content: bytes, name: str = "photos.zip", **fields: Any) -> httpx2.Response:
    """Upload photos as a form."""
    return http.post(FILES, data={"purpose": "fine-tune", **fields}, files={"file": (name, content)})


def job_fields(file_id: str, suffix: str = "my-cup", **changes: Any) -> dict[str, Any]:
    """A job that is right, with other fields where they are given."""
    fields = {"model": "base", "training_file": file_id, "suffix": suffix, "token": "sks", "class_noun": "cup"}
    return {**fields, **changes}
