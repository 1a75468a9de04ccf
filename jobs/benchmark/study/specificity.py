"""Token specificity: what an adapter does with its own token, another's, an odd word and none, alone and in a stack.

The shares of decoy rows are compared on concepts that the study does not use, so that a share chosen here is not
judged on what it was chosen by. The base alone is what a gate would give that leaves an adapter out of prompts without
its token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from cat_cluster.cli.demo import PHOTOS, draw_photos
from cat_cluster.cli.job_bars import JobBars
from cat_cluster.errors import CatClusterError
from cat_cluster.evaluation.judges import POCKET_CLASSIFIER, Judge, feature_rows, load_judges
from cat_cluster.evaluation.metrics import base_drift, identity_gain
from cat_cluster.evaluation.prompts import DECOYS, POCKET_TEMPLATES, fill
from cat_cluster.evaluation.recognition import RecognitionHead, fit_head
from cat_cluster.files import write_whole
from cat_cluster.lora.bank import LoraBank
from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.lora.stacks import stack_weights
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.generate import ImageRow, generate, image_array
from cat_cluster.models.pocket import world
from cat_cluster.pipeline.job import run_job
from cat_cluster.registry import Registry
from cat_cluster.settings import Settings
from cat_cluster.spec.job import JobSpec
from cat_cluster.store import open_store
from jobs.benchmark.record import Start, training_digest, write_result
from jobs.benchmark.study.trials import TaughtConcept

SHARES = (0.0, 0.25, 0.5)
TOKENS = {
    "striped-cup": "sks",
    "clown-fish": "zwx",
    "checked-house": "ohwx",
    "banded-car": "qrv",
    "blossom-tree": "vtk",
    "banded-star": "hnf",
}
TRIGGERS = ("own", "other", "decoy", "none")
STEPS, GUIDANCE, FIRST_SEED = 20, 4.0, 1000
Images = NDArray[np.uint8]
Drawn = Mapping[tuple[str, str], Images]  # (concept, trigger) -> [N, H, W, 3]


def run(
    start: Start,
    folder: Path,
    console: Console,
    *,
    steps: int,
    concepts: int,
    images: int,
    shares: Sequence[float] = SHARES,
) -> Path:
    """Train `concepts` adapters for `steps` steps at each share of decoys, measure each and their stack.

    images: per prompt and trigger. A share that was measured before is read back from `folder`. Raises
    CatClusterError when an adapter fails.
    """
    taught = tuple(
        TaughtConcept(name, token, world.CONCEPTS[name].object) for name, token in list(TOKENS.items())[:concepts]
    )
    setting = {"steps": steps, "concepts": [asdict(one) for one in taught], "images_per_prompt": images}
    place = folder / training_digest([setting, TRIGGERS, DECOYS, STEPS, GUIDANCE, FIRST_SEED, PHOTOS])
    bench = Bench(load_base_model("pocket"), taught, images)
    measured: dict[str, Any] = {}
    for name, share in [("base", None), *((f"{share:g}", share) for share in shares)]:
        path = place / "measured" / f"{name}.json"
        if not path.exists():
            if share is None:
                found = {"base": bench.scores(bench.base_images)}
            else:
                found = bench.measure(_train(place, taught, steps, share, bench.base, console))
            write_whole(path, json.dumps({"start": asdict(start), **found}).encode())
            console.print(f"measured {name}")
        measured[name] = json.loads(path.read_text(encoding="utf-8"))
    result = {
        "training": {"steps": steps},
        "images": images * len(POCKET_TEMPLATES),
        "concepts": {one.name: one.token for one in taught},
        "decoys": list(DECOYS),
        "base": measured.pop("base"),
        "shares": measured,
    }
    return write_result("specificity", result, start)


def means(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the scores of concepts as their mean over them, in the form that one concept's have."""

    def mean(values: Sequence[Any]) -> Any:
        if isinstance(values[0], Mapping):
            return {key: mean([value[key] for value in values]) for key in values[0]}
        return float(np.mean(values))

    averaged: dict[str, Any] = mean(list(scores.values()))
    return averaged


@dataclass(frozen=True, eq=False)
class Bench:
    """What all shares are measured with: the base, the concepts, and `images` of each prompt and trigger."""

    base: BaseModel
    taught: Sequence[TaughtConcept]
    images: int
    _heads: dict[str, RecognitionHead] = field(default_factory=dict)

    def prompts(self, concept: TaughtConcept, trigger: str) -> list[str]:
        """Return the prompt of each image: with the concept's token, the next concept's, odd words in turn, or none."""
        place = list(self.taught).index(concept)
        templates = [template for template in POCKET_TEMPLATES for _ in range(self.images)]
        next_token = self.taught[(place + 1) % len(self.taught)].token
        words: dict[str, Sequence[str]] = {"own": (concept.token,), "other": (next_token,), "decoy": DECOYS}
        found = [words[trigger][i % len(words[trigger])] if trigger in words else None for i in range(len(templates))]
        return [fill(template, concept.class_noun, word) for template, word in zip(templates, found, strict=True)]

    def measure(self, adapters: Mapping[str, AdapterWeights]) -> dict[str, Any]:
        """Return the scores of each concept with its adapter alone, and with a stack of all adapters."""
        each = [adapters[concept.name] for concept in self.taught]
        together = stack_weights([(weights, 1.0) for weights in each])
        bank = LoraBank.attach(self.base.unet, slots=len(each) + 1, rank=together.rank, layers=list(together.layers))
        try:
            for slot, weights in enumerate([*each, together], start=1):
                bank.load(slot, weights)
            alone = self._draw(bank, {concept.name: slot for slot, concept in enumerate(self.taught, start=1)})
            stacked = self._draw(bank, dict.fromkeys((concept.name for concept in self.taught), len(each) + 1))
        finally:
            bank.detach()
        return {"alone": self.scores(alone), "stack": self.scores(stacked)}

    def scores(self, drawn: Drawn) -> dict[str, Any]:
        """Return concept -> {recognised: trigger -> share, judges: judge -> {gain: trigger -> gain, base_drift}}."""
        return {concept.name: self._scores(concept, drawn) for concept in self.taught}

    @cached_property
    def base_images(self) -> Drawn:
        """What the base alone draws of every prompt."""
        return self._draw(None, dict.fromkeys((concept.name for concept in self.taught), 0))

    @cached_property
    def _judges(self) -> tuple[Judge, ...]:
        return load_judges("auto", self.base)

    def _scores(self, concept: TaughtConcept, drawn: Drawn) -> dict[str, Any]:
        photos = np.stack([photo for photo, _ in world.photos(world.CONCEPTS[concept.name], PHOTOS, seed=0)])
        judges = {}
        for judge in self._judges:
            shown = feature_rows(judge, photos)
            own, base = (
                {trigger: feature_rows(judge, images[concept.name, trigger]) for trigger in TRIGGERS}
                for images in (drawn, self.base_images)
            )
            judges[judge.name] = {
                "gain": {trigger: identity_gain(own[trigger], base[trigger], shown) for trigger in TRIGGERS},
                "base_drift": base_drift(base["none"], own["none"]),
            }
        head = self._head(concept)
        recognised = {trigger: head.rate(drawn[concept.name, trigger]) for trigger in TRIGGERS}
        return {"recognised": recognised, "judges": judges}

    def _head(self, concept: TaughtConcept) -> RecognitionHead:
        if concept.name not in self._heads:
            judge = next(judge for judge in self._judges if judge.name == POCKET_CLASSIFIER)
            self._heads[concept.name] = fit_head(world.CONCEPTS[concept.name], judge, self.base, seed=FIRST_SEED)
        return self._heads[concept.name]

    def _draw(self, bank: LoraBank | None, slots: Mapping[str, int]) -> Drawn:
        cells = {(one.name, trigger): self.prompts(one, trigger) for one in self.taught for trigger in TRIGGERS}
        rows = [
            ImageRow(prompt, FIRST_SEED + i, slots[name], STEPS, GUIDANCE)
            for (name, _), prompts in cells.items()
            for i, prompt in enumerate(prompts)
        ]
        images = image_array(generate(self.base, bank, rows))
        return dict(zip(cells, np.split(images, len(cells)), strict=True))


def _train(
    place: Path, taught: Sequence[TaughtConcept], steps: int, share: float, base: BaseModel, console: Console
) -> dict[str, AdapterWeights]:
    """Train an adapter of each concept; concept -> weights. Those of an earlier call are read back."""
    adapters = []
    for concept in taught:
        photos = place / "photos" / concept.name
        draw_photos(photos, world.CONCEPTS[concept.name], concept.token)
        described = {"token": concept.token, "class_noun": concept.class_noun, "images": str(photos)}
        adapters.append({"id": concept.name, "concepts": [described]})
    job = JobSpec.model_validate(
        {
            "name": place.parent.name,
            "adapters": adapters,
            "training": {"steps": steps, "decoy_fraction": share},
            "evaluation": {"enabled": False},
            "cluster": {"max_pack": len(taught), "checkpoint_every": 200},
        }
    )
    store = open_store(place / "registry")
    with JobBars(console) as bars:
        results = run_job(job, store, Settings(), bars)
    found = {}
    for result in results:
        if result.manifest is None:
            raise CatClusterError(f"{result.adapter_id} failed: {result.reason}")
        found[result.adapter_id] = Registry(store).load_weights(
            result.manifest, base_fingerprint=base.fingerprint, unet=base.unet
        )
    return found
