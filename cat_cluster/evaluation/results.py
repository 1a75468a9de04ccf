"""What an evaluation found: images, scores per judge with intervals, leaks, recognition; and its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cat_cluster.evaluation.intervals import METRICS, ConceptFeatures, Interval, Resampled, resample, score
from cat_cluster.evaluation.leaks import DecoyScores, LeakMatrix
from cat_cluster.evaluation.metrics import paired_similarity, similarity
from cat_cluster.evaluation.recognition import Recognition
from cat_cluster.spec.sections import EvaluationSpec


@dataclass(frozen=True, eq=False)
class ConceptImages:
    """Images of one concept, uint8 [N, H, W, 3], the same prompt and seed at the same index; photos [M, H, W, 3]."""

    token: str
    class_noun: str
    prompts: tuple[str, ...]
    token_prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    base_without: NDArray[np.uint8]
    base_with: NDArray[np.uint8]
    without_token: NDArray[np.uint8]
    with_token: NDArray[np.uint8]
    photos: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class JudgeScores:
    """What one judge says: features in (for paired comparisons), metrics with 95% intervals out."""

    name: str
    digest: str
    concepts: tuple[ConceptFeatures, ...]
    leaks: LeakMatrix
    bootstrap_seed: int
    decoys: tuple[DecoyScores, ...] = ()

    @cached_property
    def resampled(self) -> Resampled:
        """Estimates and bootstrap draws, for intervals and for comparisons with another method."""
        return resample(self.concepts, seed=self.bootstrap_seed)

    @property
    def metrics(self) -> dict[str, float | None]:
        """Every metric, as the mean over concepts; None where this judge cannot tell."""
        return {metric: self.resampled.estimates.get(metric) for metric in METRICS}

    @property
    def intervals(self) -> dict[str, Interval]:
        """Every metric that this judge can tell, with its interval."""
        found = {metric: self.resampled.interval(metric) for metric in METRICS}
        return {metric: value for metric, value in found.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        """The metrics as plain numbers, then intervals, leak matrix, judge, and scores per concept and pair."""
        return {
            **self.metrics,
            "intervals": {metric: found.ends() for metric, found in self.intervals.items()},
            "leak_matrix": self.leaks.to_json(),
            "judge": {"name": self.name, "digest": self.digest},
            "concepts": {concept.token: _concept_json(concept) for concept in self.concepts},
        }


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Everything measured of one adapter; the first judge's scores are the adapter's scores."""

    images: tuple[ConceptImages, ...]
    judges: tuple[JudgeScores, ...]
    recognition: Mapping[str, Recognition | str]
    spec: EvaluationSpec

    @property
    def metrics(self) -> dict[str, float | None]:
        """The first judge's metrics."""
        return self.judges[0].metrics

    def to_json(self) -> dict[str, Any]:
        """The first judge's scores at the top, the others under `judges`, and recognition."""
        return {
            **self.judges[0].to_json(),
            "judges": {judge.name: judge.to_json() for judge in self.judges[1:]},
            "recognition": self._recognition_json(),
            "evaluation": self.spec.model_dump(mode="json"),
        }

    def reference(self) -> dict[str, Any]:
        """What drift is measured against later, under the first judge: the photos' embeddings and scores per pair.

        decoy: a word that was never taught, and how far it moves the base's images with the seeds of some of the pairs.
        """
        judge = self.judges[0]
        decoys = {found.token: self._decoy_json(found) for found in judge.decoys}
        return {
            "judge": {"name": judge.name, "digest": judge.digest},
            "concepts": {
                concept.token: {
                    "photos": concept.photos_MF.tolist(),
                    **_pair_scores(concept),
                    **({"decoy": decoys[concept.token]} if concept.token in decoys else {}),
                }
                for concept in judge.concepts
            },
        }

    def _decoy_json(self, found: DecoyScores) -> dict[str, Any]:
        # Pair i has seed i after the first.
        pairs = [seed - self.spec.seed for seed in found.seeds]
        return {"word": found.word, "pairs": pairs, "drift": list(found.drifts)}

    def _recognition_json(self) -> dict[str, Any]:
        known = [found for found in self.recognition.values() if isinstance(found, Recognition)]
        means: dict[str, float | None] = {
            name: float(np.mean([getattr(found, name) for found in known])) if known else None
            for name in Recognition.__dataclass_fields__
        }
        return {
            **means,
            "concepts": {
                token: found.to_json() if isinstance(found, Recognition) else {"not_available": found}
                for token, found in self.recognition.items()
            },
        }


def _concept_json(concept: ConceptFeatures) -> dict[str, Any]:
    return {
        **{metric: score(metric, [concept]) for metric in METRICS},
        "pairs": {**_pair_scores(concept), "fisher_drift": concept.fisher_N.tolist()},
    }


def _pair_scores(concept: ConceptFeatures) -> dict[str, list[float]]:
    """Per same-seed pair: 1 - s with and without the token, mean s to the photos, 1 - s to the base image."""
    return {
        "kps": (1.0 - paired_similarity(concept.without_NF, concept.with_NF)).tolist(),
        "identity": similarity(concept.with_NF, concept.photos_MF).mean(1).tolist(),
        "base_drift": (1.0 - paired_similarity(concept.base_without_NF, concept.without_NF)).tolist(),
    }
