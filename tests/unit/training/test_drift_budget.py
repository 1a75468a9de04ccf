"""The drift budget: alpha settles where the CAT loss is the asked share, and only where it was asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cat_cluster.data.draws import draw_batch
from cat_cluster.models.base_model import BaseModel
from cat_cluster.training.drift_budget import LARGEST_SCALE, DriftBudget, weigh
from cat_cluster.training.loss_curves import ConceptLoss
from cat_cluster.training.step_report import StepReport
from tests.unit.training.test_loop import Killed, bit_equal, member, series, train
from tests.unit.training.test_step import concept, task, with_training

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("start", [0.002, 0.2])
def test_alpha_settles_where_the_cat_loss_keeps_to_its_share(start: float) -> None:
    """A system whose CAT loss falls as 1 / scale, which is the closed form's: scale = start / (budget identity)."""
    budget = DriftBudget(0.05, ["sks"])
    for _ in range(600):
        scale = budget.scales()["sks"]
        budget.update({"sks": ConceptLoss(identity=0.4, cat=start / scale)})
    assert budget.scales()["sks"] == pytest.approx(start / (0.05 * 0.4), rel=0.02)


def test_the_factor_stays_within_its_limits_and_ignores_what_is_not_finite() -> None:
    budget = DriftBudget(0.05, ["sks"])
    for loss in (ConceptLoss(0.4, None), ConceptLoss(float("nan"), 0.1), ConceptLoss(0.4, float("inf"))):
        budget.update({"sks": loss})
    assert budget.scales() == {"sks": 1.0}
    for cat, limit in ((1e3, LARGEST_SCALE), (0.0, 1 / LARGEST_SCALE)):
        for _ in range(400):
            budget.update({"sks": ConceptLoss(0.4, cat)})
        assert budget.scales()["sks"] == pytest.approx(limit)
    without = DriftBudget(None, ["zwx"])
    without.update({"zwx": ConceptLoss(0.4, 1.0)})
    assert (without.scales(), without.factor(0), without.to_json()) == ({}, 1.0, [])


def test_a_restored_budget_goes_on_with_its_running_means() -> None:
    whole, restored = DriftBudget(0.05, ["sks"]), DriftBudget(0.05, ["sks"])
    for step in range(5):
        whole.update({"sks": ConceptLoss(0.4, 0.1 * step)})
    restored.restore(json.loads(json.dumps(whole.to_json())))
    for one in (whole, restored):
        one.update({"sks": ConceptLoss(0.2, 0.001)})
    assert restored.to_json() == whole.to_json()


def test_only_rows_of_concepts_with_a_budget_are_weighed(base: BaseModel) -> None:
    pair = [task("mug", (concept(base, "sks", alpha=2.0),)), task("tea", (concept(base, "zwx", alpha=2.0),))]
    batch = draw_batch(pair, [0, 0], 1000)
    without, budget = DriftBudget(None, ["sks"]), DriftBudget(0.01, ["zwx"])
    budget.restore([[4.0, 0.3, 0.1]])
    weighed = weigh(batch, [without, budget]).cat_weight_M / batch.cat_weight_M
    assert weighed.tolist() == [1.0, 1.0, 4.0, 4.0]
    assert weigh(batch, [without, without]) is batch


def test_a_budget_acts_in_training_and_survives_an_interruption(base: BaseModel, tmp_path: Path) -> None:
    def pack() -> list:  # type: ignore[type-arg]
        held = task("held", (concept(base, "sks", alpha=1.0),), drift_budget=1e-4, draw_key="pair")
        free = with_training(replace(held, adapter_id="free"), drift_budget=None)
        return [member(base, held), member(base, free)]

    reports: list[StepReport] = []
    whole = train(base, pack(), on_step=reports.append)
    assert reports[-1].alpha_scales["held"]["sks"] > 1.2
    assert set(reports[-1].alpha_scales) == {"held"}
    assert not bit_equal(whole["held"].weights, whole["free"].weights)

    def die(report: StepReport) -> None:
        if report.step == 13:
            raise Killed

    with pytest.raises(Killed):
        train(base, pack(), checkpoints=series(tmp_path, pack()), on_step=die)
    resumed = train(base, pack(), checkpoints=series(tmp_path, pack()))
    assert all(bit_equal(whole[name].weights, resumed[name].weights) for name in whole)
