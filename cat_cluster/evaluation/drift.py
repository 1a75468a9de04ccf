"""Does a served adapter still do what it was published with? Pure arithmetic on the scores of probes.

Two questions, two answers. The same prompt and seed must give the same scores again: `disagreement` of a canonical
probe is a fault at once. The scores of users' own prompts vary, so a `DriftMonitor` gathers evidence from live probes
with two sequential detectors per score, calibrated so that healthy traffic is not doubted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from cat_cluster.spec.choices import DriftDetector, DriftScore, DriftState

Array = NDArray[np.float64]

SCORES = get_args(DriftScore)
DETECTORS = get_args(DriftDetector)
LEAST_PAIRS = 8  # of a reference: fewer say too little of how scores vary
WARNING = 0.7  # share of a limit
EWMA_WEIGHT = 0.05  # the last 40 probes or so count
CUSUM_SLACK = 2.5  # deviations: only shifts beyond it add up; a change of prompts makes smaller ones, a fault larger
LARGEST = 4.0  # deviations: one odd image cannot raise an alarm alone
LEAST_LIMITS = (1.0, 2.0 * (LARGEST - CUSUM_SLACK))  # of EWMA and CUSUM: three odd images at the very least
LEAST_DEVIATION = 0.03  # radians: a score that hardly varies in the reference may still do so elsewhere
# What users' prompts do to the scores of a healthy adapter, as measured (jobs/benchmark/drift/): their means lie off
# those of the evaluation's few prompts by so many deviations (rms), and they vary so many times as much. Words that the
# base does not know bring the most drift.
TRAFFIC = (0.8, 0.5, 1.0)
SPREAD = (1.7, 1.5, 2.0)
RUN_LENGTH = 10_000  # probes of a healthy adapter per false alarm, all its detectors together
HORIZON = 500  # probes of a simulated stream
STREAMS = 4_000


def disagreement(scores: Mapping[str, float], expected: Mapping[str, float]) -> float:
    """Return the largest difference of a canonical probe's scores from the recorded ones: 0 where nothing changed."""
    return max(abs(scores[name] - expected[name]) for name in expected)


def angles(scores: Any) -> Array:
    """Return half the angle between two embeddings, radians, for scores in [0, 1] of any shape.

    1 - s = (1 - cos a) / 2 = sin^2(a / 2): a score near 0 or 1 is squeezed against that end, its angle is not.
    """
    return np.arcsin(np.sqrt(np.clip(np.asarray(scores, dtype=np.float64), 0.0, 1.0)))


@dataclass(frozen=True, eq=False)
class Charts:
    """Where the detectors of S scores stand, each [..., S]: EWMA, and the sums of shifts upwards and downwards."""

    ewma: Array
    up: Array
    down: Array

    @classmethod
    def zero(cls, *shape: int) -> Charts:
        """Charts that have seen nothing."""
        return cls(np.zeros(shape), np.zeros(shape), np.zeros(shape))

    def advance(self, deviations: Array, ceiling: Array | float = np.inf) -> Charts:
        """Return the charts after one more probe, whose scores lie `deviations` [..., S] off their means.

        z = clip(deviation);  e' = e + w (z - e);  u' = max(0, u + z - k);  d' = max(0, d - z - k)
        (Roberts 1959; Page 1954.) Sums stop at the ceiling, so that a mended adapter is soon believed again.
        """
        z = np.clip(deviations, -LARGEST, LARGEST)
        return Charts(
            self.ewma + EWMA_WEIGHT * (z - self.ewma),
            np.clip(self.up + z - CUSUM_SLACK, 0.0, ceiling),
            np.clip(self.down - z - CUSUM_SLACK, 0.0, ceiling),
        )

    @property
    def statistics(self) -> Array:
        """How far each detector has gone, [..., S, 2] in the order of DETECTORS."""
        return np.stack([np.abs(self.ewma), np.maximum(self.up, self.down)], axis=-1)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Means and deviations [S] of the reference's angles, and the detectors' limits [S, 2]."""

    means: Array
    deviations: Array
    limits: Array


class DriftMonitor:
    """The detectors of one concept: two for each score, fed with live probes one by one."""

    def __init__(self, reference: Mapping[str, Sequence[float]]) -> None:
        """Calibrate on a manifest's scores per pair (a quarter of a second; remembered).

        Raises ValueError for fewer than LEAST_PAIRS pairs.
        """
        columns = tuple(tuple(float(value) for value in reference[name]) for name in SCORES)
        if min(len(column) for column in columns) < LEAST_PAIRS:
            raise ValueError(f"the reference has fewer than {LEAST_PAIRS} pairs: raise evaluation.images_per_prompt")
        self._calibration = calibrate(columns)
        self._charts = Charts.zero(len(SCORES))
        self.probes = 0

    def update(self, scores: Mapping[str, float]) -> DriftState:
        """Take the scores of one more live probe and return the state."""
        found = self._calibration
        off = (angles([scores[name] for name in SCORES]) - found.means) / found.deviations
        self._charts = self._charts.advance(off, ceiling=2.0 * found.limits[:, 1])
        self.probes += 1
        return self.state

    @property
    def shares(self) -> dict[str, dict[str, float]]:
        """Score -> detector -> its statistic as a share of its limit; 1 is an alarm."""
        shares = self._charts.statistics / self._calibration.limits
        return {
            score: dict(zip(DETECTORS, row, strict=True)) for score, row in zip(SCORES, shares.tolist(), strict=True)
        }

    @property
    def state(self) -> DriftState:
        """What the detector that has gone furthest says."""
        largest = max(share for row in self.shares.values() for share in row.values())
        return "alarm" if largest >= 1.0 else "warning" if largest >= WARNING else "ok"

    def reset(self) -> None:
        """Forget every probe."""
        self._charts, self.probes = Charts.zero(len(SCORES)), 0

    def to_json(self) -> dict[str, Any]:
        """What `restore` needs to go on from here."""
        charts = self._charts
        return {
            "probes": self.probes,
            **{name: getattr(charts, name).tolist() for name in ("ewma", "up", "down")},
        }

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Go on from where another monitor of the same reference stood; ValueError for what to_json never wrote."""
        try:
            found = [np.asarray(stored[name], dtype=np.float64) for name in ("ewma", "up", "down")]
            probes = int(stored["probes"])
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"not the state of a drift monitor: {error!r}") from error
        if any(part.shape != (len(SCORES),) or not np.isfinite(part).all() for part in found):
            raise ValueError("not the state of a drift monitor: wrong shape or not finite")
        self._charts, self.probes = Charts(*found), probes


@lru_cache(maxsize=512)
def calibrate(columns: tuple[tuple[float, ...], ...]) -> Calibration:
    """Return means, deviations and limits for a reference of one column of N scores for each of SCORES.

    Limits come from STREAMS simulated healthy adapters (the same ones every time). Each is measured on N pairs, as
    this one was, and judged by what those say, so the limits carry the reference's own sampling error; its traffic
    then comes from the reference, blurred, spread and shifted as users' prompts do. Each detector's limit is passed by
    equally many streams, and any limit by as many as an alarm in RUN_LENGTH probes means within HORIZON probes.
    """
    reference = angles(columns).T
    means, deviations = _measured(reference)
    peaks = _peaks(reference, np.random.default_rng(0))
    return Calibration(means, deviations, _limits(peaks, 1.0 - np.exp(-HORIZON / RUN_LENGTH)))


def _measured(sample: Array) -> tuple[Array, Array]:
    """Means and deviations over the pairs of samples [..., N, S]."""
    return sample.mean(axis=-2), np.maximum(sample.std(axis=-2, ddof=1), LEAST_DEVIATION)


def _peaks(reference_NS: Array, rng: np.random.Generator) -> Array:
    """The largest statistics [STREAMS, S, 2] that simulated healthy streams reach."""
    pairs, scores = reference_NS.shape
    centre, truth = _measured(reference_NS)
    # Whole pairs are drawn, so that scores stay correlated as they are.
    means, deviations = _measured(reference_NS[rng.integers(pairs, size=(STREAMS, pairs))])
    means = means - np.asarray(TRAFFIC) * truth * rng.standard_normal((STREAMS, scores))
    blur = 0.5 * pairs**-0.2 * truth  # N values are not all the values there are
    charts, peaks = Charts.zero(STREAMS, scores), np.zeros((STREAMS, scores, len(DETECTORS)))
    for _ in range(HORIZON):
        drawn = centre + np.asarray(SPREAD) * (reference_NS[rng.integers(pairs, size=STREAMS)] - centre)
        drawn = drawn + blur * rng.standard_normal((STREAMS, scores))
        charts = charts.advance((drawn - means) / deviations)
        np.maximum(peaks, charts.statistics, out=peaks)
    return peaks


def _limits(peaks: Array, allowed: float) -> Array:
    """Limits [S, 2], each passed by as many streams as every other, and any of them by the share `allowed`."""
    falling = -np.sort(-peaks, axis=0)
    least, most = 0, int(allowed * len(peaks))  # streams that pass one limit
    while least < most:
        middle = (least + most + 1) // 2
        passed = (peaks > falling[middle]).any(axis=(1, 2)).mean()
        least, most = (middle, most) if passed <= allowed else (least, middle - 1)
    limits: Array = np.maximum(falling[least], LEAST_LIMITS)
    return limits
