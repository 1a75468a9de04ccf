"""The metrics against plain loops, hand-computed values, and what must not change them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_cluster.errors import EvaluationError
from cat_cluster.evaluation import metrics
from cat_cluster.evaluation.metrics import Array

SEEDS = st.integers(0, 2**32 - 1)
COUNTS = st.integers(2, 7)


def unit_rows(count: int, width: int, seed: int) -> Array:
    rows = np.random.default_rng(seed).standard_normal((count, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def loop_s(a: Array, b: Array) -> float:
    """s of two rows with nothing but sums: does not assume unit length."""
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    norm = math.sqrt(sum(float(x) ** 2 for x in a)) * math.sqrt(sum(float(x) ** 2 for x in b))
    return (1.0 + dot / norm) / 2.0


def loop_harmonic(values: list[float]) -> float:
    return len(values) / sum(1.0 / value for value in values)


def loop_spread(rows: Array) -> float:
    values = [1.0 - loop_s(rows[i], rows[j]) for i in range(len(rows)) for j in range(i + 1, len(rows))]
    return sum(values) / len(values)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, count=COUNTS, photos=COUNTS)
def test_metrics_equal_plain_loops(seed: int, count: int, photos: int) -> None:
    without, with_token, base, base_with = (unit_rows(count, 6, seed + i) for i in range(4))
    photo, text = unit_rows(photos, 6, seed + 4), unit_rows(count, 6, seed + 5)
    pairs = [loop_s(a, b) for a, b in zip(without, with_token, strict=True)]
    cross = [loop_s(a, b) for a in without for b in with_token]
    identity = loop_harmonic([loop_s(a, b) for a in with_token for b in photo])
    untrained = loop_harmonic([loop_s(a, b) for a in base_with for b in photo])
    drift = sum(1.0 - loop_s(a, b) for a, b in zip(base, without, strict=True)) / count
    cosine = sum(float(a @ b) for a, b in zip(with_token, text, strict=True)) / count
    assert metrics.kps(without, with_token) == pytest.approx(1.0 - loop_harmonic(pairs))
    assert metrics.kps_all_pairs(without, with_token) == pytest.approx(1.0 - loop_harmonic(cross))
    assert metrics.identity_similarity(with_token, photo) == pytest.approx(identity)
    assert metrics.identity_gain(with_token, base_with, photo) == pytest.approx(identity - untrained)
    assert metrics.prompt_similarity(with_token, text) == pytest.approx(cosine)
    assert metrics.base_drift(base, without) == pytest.approx(drift)
    ratio = loop_spread(without) / loop_spread(base)
    assert metrics.diversity_ratio(without, base) == pytest.approx(ratio)


def test_values_computed_by_hand() -> None:
    # Angles of 0, 60, 90 and 180 degrees: cos 1, 1/2, 0, -1 and so s = 1, 3/4, 1/2, 0.
    east, sixty, north = [1.0, 0.0], [0.5, math.sqrt(3) / 2], [0.0, 1.0]
    y = np.array([east, east])
    y_token = np.array([sixty, north])
    assert metrics.paired_similarity(y, y_token) == pytest.approx([0.75, 0.5])
    # H = 2 / (4/3 + 2) = 0.6
    assert metrics.kps(y, y_token) == pytest.approx(0.4)
    assert metrics.base_drift(y, y_token) == pytest.approx((0.25 + 0.5) / 2)
    assert metrics.identity_similarity(y_token, np.array([north])) == pytest.approx(
        2 / (1 / ((1 + math.sqrt(3) / 2) / 2) + 1)
    )
    assert metrics.prompt_similarity(y_token, y) == pytest.approx(0.25)
    assert metrics.diversity_ratio(y_token, np.array([east, north])) == pytest.approx((1 - math.sqrt(3) / 2) / 1.0)


def test_published_scores_are_ordinary_cosines() -> None:
    # notes 1.5: KPS 0.0808 is H = .919, cos about .84; 0.1231 is H = .877, cos about .75.
    for published, cosine in ((0.0808, 0.8384), (0.1231, 0.7538)):
        other = np.array([[cosine, math.sqrt(1 - cosine**2)]])
        assert metrics.kps(np.array([[1.0, 0.0]]), other) == pytest.approx(published, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, count=COUNTS)
def test_kps_is_symmetric_bounded_and_blind_to_order(seed: int, count: int) -> None:
    a, b = unit_rows(count, 5, seed), unit_rows(count, 5, seed + 1)
    order = np.random.default_rng(seed).permutation(count)
    assert metrics.kps(a, b) == pytest.approx(metrics.kps(b, a))
    assert metrics.kps(a, b) == pytest.approx(metrics.kps(a[order], b[order]))
    assert metrics.kps_all_pairs(a, b) == pytest.approx(metrics.kps_all_pairs(a[order], b))
    assert 0.0 <= metrics.kps(a, b) <= 1.0


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, count=COUNTS)
def test_turning_the_feature_space_changes_nothing(seed: int, count: int) -> None:
    a, b, photos = (unit_rows(count, 5, seed + i) for i in range(3))
    turn, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((5, 5)))
    assert metrics.kps(a @ turn, b @ turn) == pytest.approx(metrics.kps(a, b))
    assert metrics.identity_gain(a @ turn, b @ turn, photos @ turn) == pytest.approx(
        metrics.identity_gain(a, b, photos), abs=1e-12
    )
    assert metrics.diversity_ratio(a @ turn, b @ turn) == pytest.approx(metrics.diversity_ratio(a, b))


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, count=COUNTS)
def test_an_adapter_that_changes_nothing_scores_neutral(seed: int, count: int) -> None:
    base, base_with, photos = (unit_rows(count, 5, seed + i) for i in range(3))
    assert metrics.base_drift(base, base) == pytest.approx(0.0, abs=1e-12)
    assert metrics.identity_gain(base_with, base_with, photos) == 0.0
    assert metrics.diversity_ratio(base, base) == 1.0
    assert metrics.kps(base, base) == pytest.approx(0.0, abs=1e-12)


def test_opposite_images_give_the_limit_instead_of_a_division_by_zero() -> None:
    east, west = np.array([[1.0, 0.0]]), np.array([[-1.0, 0.0]])
    assert metrics.harmonic_mean(np.array([0.0, 1.0])) == 0.0
    assert metrics.kps(east, west) == 1.0


def test_leak_matrix_equals_plain_loops_and_shows_the_leak() -> None:
    photos = [unit_rows(3, 4, 1), unit_rows(2, 4, 2)]
    adapted = [[unit_rows(4, 4, 10 * i + j) for j in range(4)] for i in range(2)]
    base = [[unit_rows(4, 4, 100 + 10 * i + j) for j in range(4)] for i in range(2)]
    # Trigger 2 brings concept 0 itself: the direction nearest to all its photos, from an indifferent base.
    centre = photos[0].sum(0) / np.linalg.norm(photos[0].sum(0))
    adapted[0][2] = np.repeat(centre[None], 4, axis=0)
    base[0] = [base[0][0]] * 4
    found = metrics.leak_matrix(adapted, base, photos)
    for i in range(2):
        for j in range(4):
            mean = [
                sum(loop_s(image, photo) for image in side[i][j] for photo in photos[i])
                / (len(side[i][j]) * len(photos[i]))
                for side in (adapted, base)
            ]
            assert found[i, j] == pytest.approx(mean[0] - mean[1])
    assert found[0].argmax() == 2


def test_sets_of_different_size_are_refused() -> None:
    for paired in (metrics.kps, metrics.prompt_similarity, metrics.base_drift, metrics.diversity_ratio):
        with pytest.raises(EvaluationError, match="same prompts and seeds"):
            paired(unit_rows(3, 4, 0), unit_rows(2, 4, 0))
    with pytest.raises(EvaluationError, match="images_per_prompt"):
        metrics.diversity_ratio(unit_rows(1, 4, 0), unit_rows(1, 4, 1))
    with pytest.raises(EvaluationError, match="no images"):
        metrics.harmonic_mean(np.zeros(0))


def test_a_base_without_variety_has_none_to_lose() -> None:
    same = np.repeat(unit_rows(1, 4, 0), 3, axis=0)
    assert metrics.diversity_ratio(same, same) == 1.0
