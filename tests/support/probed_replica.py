"""A replica for the prober's tests: the real pocket base, an adapter in a slot, and control of what can go wrong."""

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
from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.spec.job import ResolvedAdapter
from cat_cluster.spec.sections import EvaluationSpec, TrainingSpec
from cat_cluster.store import LocalStore, ObjectStore
from cat_cluster.telemetry import SERVING_METRICS, Metrics, PrometheusBackend
from serve.calls import ImageCall
from serve.probes.prober import OnAlarm, Prober
from serve.probes.records import ProbeRecord, read_history
from serve.probes.revision_monitor import DECOY_DRIFT, ProbeCall, score_images
from serve.settings import ProbeSettings
from tests.support.services import stack

TEMPLATES = tuple(f"a picture of a {{}} {place}" for place in (*world.PLACES, "in a house", "by a tree"))
EVALUATION = EvaluationSpec(prompts=list(TEMPLATES), images_per_prompt=1, steps=3)
NOON = 1_800_014_400.0  # a whole hour, UTC
OWN, OTHER = 1, 2
DECOY, DECOY_PAIRS = "xvk", (0, 1, 4)  # the pairs that were measured with a decoy

Picture = np.ndarray[Any, np.dtype[np.uint8]]


class ProbedEngine:
    """Generates with a bank whose first slot is the adapter, or what a fault put in its place; keeps the images."""

    def __init__(self, base: BaseModel) -> None:
        layers = adapted_layers(base.unet, "attention")
        self.base, self.bank = base, LoraBank.attach(base.unet, layers=layers)
        for slot in (OWN, OTHER):
            self.bank.load(slot, random_weights(base, slot))
        self.made: dict[ImageRow, Picture] = {}

    def pictures(self, calls: Sequence[ProbeCall], slot: int) -> list[Picture]:
        return [self.picture(call, 0 if manifest is None else slot) for call, manifest in calls]

    def picture(self, call: ImageCall, slot: int) -> Picture:
        row = ImageRow(call.prompt, call.seed, slot, call.steps, call.guidance)
        if row not in self.made:
            (image,) = generate(self.base, self.bank, [row]).mul(255.0).round().to(torch.uint8)
            self.made[row] = image.permute(1, 2, 0).numpy()
        return self.made[row]


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
    scores: dict[str, list[float]] = {name: [] for name in (*SCORES, DECOY_DRIFT)}
    for i, template in enumerate(TEMPLATES):
        y = ImageCall("", fill(template, "cup", None), seed=EVALUATION.seed + i, steps=EVALUATION.steps, guidance=4.0)
        base_alone, without_token = engine.picture(y, 0), engine.picture(y, OWN)
        with_token = engine.picture(replace(y, prompt=fill(template, "cup", "sks")), OWN)
        images = [with_token, without_token, base_alone]
        if i in DECOY_PAIRS:
            decoy = replace(y, prompt=fill(template, "cup", DECOY))
            images += [engine.picture(decoy, OWN), engine.picture(decoy, 0)]
        for name, value in score_images(judge, photos, images)[0].items():
            scores[name].append(value)
    decoys = {"word": DECOY, "pairs": list(DECOY_PAIRS), "drift": scores.pop(DECOY_DRIFT)}
    return {
        "judge": {"name": judge.name, "digest": judge.digest},
        "concepts": {"sks": {"photos": photos.tolist(), **scores, "decoy": decoys}},
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
    """A store that is away while `away` is set, and records what it was asked to list."""

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
class ProbedReplica:
    """A replica: its prober, and control of its engine, its store, its clock and its alarms."""

    engine: ProbedEngine
    judge: Judge
    store: Any
    manifest: Manifest
    slots: list[int] = field(default_factory=list)  # of the next probes; OWN when empty
    spoil: Callable[[list[Picture]], list[Picture]] = list
    probes_generated: int = 0
    asked: list[ProbeCall] = field(default_factory=list)
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
            self.generate,
            ProbeSettings(**{"live_share": 1.0, **settings}),
            Metrics(self.backend, SERVING_METRICS),
            replica=replica,
            on_alarm=on_alarm or alarm,
            judges=lambda name, base: self.judge,
            clock=lambda: self.now,
            rng=random.Random(0),
        )

    async def generate(self, calls: Sequence[ProbeCall]) -> list[Picture]:
        self.probes_generated += 1
        self.asked = list(calls)
        return self.spoil(self.engine.pictures(calls, self.slots.pop(0) if self.slots else OWN))

    def value(self, name: str, **labels: str) -> float | None:
        return self.backend.registry.get_sample_value(name, labels)

    def history(self, hours: float = 1.0) -> list[ProbeRecord]:
        return read_history(self.store, "cup", self.manifest.revision, hours, now=self.now)


def call(prompt: str = "a photo of a sks cup at night", **changes: Any) -> ImageCall:
    return ImageCall(**{"request_id": "1", "prompt": prompt, "adapters": stack("cup"), "steps": 3, **changes})


def user_image(replica: ProbedReplica, image_call: ImageCall, slot: int = OWN) -> Picture:
    return replica.engine.picture(image_call, slot)
