"""The drift detectors against plain loops, and on scores of real probes (jobs/benchmark/drift/measure.py made them)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cat_cluster.evaluation.drift import (
    CUSUM_SLACK,
    EWMA_WEIGHT,
    HORIZON,
    LARGEST,
    LEAST_PAIRS,
    RUN_LENGTH,
    SCORES,
    WARNING,
    Charts,
    DriftMonitor,
    angles,
    calibrate,
    disagreement,
)
from jobs.benchmark.drift.measure import judge_scores, run_lengths

pytestmark = pytest.mark.slow

DOCUMENT: dict[str, Any] = json.loads((Path(__file__).parent / "drift_scores.json").read_text())
CUP: dict[str, list[float]] = DOCUMENT["adapters"]["striped-cup"]
HEALTHY = [name for name in DOCUMENT["arms"] if name.startswith("healthy")]
FAULTS = [name for name in DOCUMENT["arms"] if not name.startswith("healthy")]
# None: within what other prompts do to a healthy adapter, so that only canonical probes are sure to tell.
PROBES_TO_SEE = {
    "strength 0.5": 80,
    "strength 1.5": None,
    "another revision": None,
    "guidance left out": None,
    "damaged base": None,
}


def probe(arm: str, index: int) -> dict[str, float]:
    return {name: DOCUMENT["arms"][arm]["live"][name][index] for name in SCORES}


def columns(reference: dict[str, list[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(reference[name]) for name in SCORES)


def test_the_charts_are_those_of_a_plain_loop() -> None:
    rng = np.random.default_rng(3)
    deviations = rng.normal(0.5, 3.0, size=(60, 3))
    charts = Charts.zero(3)
    for row in deviations:
        charts = charts.advance(row, ceiling=9.0)

    for score in range(3):
        ewma = up = down = 0.0
        for value in deviations[:, score]:
            z = max(-LARGEST, min(LARGEST, value))
            ewma = (1 - EWMA_WEIGHT) * ewma + EWMA_WEIGHT * z
            up = min(9.0, max(0.0, up + z - CUSUM_SLACK))
            down = min(9.0, max(0.0, down - z - CUSUM_SLACK))
        assert charts.ewma[score] == pytest.approx(ewma)
        assert charts.up[score] == pytest.approx(up)
        assert charts.down[score] == pytest.approx(down)
        assert charts.statistics[score].tolist() == pytest.approx([abs(ewma), max(up, down)])


def test_a_monitor_is_its_charts_over_the_limits() -> None:
    monitor, found, charts = DriftMonitor(CUP), calibrate(columns(CUP)), Charts.zero(3)
    states = []
    for index in range(30):
        scores = probe("plain LoRA's weights", index)
        states.append(monitor.update(scores))
        off = (np.arcsin(np.sqrt([scores[name] for name in SCORES])) - found.means) / found.deviations
        charts = charts.advance(off, ceiling=2.0 * found.limits[:, 1])
        shares = charts.statistics / found.limits
        assert np.asarray([list(monitor.shares[name].values()) for name in SCORES]) == pytest.approx(shares)
        worst = shares.max()
        assert states[-1] == ("alarm" if worst >= 1.0 else "warning" if worst >= WARNING else "ok")
    assert states[0] == "ok"
    assert "warning" in states
    assert states[-1] == "alarm"


def test_means_and_deviations_are_those_of_the_angles() -> None:
    found = calibrate(columns(CUP))
    for score, name in enumerate(SCORES):
        half_angles = [np.arcsin(value**0.5) for value in CUP[name]]
        assert found.means[score] == pytest.approx(np.mean(half_angles))
        assert found.deviations[score] == pytest.approx(np.std(half_angles, ddof=1))
    assert angles([0.0, 1.0, -0.1, 1.1]).tolist() == pytest.approx([0.0, np.pi / 2, 0.0, np.pi / 2])


def test_limits_are_the_same_always_and_quickly_found() -> None:
    calibrate.cache_clear()
    started = time.process_time()
    first = calibrate(columns(CUP)).limits
    assert time.process_time() - started < 5.0
    calibrate.cache_clear()
    assert np.array_equal(calibrate(columns(CUP)).limits, first)
    assert calibrate(columns(CUP)) is calibrate(columns(CUP))
    # The same pairs in another order, or more of the same: the limits hardly move.
    turned = tuple(column[::-1] for column in columns(CUP))
    assert calibrate(turned).limits == pytest.approx(first, rel=0.1)


def test_a_small_reference_gets_wide_limits_and_a_tiny_one_none() -> None:
    few = {name: values[:LEAST_PAIRS] for name, values in CUP.items()}
    many = {name: values * 4 for name, values in CUP.items()}
    assert (calibrate(columns(many)).limits < calibrate(columns(few)).limits).all()
    with pytest.raises(ValueError, match="fewer than 8 pairs"):
        DriftMonitor({name: values[:7] for name, values in CUP.items()})


def test_a_score_that_never_varied_is_not_doubted_for_a_little() -> None:
    constant = {name: [0.5] * 18 for name in SCORES}
    monitor = DriftMonitor(constant)
    assert [monitor.update(dict.fromkeys(SCORES, 0.51)) for _ in range(50)] == ["ok"] * 50


def test_one_odd_image_is_no_alarm_and_a_mended_adapter_is_soon_believed() -> None:
    monitor = DriftMonitor(CUP)
    assert monitor.update({"kps": 0.0, "identity": 0.0, "base_drift": 1.0}) == "ok"
    monitor.reset()
    for index in range(200):
        monitor.update(probe("no adapter", index % 40))
    assert monitor.state == "alarm"
    mended = [monitor.update({name: float(np.median(CUP[name])) for name in SCORES}) for _ in range(30)]
    assert mended[-1] == "ok"


def test_the_state_goes_through_json_and_a_reset_forgets_it() -> None:
    monitor, other = DriftMonitor(CUP), DriftMonitor(CUP)
    for index in range(5):
        monitor.update(probe("healthy", index))
    other.restore(json.loads(json.dumps(monitor.to_json())))
    assert (other.shares, other.probes) == (monitor.shares, 5)
    scores = probe("healthy", 5)
    assert other.update(scores) == monitor.update(scores)
    assert other.to_json() == monitor.to_json()
    monitor.reset()
    assert monitor.to_json() == DriftMonitor(CUP).to_json()


@pytest.mark.parametrize(
    "stored",
    [
        {},
        {"probes": "many"},
        {"probes": None},
        {"probes": 1, "ewma": [0.0], "up": [0.0] * 3, "down": [0.0] * 3},
        {"probes": 1, "ewma": [float("nan")] * 3, "up": [0.0] * 3, "down": [0.0] * 3},
    ],
)
def test_a_state_that_is_none_is_refused(stored: dict[str, Any]) -> None:
    monitor = DriftMonitor(CUP)
    with pytest.raises(ValueError, match="not the state of a drift monitor"):
        monitor.restore(stored)
    assert monitor.probes == 0


@pytest.fixture(scope="module")
def judged() -> dict[str, Any]:
    return judge_scores(DOCUMENT)


@pytest.mark.parametrize("arm", HEALTHY)
def test_a_healthy_adapter_is_doubted_less_than_once_in_ten_thousand_probes(judged: dict[str, Any], arm: str) -> None:
    found = judged["healthy"][arm]
    assert found["alarm_in_the_order_drawn"] is None
    assert found["simulated_probes"] >= RUN_LENGTH * found["false_alarms"]


@pytest.mark.parametrize("arm", FAULTS)
def test_live_probes_see_what_they_can_see(judged: dict[str, Any], arm: str) -> None:
    found = judged["faults"][arm]
    most = PROBES_TO_SEE.get(arm, 16)
    if most is None:
        assert found["p95"] > judged["longest_wait"]
    else:
        assert found["p95"] <= most
        assert found["alarm_in_the_order_drawn"] <= most


def test_a_healthy_adapter_that_was_measured_on_few_pairs_is_not_doubted_either() -> None:
    """As the calibration promises for its model, on streams of its own: the reference is a sample of the truth."""
    rng, truth = np.random.default_rng(11), np.asarray([CUP[name] for name in SCORES]).T
    early = 0
    for _ in range(8):
        sample = truth[rng.integers(len(truth), size=18)].T
        reference = dict(zip(SCORES, sample.tolist(), strict=True))
        early += int((run_lengths(reference, CUP, HORIZON, streams=200) <= HORIZON).sum())
    assert early / 1600 <= 1.0 - np.exp(-HORIZON / RUN_LENGTH)


@pytest.mark.parametrize("arm", FAULTS)
def test_every_fault_is_outside_the_tolerance_of_canonical_probes(arm: str) -> None:
    for i, pair in enumerate(DOCUMENT["canonical_pairs"]):
        found = {name: DOCUMENT["arms"][arm]["canonical"][name][i] for name in SCORES}
        assert disagreement(found, {name: CUP[name][pair] for name in SCORES}) > 0.01


def test_a_healthy_canonical_pair_scores_as_it_did() -> None:
    arm = DOCUMENT["arms"]["healthy"]["canonical"]
    for i, pair in enumerate(DOCUMENT["canonical_pairs"]):
        found = {name: arm[name][i] for name in SCORES}
        assert disagreement(found, {name: CUP[name][pair] for name in SCORES}) < 0.001
