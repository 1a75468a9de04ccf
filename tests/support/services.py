"""A service in this process, on a real registry of random adapters."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cat_cluster.models.base_model import BaseModel
from cat_cluster.registry import AdapterDraft, Manifest, Registry
from cat_cluster.registry.stacks import StackMember, parse_member
from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.spec.job import ResolvedAdapter
from cat_cluster.spec.sections import EvaluationSpec, TrainingSpec
from cat_cluster.telemetry import SERVING_METRICS, Metrics, PrometheusBackend
from serve.calls import Event, Failed, Finished, ImageCall
from serve.service import Service
from serve.settings import ProbeSettings, ServeSettings
from tests.support.denoised_images import random_adapter

LEVELS = 1  # of 255: PNGs are 8-bit, so a pixel may round to the neighbouring level


def stack(*members: str) -> tuple[StackMember, ...]:
    """The adapters of a call, each as `cup` or `cup@prod:0.7`."""
    return tuple(parse_member(member) for member in members)


CUP = ImageCall("request-1", "a photo of a sks cup", stack("cup"), seed=11, steps=4)


Pixels = NDArray[np.int16]


@dataclass
class Shop:
    """A base folder and a registry of adapters for it."""

    folder: Path
    base: BaseModel
    registry: Registry

    def publish(self, adapter_id: str, seed: int, **changes: Any) -> Manifest:
        weights = random_adapter(self.base, seed)
        factor, token = changes.pop("factor", 1.0), changes.pop("token", "sks")
        for layer in weights.layers.values():
            layer.up.mul_(factor)
        resolved = ResolvedAdapter(
            id=adapter_id,
            base=str(self.folder),
            method="cat",
            concepts=(ConceptSpec(token=token, class_noun="cup", images="photos"),),
            training=TrainingSpec(rank=3, seed=seed),
            evaluation=EvaluationSpec(),
        )
        fields: dict[str, Any] = {
            "adapter_id": adapter_id,
            "resolved": resolved,
            "base_name": str(self.folder),
            "base_fingerprint": self.base.fingerprint,
            "image_digests": ["1" * 64],
            "weights": weights,
            "training": {},
        }
        return self.registry.publish(AdapterDraft(**{**fields, **changes}))


@asynccontextmanager
async def open_service(shop: Shop, **settings: Any) -> AsyncIterator[Service]:
    chosen = {"max_rows": 8, "slots": 2, "max_rank": 4, "probes": ProbeSettings(enabled=False), **settings}
    storage = shop.registry.store.url
    document = ServeSettings(base=str(shop.folder), storage=storage, device="cpu", threads=1, **chosen)
    backend = PrometheusBackend()
    service = Service.open(document, Metrics(backend, SERVING_METRICS))
    service.exposition = backend.exposition
    async with service:
        yield service
        await until(lambda: leased(service) == 0 and service._in_flight == 0, service)


async def until(condition: Callable[[], bool], what: object = None) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.002)


def leased(service: Service) -> int:
    return sum(slot["leases"] for slot in service._parts.cache.status()["held"])


async def events(service: Service, call: ImageCall) -> list[Event]:
    async with asyncio.timeout(60):
        return [event async for event in service.generate(call)]


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        await main()

    asyncio.run(whole())


def pixels(png: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(png)), dtype=np.int16)


def pictures(found: list[Event]) -> list[Pixels]:
    assert not [event for event in found if isinstance(event, Failed)], found
    finished = sorted((event for event in found if isinstance(event, Finished)), key=lambda event: event.index)
    return [pixels(event.image) for event in finished]


def stock_picture(pipeline: Any, call: ImageCall, index: int = 0) -> Any:
    """What a stock pipeline, with whatever adapters it carries, draws for image `index` of a call."""
    width, height = call.size or (16, 16)
    return pipeline(
        call.prompt,
        negative_prompt=call.negative_prompt or None,
        width=width,
        height=height,
        num_inference_steps=call.steps,
        guidance_scale=call.guidance,
        generator=torch.Generator("cpu").manual_seed(call.seed + index),
    ).images[0]


def failure_of(found: list[Event]) -> Failed:
    assert isinstance(found[-1], Failed), found
    assert not [event for event in found if isinstance(event, Finished)]
    return found[-1]
