from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from cat_cluster.models.pretraining.stage import (
    Stage,
    StageProgress,
    Stateful,
    learning_rate_at,
    optimise,
    run_stage,
    update_average,
)


def _train(checkpoint: Path, steps: int, stop_at: int | None = None) -> tuple[nn.Linear, list[StageProgress]]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    reports: list[StageProgress] = []

    def step(index: int, progress: float) -> torch.Tensor:
        if index == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(index))
        loss: torch.Tensor = model(x).square().mean()
        optimise(loss, model, optimiser, learning_rate_at(progress, 1e-2))
        return loss

    state: dict[str, Stateful] = {"model": model, "optimiser": optimiser}
    run_stage(Stage("toy", checkpoint, "cpu", 0, reports.append), steps, state, step, every_seconds=0.0)
    return model, reports


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole, _ = _train(tmp_path / "whole.pt", 12)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "cut.pt", 12, stop_at=5)
    resumed, reports = _train(tmp_path / "cut.pt", 12)
    assert reports[0].step == 6
    assert torch.equal(resumed.weight, whole.weight)
    assert torch.equal(resumed.bias, whole.bias)


def test_a_finished_stage_does_nothing_more(tmp_path: Path) -> None:
    first, _ = _train(tmp_path / "done.pt", 4)
    again, reports = _train(tmp_path / "done.pt", 4)
    assert reports == []
    assert torch.equal(first.weight, again.weight)


def test_a_wall_clock_budget_ends_by_time_and_not_by_steps(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    reports: list[StageProgress] = []

    def step(index: int, progress: float) -> torch.Tensor:
        torch.full((200, 200), 0.5).matmul(torch.ones(200, 200))
        return model.weight.sum()

    done = run_stage(Stage("toy", tmp_path / "t.pt", "cpu", 0, reports.append, seconds=0.05), 1, {"model": model}, step)
    assert done.step > 1
    assert done.seconds >= 0.05
    assert [report.progress for report in reports] == sorted(report.progress for report in reports)


def test_rate_warms_up_and_falls_to_zero() -> None:
    assert learning_rate_at(0.01, 1.0) == pytest.approx(0.5)
    assert learning_rate_at(0.02, 1.0) == pytest.approx(1.0)
    assert learning_rate_at(0.51, 1.0) == pytest.approx(0.5)
    assert learning_rate_at(1.0, 1.0) == pytest.approx(0.0)


def test_average_follows_as_a_plain_loop_does() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = copy.deepcopy(model)
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    for step in range(30):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        model(torch.randn(4, 2))
        update_average(average, model, 0.8, step)
        weight = min(0.8, (1 + step) / (10 + step))
        expected = [
            weight * old + (1 - weight) * new.detach() for old, new in zip(expected, model.parameters(), strict=True)
        ]
    for kept, wanted in zip(average.parameters(), expected, strict=True):
        torch.testing.assert_close(kept, wanted)
    for copied, original in zip(average.buffers(), model.buffers(), strict=True):
        assert torch.equal(copied, original)
