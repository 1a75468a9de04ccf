"""Intervals of the metrics: a paired bootstrap over concepts, then over the same-seed pairs within each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from cat_cluster.errors import EvaluationError
from cat_cluster.evaluation import metrics
from cat_cluster.evaluation.metrics import Array

DRAWS = 1_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class ConceptFeatures:
    """What a judge saw of one concept: feature rows [N, F] in the same order of prompts and seeds, photos [M, F].

    `text_NF` is None for a judge without a text tower. `fisher_N` is the CAT term per base image (no judge in it).
    """

    token: str
    without_NF: Array
    with_NF: Array
    base_without_NF: Array
    base_with_NF: Array
    photos_MF: Array
    text_NF: Array | None
    fisher_N: Array

    @property
    def count(self) -> int:
        """The number of same-seed pairs N."""
        return len(self.without_NF)

    def take(self, pairs: NDArray[np.int64]) -> ConceptFeatures:
        """The same concept with these pairs only, in this order and as often as they are named."""
        return replace(
            self,
            without_NF=self.without_NF[pairs],
            with_NF=self.with_NF[pairs],
            base_without_NF=self.base_without_NF[pairs],
            base_with_NF=self.base_with_NF[pairs],
            text_NF=None if self.text_NF is None else self.text_NF[pairs],
            fisher_N=self.fisher_N[pairs],
        )


Metric = Callable[[ConceptFeatures], float | None]

# The order of tables and of JSON.
METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "kps": lambda c: metrics.kps(c.without_NF, c.with_NF),
        "kps_all_pairs": lambda c: metrics.kps_all_pairs(c.without_NF, c.with_NF),
        "identity_similarity": lambda c: metrics.identity_similarity(c.with_NF, c.photos_MF),
        "identity_gain": lambda c: metrics.identity_gain(c.with_NF, c.base_with_NF, c.photos_MF),
        "prompt_similarity": lambda c: None if c.text_NF is None else metrics.prompt_similarity(c.with_NF, c.text_NF),
        "base_drift": lambda c: metrics.base_drift(c.base_without_NF, c.without_NF),
        "fisher_drift": lambda c: float(c.fisher_N.mean()),
        "diversity_ratio": lambda c: metrics.diversity_ratio(c.without_NF, c.base_without_NF),
    }
)


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its 95% interval; an end without bound is infinite."""

    estimate: float
    low: float
    high: float

    def ends(self) -> list[float | None]:
        """[low, high] for JSON, which knows no infinity: None means an end without bound."""
        return [end if math.isfinite(end) else None for end in (self.low, self.high)]


@dataclass(frozen=True, eq=False)
class Resampled:
    """Every metric that a judge can tell: its estimate, and its value in each bootstrap draw.

    Draws depend on `seed` and on the numbers of concepts and pairs alone, so the draws of two methods that saw the
    same prompts and seeds match one by one: what the methods share cancels in a comparison.
    """

    pairs: tuple[tuple[str, int], ...]
    seed: int
    estimates: Mapping[str, float]
    draws: Mapping[str, Array]

    def interval(self, metric: str) -> Interval | None:
        """The metric with its percentile interval, or None where the judge cannot tell it."""
        if metric not in self.estimates:
            return None
        return Interval(self.estimates[metric], *_percentiles(self.draws[metric]))


def score(metric: str, concepts: Sequence[ConceptFeatures]) -> float | None:
    """Return one metric of an adapter: its mean over the concepts, or None where the judge cannot tell."""
    values = [METRICS[metric](concept) for concept in concepts]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def resample(concepts: Sequence[ConceptFeatures], *, draws: int = DRAWS, seed: int = 0) -> Resampled:
    """Return estimates and bootstrap draws: concepts with replacement, then pairs with replacement within each.

    Entries of one token are runs of one concept, such as seeds of its training: they are drawn between the two.
    """
    runs: dict[str, list[ConceptFeatures]] = {}
    for concept in concepts:
        runs.setdefault(concept.token, []).append(concept)
    groups = list(runs.values())
    estimates = {metric: score(metric, concepts) for metric in METRICS}
    known = {metric: value for metric, value in estimates.items() if value is not None}
    rng = np.random.default_rng(seed)
    values = np.empty((draws, len(known)))
    for draw in range(draws):
        chosen = [
            group[int(run)]
            for group in (groups[int(k)] for k in rng.integers(len(groups), size=len(groups)))
            for run in rng.integers(len(group), size=len(group))
        ]
        sample = [concept.take(rng.integers(concept.count, size=concept.count)) for concept in chosen]
        values[draw] = [score(metric, sample) for metric in known]
    pairs = tuple((concept.token, concept.count) for concept in concepts)
    return Resampled(pairs, seed, known, dict(zip(known, values.T, strict=True)))


def paired_ratio_interval(metric: str, method_a: Resampled, method_b: Resampled) -> Interval | None:
    """Return metric(a) / metric(b) with its interval; None where b is not positive or the judge cannot tell.

    A draw in which b is not positive counts as infinite.
    """
    _check_paired(method_a, method_b)
    if method_b.estimates.get(metric, 0.0) <= 0.0:
        return None
    a, b = method_a.draws[metric], method_b.draws[metric]
    ratio = np.divide(a, b, out=np.full_like(a, np.inf), where=b > 0.0)
    return Interval(method_a.estimates[metric] / method_b.estimates[metric], *_percentiles(ratio))


def paired_difference_interval(metric: str, method_a: Resampled, method_b: Resampled) -> Interval | None:
    """Return metric(a) - metric(b) with its interval, or None where the judge cannot tell."""
    _check_paired(method_a, method_b)
    if metric not in method_a.estimates:
        return None
    difference = method_a.draws[metric] - method_b.draws[metric]
    return Interval(method_a.estimates[metric] - method_b.estimates[metric], *_percentiles(difference))


def _check_paired(method_a: Resampled, method_b: Resampled) -> None:
    shapes = [(m.pairs, m.seed, list(m.estimates), {len(v) for v in m.draws.values()}) for m in (method_a, method_b)]
    if shapes[0] != shapes[1]:
        raise EvaluationError(
            "a paired comparison needs the same concepts, images and judge on both sides: "
            "evaluate both adapters with the same evaluation spec"
        )


def _percentiles(sample: Array) -> tuple[float, float]:
    tail = (1.0 - CONFIDENCE) / 2.0
    # An order statistic, not an interpolation: infinities in the sample stay infinities.
    low, high = np.quantile(sample, [tail, 1.0 - tail], method="inverted_cdf")
    return float(low), float(high)
