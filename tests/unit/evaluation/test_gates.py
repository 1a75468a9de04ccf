"""Gates: the bound itself passes, what was not measured does not, and each failure is one sentence."""

from __future__ import annotations

import math

import pytest

from cat_cluster.errors import SpecError
from cat_cluster.evaluation.gates import check_gates
from cat_cluster.evaluation.intervals import METRICS
from cat_cluster.spec.fields import GATE_METRICS


def test_a_spec_may_gate_every_metric_and_nothing_else() -> None:
    assert tuple(METRICS) == GATE_METRICS


@pytest.mark.parametrize(
    ("condition", "value", "passes"),
    [
        (">=0.1", 0.1, True),
        (">=0.1", math.nextafter(0.1, 0.0), False),
        ("<=0.12", 0.12, True),
        ("<=0.12", math.nextafter(0.12, 1.0), False),
        (">= 1", 1, True),
        (" <=0. ", 0.0, True),
        (">=-0.05", -0.05, True),
        (">=-0.05", -0.06, False),
        ("<=-0.05", -0.04, False),
        ("<=1.5e-3", 0.0015, True),
        ("<=1.5e-3", 0.0016, False),
        (">=-2E+1", -20.0, True),
        (">=-2E+1", -20.1, False),
        (">=0", -0.0, True),
    ],
)
def test_a_value_is_held_against_its_condition(condition: str, value: float, passes: bool) -> None:
    assert (check_gates({"kps": condition}, {"kps": value}) == []) is passes


def test_each_failing_gate_is_one_sentence_with_metric_value_and_condition() -> None:
    metrics = {"kps": 0.08123456, "base_drift": 0.11, "identity_gain": -0.25, "leak_matrix": {"tokens": []}}
    require = {"identity_gain": ">=1e-1", "base_drift": "<=0.12", "kps": ">= 0.1"}
    assert check_gates(require, metrics) == [
        "identity_gain is -0.25, and it must be >= 1e-1",
        "kps is 0.08123, and it must be >= 0.1",
    ]


def test_a_near_miss_shows_all_its_digits() -> None:
    assert check_gates({"kps": ">=0.1"}, {"kps": 0.0999999}) == ["kps is 0.0999999, and it must be >= 0.1"]


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({}, "was not measured"),
        ({"kps": None}, "the judge cannot tell it"),
        ({"kps": math.nan}, "is nan, which is no measurement"),
        ({"kps": math.inf}, "is inf, which is no measurement"),
    ],
)
@pytest.mark.parametrize("condition", [">=0.1", "<=0.1"])
def test_what_is_not_known_fails_its_gate(metrics: dict[str, float | None], reason: str, condition: str) -> None:
    (failure,) = check_gates({"kps": condition}, metrics)
    assert reason in failure
    assert f"it must be {condition[:2]} 0.1" in failure


@pytest.mark.parametrize("require", [None, {}])
def test_without_gates_everything_passes(require: dict[str, str] | None) -> None:
    assert check_gates(require, {}) == []


@pytest.mark.parametrize("condition", ["0.1", ">0.1", "==1", ">=", ">=nan", ">=0.1 or so", ""])
def test_a_condition_of_another_form_is_refused(condition: str) -> None:
    with pytest.raises(SpecError, match="write >= or <="):
        check_gates({"kps": condition}, {"kps": 0.2})
