from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from cat_cluster.models.pretraining.results import result, stages
from cat_cluster.models.pretraining.stage import Stage, StageProgress


def _train(stage: Stage) -> tuple[nn.Linear, StageProgress]:
    model = nn.Linear(2, 2)
    for step in (1, 2):
        stage.report(StageProgress(stage.name, step, step / 2, float(step), 3.0 / step))
    return model, StageProgress(stage.name, 2, 1.0, 2.0, 1.5)


def _save(model: nn.Linear, folder: Path) -> None:
    folder.mkdir()
    torch.save({name: tensor.half() for name, tensor in model.state_dict().items()}, folder / "weights.pt")


def _load(folder: Path) -> nn.Linear:
    model = nn.Linear(2, 2)
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return model


def test_a_stage_ends_with_the_model_of_its_file_whether_it_was_trained_now_or_before(tmp_path: Path) -> None:
    with stages(tmp_path, {"a": 1.0}, minutes=None, device="cpu", seed=0, compile=False) as stage:
        first = result(stage("a"), _load, _save, _train)
        again = result(stage("a"), _load, _save, _train)
    assert torch.equal(first.weight, again.weight)  # to the bit, although the file holds halves
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "stage": "a",
        "step": 2,
        "progress": 1.0,
        "seconds": 2.0,
        "loss": 1.5,
    }


def test_the_log_has_the_first_step_and_the_last(tmp_path: Path) -> None:
    with stages(tmp_path, {"a": 1.0}, minutes=None, device="cpu", seed=0, compile=False) as stage:
        result(stage("a"), _load, _save, _train)
    lines = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"], line["loss"]) for line in lines] == [("a", 1, 3.0), ("a", 2, 1.5)]


def test_stages_share_the_minutes(tmp_path: Path) -> None:
    with stages(tmp_path, {"a": 1.0, "b": 3.0}, minutes=8.0, device="cpu", seed=5, compile=True) as stage:
        first, second = stage("a"), stage("b")
    assert (first.seconds, second.seconds) == (120.0, 360.0)
    assert (first.checkpoint, first.seed, first.compiled) == (tmp_path / "a.pt", 5, True)
