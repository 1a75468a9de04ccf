"""What adapters do with a word before the class noun: their own token, another's, both, an odd word, and none.

An image carries some adapters, one or a stack; the same prompts and seeds are drawn with each. The base alone is what
a gate gives that leaves an adapter out of prompts without its token.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cat_cluster.cli.demo import PHOTOS
from cat_cluster.evaluation.judges import POCKET_CLASSIFIER, Judge, feature_rows, load_judges, text_rows
from cat_cluster.evaluation.metrics import base_drift, identity_gain
from cat_cluster.evaluation.prompts import DECOYS, POCKET_TEMPLATES, fill
from cat_cluster.evaluation.recognition import RecognitionHead, fit_head
from cat_cluster.lora.bank import LoraBank
from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.lora.stacks import stack_weights
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.generate import ImageRow, generate, image_array
from cat_cluster.models.pocket import world
from cat_cluster.models.subjects import DrawnSubject
from cat_cluster.spec.choices import SamplerName
from jobs.benchmark.study.compare import share_followed
from jobs.benchmark.study.trials import TaughtConcept

TRIGGERS = ("own", "other", "both", "decoy", "none")
STEPS, GUIDANCE, FIRST_SEED = 20, 4.0, 1000
SAMPLER: SamplerName = "ddim"
Images = NDArray[np.uint8]
Carried = tuple[str, ...]  # names of adapters; none is the base
Cell = tuple[str, str, Carried]  # concept, trigger, and the adapters that its images carry
Arrangement = Mapping[tuple[str, str], Carried]  # (concept, trigger) -> what its images carry
BASE: Carried = ()


@dataclass(frozen=True, eq=False)
class Bench:
    """The base and an even number of concepts: two and two are each other's "other token".

    images: of each template and trigger; there are six templates. first_seed: of the images. steps, sampler: how each
    is drawn.
    """

    base: BaseModel
    taught: Sequence[TaughtConcept]
    images: int
    first_seed: int = FIRST_SEED
    steps: int = STEPS
    sampler: SamplerName = SAMPLER
    _heads: dict[str, RecognitionHead] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.taught) % 2:
            raise ValueError(f"{len(self.taught)} concepts are not pairs")

    def words(self, concept: TaughtConcept, trigger: str) -> Sequence[str | None]:
        """Return what stands before the class noun, in turn: both is the concept's token and the other's."""
        other = self.taught[list(self.taught).index(concept) ^ 1].token
        words: Mapping[str, Sequence[str | None]] = {
            "own": (concept.token,),
            "other": (other,),
            "both": (f"{concept.token} {other}",),
            "decoy": DECOYS,
            "none": (None,),
        }
        return words[trigger]

    def prompts(self, concept: TaughtConcept, trigger: str) -> list[str]:
        """Return the prompt of each image."""
        templates = [template for template in POCKET_TEMPLATES for _ in range(self.images)]
        words = self.words(concept, trigger)
        return [fill(template, concept.class_noun, words[i % len(words)]) for i, template in enumerate(templates)]

    def draw(self, adapters: Mapping[str, AdapterWeights], cells: Collection[Cell]) -> dict[Cell, Images]:
        """Draw the images [N, H, W, 3] of each cell; those without an adapter are drawn once in the bench's life."""
        found = {cell: self._of_base[cell[:2]] for cell in cells if cell[2] == BASE}
        wanted = [cell for cell in cells if cell[2] != BASE]
        stacks = {names: stack_weights([(adapters[name], 1.0) for name in names]) for names in {c[2] for c in wanted}}
        # A bank pads to its largest rank: the adapters alone would pay for the largest stack.
        for rank in sorted({weights.rank for weights in stacks.values()}):
            alike = {names: weights for names, weights in stacks.items() if weights.rank == rank}
            found |= self._drawn_of_rank(alike, [cell for cell in wanted if cell[2] in alike])
        return found

    def measure(
        self, adapters: Mapping[str, AdapterWeights], plan: Mapping[str, Arrangement]
    ) -> dict[str, dict[str, Any]]:
        """Return arrangement -> concept -> scores; what several arrangements share is drawn once."""
        cells = dict.fromkeys((*key, carried) for own in plan.values() for key, carried in own.items())
        drawn = self.draw(adapters, cells)
        return {
            name: {
                concept.name: self.scores(
                    concept,
                    {trigger: drawn[concept.name, trigger, own[concept.name, trigger]] for trigger in TRIGGERS},
                )
                for concept in self.taught
            }
            for name, own in plan.items()
        }

    def scores(self, concept: TaughtConcept, images: Mapping[str, Images]) -> dict[str, Any]:
        """Return the scores of trigger -> images of a concept, as JSON.

        recognised: trigger -> the share called the concept. judges: name -> {gain: trigger -> identity gain over the
        base's images, base_drift, followed: the share of images with the own token that are nearer to the rest of
        their prompt than to that of another; None for a judge that cannot read}.
        """
        photos = np.stack([photo for photo, _ in world.photos(world.CONCEPTS[concept.name], PHOTOS, seed=0)])
        judges = {}
        for judge in self._judges:
            shown, texts = feature_rows(judge, photos), text_rows(judge, self.prompts(concept, "none"))
            own, base = (
                {trigger: feature_rows(judge, drawn[trigger]) for trigger in TRIGGERS}
                for drawn in (images, {trigger: self._of_base[concept.name, trigger] for trigger in TRIGGERS})
            )
            judges[judge.name] = {
                "gain": {trigger: identity_gain(own[trigger], base[trigger], shown) for trigger in TRIGGERS},
                "base_drift": base_drift(base["none"], own["none"]),
                "followed": None if texts is None else share_followed(own["own"], texts),
            }
        head = self._head(concept)
        return {"recognised": {trigger: head.rate(images[trigger]) for trigger in TRIGGERS}, "judges": judges}

    @cached_property
    def _of_base(self) -> dict[tuple[str, str], Images]:
        cells = {(concept.name, trigger, BASE): 0 for concept in self.taught for trigger in TRIGGERS}
        return {(name, trigger): images for (name, trigger, _), images in self._drawn(None, cells).items()}

    @cached_property
    def _judges(self) -> tuple[Judge, ...]:
        return load_judges("auto", self.base)

    def _head(self, concept: TaughtConcept) -> RecognitionHead:
        if concept.name not in self._heads:
            judge = next(judge for judge in self._judges if judge.name == POCKET_CLASSIFIER)
            self._heads[concept.name] = fit_head(
                DrawnSubject(world.CONCEPTS[concept.name]), judge, self.base, seed=FIRST_SEED
            )
        return self._heads[concept.name]

    def _drawn_of_rank(self, stacks: Mapping[Carried, AdapterWeights], cells: Sequence[Cell]) -> dict[Cell, Images]:
        layers = {layer for weights in stacks.values() for layer in weights.layers}
        bank = LoraBank.attach(self.base.unet, layers=sorted(layers))
        try:
            slots = {names: slot for slot, names in enumerate(stacks, start=1)}
            for names, slot in slots.items():
                bank.load(slot, stacks[names])
            return self._drawn(bank, {cell: slots[cell[2]] for cell in cells})
        finally:
            bank.detach()

    def _drawn(self, bank: LoraBank | None, slots: Mapping[Cell, int]) -> dict[Cell, Images]:
        taught = {concept.name: concept for concept in self.taught}
        rows = [
            ImageRow(prompt, self.first_seed + i, slot, self.steps, GUIDANCE, self.sampler)
            for (name, trigger, _), slot in slots.items()
            for i, prompt in enumerate(self.prompts(taught[name], trigger))
        ]
        return dict(zip(slots, np.split(image_array(generate(self.base, bank, rows)), len(slots)), strict=True))
