"""The evaluation of an adapter: same-seed images with and without its tokens, and what judges say of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cat_cluster.data.concepts import Concept
from cat_cluster.data.crops import Size, crop_pixels
from cat_cluster.errors import EvaluationError
from cat_cluster.evaluation.fisher import fisher_drift
from cat_cluster.evaluation.intervals import ConceptFeatures
from cat_cluster.evaluation.judges import POCKET_CLASSIFIER, Judge, feature_rows, is_pocket, load_judges, text_rows
from cat_cluster.evaluation.leaks import leak_prompts, measure_decoys, measure_leaks
from cat_cluster.evaluation.prompts import evaluation_prompts, fill
from cat_cluster.evaluation.recognition import Recognition, RecognitionHead, find_subject, fit_head
from cat_cluster.evaluation.results import ConceptImages, Evaluation, JudgeScores
from cat_cluster.lora.bank import LoraBank
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.generate import ImageRow, generate, image_array
from cat_cluster.models.subjects import Subject
from cat_cluster.spec.sections import EvaluationSpec

Images = NDArray[np.uint8]
Progress = Callable[[int, int], None]
LEAK_IMAGES = 8  # per cell of the leak matrix
MEMORY_BYTES = 256 * 2**20  # of base images kept from one adapter to the next


@dataclass(frozen=True)
class _Plan:
    """The prompts of one concept: y and y_T per pair, template and seed of each."""

    concept: Concept
    templates: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def without(self) -> tuple[str, ...]:
        return tuple(fill(template, self.concept.class_noun, None) for template in self.templates)

    @property
    def with_token(self) -> tuple[str, ...]:
        return tuple(fill(template, self.concept.class_noun, self.concept.token) for template in self.templates)

    def leak_pairs(self, images_per_prompt: int) -> tuple[tuple[str, int], ...]:
        """The first image of each prompt, at most 8, then second images where there are fewer prompts."""
        pairs = list(zip(self.templates, self.seeds, strict=True))
        by_image = [pair for first in range(images_per_prompt) for pair in pairs[first::images_per_prompt]]
        return tuple(by_image[:LEAK_IMAGES])


@dataclass(frozen=True, eq=False)
class EvaluationMemory:
    """What measurements of adapters of one base have in common: judges, images of the bare base, recognition heads."""

    judges: dict[str, tuple[Judge, ...]] = field(default_factory=dict)
    base_images: dict[ImageRow, Images] = field(default_factory=dict)
    heads: dict[tuple[Subject, int], RecognitionHead] = field(default_factory=dict)

    def trim(self) -> None:
        """Forget the images when they have become many; they can be made again."""
        if sum(image.nbytes for image in self.base_images.values()) > MEMORY_BYTES:
            self.base_images.clear()


class Evaluator:
    """Measures the adapters of one bank; images of the bare base model are made once and shared between them."""

    def __init__(
        self,
        base: BaseModel,
        bank: LoraBank,
        judges: Sequence[Judge] | None = None,
        *,
        rows_per_call: int = 16,
        memory: EvaluationMemory | None = None,
    ) -> None:
        """`judges` overrides those that each evaluation spec names; the first one's scores come first.

        memory: what other evaluators of the same base, and the same `judges`, have found already.
        """
        self._base = base
        self._bank = bank
        self._judges = None if judges is None else tuple(judges)
        self._rows_per_call = rows_per_call
        self._memory = EvaluationMemory() if memory is None else memory
        self._loaded, self._heads = self._memory.judges, self._memory.heads
        self._base_images = self._memory.base_images

    def evaluate(
        self,
        slot: int,
        concepts: Sequence[Concept],
        spec: EvaluationSpec,
        *,
        on_progress: Progress | None = None,
    ) -> Evaluation:
        """Return images and scores of the adapter in `slot`; the same spec gives the same images and scores.

        Raises EvaluationError without a judge or with fewer than two images, and for an adapter that diverged.
        All images go through one call of generate; on_progress gets what generate gives it (steps done, in all).
        """
        self._memory.trim()
        judges = self._judges_for(spec)
        plans = [self._plan(concept, spec) for concept in concepts]
        pairs = {plan.concept.token: plan.leak_pairs(spec.images_per_prompt) for plan in plans}
        cells = leak_prompts(concepts, pairs)
        wanted = [(prompt, seed) for plan in plans for prompt, seed in _main_prompts(plan)]
        wanted += [pair for cell in cells for pair in zip(cell.prompts, cell.seeds, strict=True)]
        image = self._images(slot, wanted, spec, on_progress)
        sets = [self._concept_images(plan, slot, image) for plan in plans]
        fisher = [self._fisher(slot, images) for images in sets]

        def rows_of(judge: Judge, cell_slot: int) -> dict[tuple[int, int], Any]:
            return {
                (cell.row, cell.column): feature_rows(
                    judge,
                    np.stack([image(cell_slot, p, s) for p, s in zip(cell.prompts, cell.seeds, strict=True)]),
                )
                for cell in cells
            }

        scores = []
        for judge in judges:
            features = tuple(_features(judge, images, drift) for images, drift in zip(sets, fisher, strict=True))
            adapted, plain, photos = rows_of(judge, slot), rows_of(judge, 0), [found.photos_MF for found in features]
            leaks = measure_leaks(concepts, adapted, plain, photos)
            decoys = measure_decoys(concepts, cells, adapted, plain)
            scores.append(JudgeScores(judge.name, judge.digest, features, leaks, spec.seed, decoys))
        return Evaluation(tuple(sets), tuple(scores), self._recognitions(concepts, sets, judges, spec.seed), spec)

    def _judges_for(self, spec: EvaluationSpec) -> tuple[Judge, ...]:
        if self._judges is not None:
            return self._judges
        if spec.judge not in self._loaded:
            self._loaded[spec.judge] = load_judges(spec.judge, self._base)
        return self._loaded[spec.judge]

    def _plan(self, concept: Concept, spec: EvaluationSpec) -> _Plan:
        each = image_templates(spec, self._base)
        # A seed of its own for each image, not for each column of a prompt: more independent pairs.
        return _Plan(concept, each, tuple(range(spec.seed, spec.seed + len(each))))

    def _images(
        self, slot: int, wanted: Iterable[tuple[str, int]], spec: EvaluationSpec, on_progress: Progress | None
    ) -> Callable[[int, str, int], Images]:
        """Make what is missing, adapted and base alike, in one call; return the look-up (slot, prompt, seed)."""

        def row(row_slot: int, prompt: str, seed: int) -> ImageRow:
            return ImageRow(prompt, seed, row_slot, spec.steps, spec.guidance, spec.sampler)

        rows = dict.fromkeys(row(s, prompt, seed) for prompt, seed in wanted for s in (slot, 0))
        missing = [key for key in rows if key not in self._base_images]
        made = generate(self._base, self._bank, missing, rows_per_call=self._rows_per_call, on_progress=on_progress)
        adapted: dict[ImageRow, Images] = {}
        for key, picture in zip(missing, image_array(made), strict=True):
            (self._base_images if key.slot == 0 else adapted)[key] = picture

        def image(row_slot: int, prompt: str, seed: int) -> Images:
            return (self._base_images if row_slot == 0 else adapted)[row(row_slot, prompt, seed)]

        return image

    def _concept_images(self, plan: _Plan, slot: int, image: Callable[[int, str, int], Images]) -> ConceptImages:
        def stack(row_slot: int, prompts: Sequence[str]) -> Images:
            return np.stack([image(row_slot, prompt, seed) for prompt, seed in zip(prompts, plan.seeds, strict=True)])

        size = Size.square(self._base.resolution)
        photos = torch.stack([crop_pixels(example, 0, size) for example in plan.concept.examples])
        return ConceptImages(
            token=plan.concept.token,
            class_noun=plan.concept.class_noun,
            prompts=plan.without,
            token_prompts=plan.with_token,
            seeds=plan.seeds,
            base_without=stack(0, plan.without),
            base_with=stack(0, plan.with_token),
            without_token=stack(slot, plan.without),
            with_token=stack(slot, plan.with_token),
            photos=image_array((photos + 1.0) / 2.0),
        )

    def _fisher(self, slot: int, images: ConceptImages) -> NDArray[np.float64]:
        pixels = torch.from_numpy(images.base_without).permute(0, 3, 1, 2).float() / 255.0
        drift = fisher_drift(self._base, self._bank, slot, pixels, images.prompts, images.seeds)
        if not np.isfinite(drift).all():
            raise EvaluationError(
                f"with the adapter of {images.token!r} the U-Net's predictions are not finite: its training diverged; "
                "train it again with a lower training.learning_rate"
            )
        return drift

    def _recognitions(
        self, concepts: Sequence[Concept], sets: Sequence[ConceptImages], judges: Sequence[Judge], seed: int
    ) -> Mapping[str, Recognition | str]:
        """The recognition of each token, or the reason why there is none."""
        judge = next((judge for judge in judges if judge.name == POCKET_CLASSIFIER), None)
        found: dict[str, Recognition | str] = {}
        for concept, images in zip(concepts, sets, strict=True):
            subject = find_subject(concept.examples[0].path.parent)
            if judge is None:
                found[concept.token] = "only an embedded base has a classifier of its world"
            elif subject is None:
                found[concept.token] = "nothing says what the photos show (no design.json beside them)"
            else:
                head = self._head(subject, judge, seed)
                found[concept.token] = Recognition(
                    rate=head.rate(images.with_token),
                    rate_without_token=head.rate(images.without_token),
                    rate_base=head.rate(images.base_without),
                    rate_base_with_token=head.rate(images.base_with),
                    head_accuracy=head.accuracy,
                )
        return found

    def _head(self, subject: Subject, judge: Judge, seed: int) -> RecognitionHead:
        if (subject, seed) not in self._heads:
            self._heads[subject, seed] = fit_head(subject, judge, self._base, seed=seed)
        return self._heads[subject, seed]


def image_templates(spec: EvaluationSpec, base: BaseModel) -> tuple[str, ...]:
    """Return the prompt template of each image pair of a concept; EvaluationError when there are fewer than two."""
    templates = evaluation_prompts(spec.prompts, pocket=is_pocket(base))
    each = tuple(template for template in templates for _ in range(spec.images_per_prompt))
    if len(each) < 2:
        raise EvaluationError(
            "an evaluation needs at least 2 images per concept: "
            "raise evaluation.images_per_prompt or give more evaluation.prompts"
        )
    return each


def _main_prompts(plan: _Plan) -> list[tuple[str, int]]:
    return [pair for prompts in (plan.without, plan.with_token) for pair in zip(prompts, plan.seeds, strict=True)]


def _features(judge: Judge, images: ConceptImages, fisher_N: NDArray[np.float64]) -> ConceptFeatures:
    return ConceptFeatures(
        token=images.token,
        without_NF=feature_rows(judge, images.without_token),
        with_NF=feature_rows(judge, images.with_token),
        base_without_NF=feature_rows(judge, images.base_without),
        base_with_NF=feature_rows(judge, images.base_with),
        photos_MF=feature_rows(judge, images.photos),
        text_NF=text_rows(judge, images.prompts),
        fisher_N=fisher_N,
    )
