"""A replica for the prober's tests: the real pocket base, an adapter in a slot, and a hand on all that can go wrong."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cat_cluster.errors import StoreError
from cat_cluster.evaluation.drift import SCORES
from cat_cluster.evaluation.judges import Judge, feature_rows
from cat_cluster.evaluation.prompts import fill
from cat_cluster.lora.bank import LoraBank, adapted_layers
from cat_cluster.lora.formats import AdapterWeights, LoraLayer
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.generate import ImageRow, generate
from cat_cluster.models.pocket import world
from cat_cluster.registry import AdapterDraft, Manifest, Registry
from cat_cluster.spec.job import ConceptSpec, ResolvedAdapter
from cat_cluster.spec.sections import EvaluationSpec, TrainingSpec
from cat_cluster.store import LocalStore, ObjectStore
from cat_cluster.telemetry import SERVING_METRICS, Metrics, PrometheusBackend
from serve.calls import ImageCall
from serve.probes.prober import OnAlarm, Prober
from serve.probes.records import ProbeRecord, read_history
from serve.probes.revision_monitor import ProbeImage, score_images
from serve.settings import ProbeSettings

TEMPLATES = tuple(f"a picture of a {{}} {place}" for place in (*world.PLACES, "in a house", "by a tree"))
EVALUATION = EvaluationSpec(prompts=list(TEMPLATES), images_per_prompt=1, steps=3)
NOON = 1_800_014_400.0  # a whole hour, UTC
OWN, OTHER = 1, 2

Picture = np.ndarray[Any, np.dtype[np.uint8]]


class ProbedEngine:
    """Draws with a bank whose first slot is the adapter, or what a fault put in its place; keeps what it drew."""

    def __init__(self, base: BaseModel) -> None:
        layers = adapted_layers(base.unet, "attention")
        self.base, self.bank = base, LoraBank.attach(base.unet, slots=2, rank=2, layers=layers)
        for slot in (OWN, OTHER):
            self.bank.load(slot, random_weights(base, slot))
        self.drawn: dict[ImageRow, Picture] = {}

    def pictures(self, images: Sequence[ProbeImage], slot: int) -> list[Picture]:
        rows = [
            ImageRow(image.prompt, image.seed, 0 if image.adapter is None else slot, image.steps, image.guidance)
            for image in images
        ]
        missing = [row for row in dict.fromkeys(rows) if row not in self.drawn]
        if missing:
            made = generate(self.base, self.bank, missing).mul(255.0).round().to(torch.uint8)
            self.drawn |= zip(missing, made.permute(0, 2, 3, 1).numpy(), strict=True)
        return [self.drawn[row] for row in rows]


def random_weights(base: BaseModel, seed: int) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    modules = dict(base.unet.named_modules())

    def layer(name: str) -> LoraLayer:
        linear = modules[name]
        sides = (2, linear.in_features), (linear.out_features, 2)
        down, up = (torch.randn(side, generator=generator) * 0.12 for side in sides)
        return LoraLayer(down, up)

    return AdapterWeights({name: layer(name) for name in adapted_layers(base.unet, "attention")})


def measured_reference(engine: ProbedEngine, judge: Judge) -> dict[str, Any]:
    """What the evaluation of the adapter in slot OWN would have recorded."""
    design = world.CONCEPTS["striped-cup"]
    photos = feature_rows(judge, np.stack([photo for photo, _ in world.photos(design, 3, seed=0)]))
    scores: dict[str, list[float]] = {name: [] for name in SCORES}
    for i, template in enumerate(TEMPLATES):
        y = ProbeImage(fill(template, "cup", None), None, EVALUATION.seed + i, EVALUATION.steps, 4.0, "ddim")
        (bare,), (without,) = engine.pictures([y], 0), engine.pictures([replace(y, adapter=Any)], OWN)
        with_token = engine.pictures([replace(y, prompt=fill(template, "cup", "sks"), adapter=Any)], OWN)[0]
        for name, value in score_images(judge, photos, [with_token, without, bare])[0].items():
            scores[name].append(value)
    return {
        "judge": {"name": judge.name, "digest": judge.digest},
        "concepts": {"sks": {"photos": photos.tolist(), **scores}},
    }


def publish(
    store: ObjectStore, engine: ProbedEngine, reference: dict[str, Any] | None, adapter_id: str = "cup"
) -> Manifest:
    resolved = ResolvedAdapter(
        id=adapter_id,
        base="pocket",
        method="cat",
        concepts=(ConceptSpec(token="sks", class_noun="cup", images="photos"),),
        training=TrainingSpec(rank=2),
        evaluation=EVALUATION,
    )
    draft = AdapterDraft(
        adapter_id=adapter_id,
        resolved=resolved,
        base_name="pocket",
        base_fingerprint=engine.base.fingerprint,
        image_digests=["1" * 64],
        weights=random_weights(engine.base, OWN),
        training={},
        reference=reference,
    )
    return Registry(store).publish(draft)


class FailingStore(LocalStore):
    """A store that is away while `away` says so, and tells what it was asked to list."""

    away = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.listed: list[str] = []

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        if self.away:
            raise StoreError("the store is away")
        super().put(key, data, if_absent=if_absent)

    def get(self, key: str) -> bytes:
        if self.away:
            raise StoreError("the store is away")
        return super().get(key)

    def list(self, prefix: str) -> Any:
        self.listed.append(prefix)
        return super().list(prefix)


@dataclass
class Bench:
    """A replica: its prober, and hands on its engine, its store, its clock and its alarms."""

    engine: ProbedEngine
    judge: Judge
    store: Any
    manifest: Manifest
    slots: list[int] = field(default_factory=list)  # of the next draws; OWN when empty
    spoil: Callable[[list[Picture]], list[Picture]] = list
    draws: int = 0
    asked: list[ProbeImage] = field(default_factory=list)
    now: float = NOON
    alarms: list[str] = field(default_factory=list)
    backend: PrometheusBackend = field(default_factory=PrometheusBackend)

    def prober(self, *, replica: str = "a", on_alarm: OnAlarm | None = None, **settings: Any) -> Prober:
        async def alarm(manifest: Manifest, reason: str) -> None:
            self.alarms.append(f"{manifest.name}: {reason}")

        self.backend = PrometheusBackend()
        return Prober(
            Registry(self.store),
            self.engine.base,
            self.draw,
            ProbeSettings(**{"live_share": 1.0, **settings}),
            Metrics(self.backend, SERVING_METRICS),
            replica=replica,
            on_alarm=on_alarm or alarm,
            judges=lambda name, base: self.judge,
            clock=lambda: self.now,
            rng=random.Random(0),
        )

    async def draw(self, images: Sequence[ProbeImage]) -> list[Picture]:
        self.draws += 1
        self.asked = list(images)
        return self.spoil(self.engine.pictures(images, self.slots.pop(0) if self.slots else OWN))

    def value(self, name: str, **labels: str) -> float | None:
        return self.backend.registry.get_sample_value(name, labels)

    def history(self, hours: float = 1.0) -> list[ProbeRecord]:
        return read_history(self.store, "cup", self.manifest.revision, hours, now=self.now)


def call(prompt: str = "a photo of a sks cup at night", **changes: Any) -> ImageCall:
    return ImageCall(**{"request_id": "1", "prompt": prompt, "model": "cup", "steps": 3, **changes})


def user_image(bench: Bench, image_call: ImageCall, slot: int = OWN) -> Picture:
    wanted = ProbeImage(image_call.prompt, bench.manifest, image_call.seed, image_call.steps, 4.0, "ddim")
    return bench.engine.pictures([wanted], slot)[0]
