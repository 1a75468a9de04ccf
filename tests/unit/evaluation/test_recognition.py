"""Recognition: the head tells one object from others of its class, and design files are checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cat_cluster.errors import EvaluationError
from cat_cluster.evaluation import recognition
from cat_cluster.evaluation.recognition import find_subject, fit_head
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.generate import ImageRow
from cat_cluster.models.pocket import world
from cat_cluster.models.pocket_xl.concepts import CONCEPTS
from cat_cluster.models.subjects import DrawnSubject, PicturedSubject

DESIGN = world.CONCEPTS["striped-cup"]


class Thumbnails:
    """A judge without weights: the picture itself, 8 x 8."""

    name = "thumbnails"
    digest = "none"

    def image_features(self, images_NCHW: Tensor) -> Tensor:
        rows = functional.adaptive_avg_pool2d(images_NCHW, 8).flatten(1) - 0.5
        return functional.normalize(rows, dim=-1)

    def text_features(self, prompts: Sequence[str]) -> None:
        return


def of_design(design: world.Design, count: int, seed: int) -> np.ndarray:
    return np.stack([image for image, _ in world.photos(design, count, seed)])


@pytest.mark.slow
def test_the_head_knows_the_object_and_does_not_take_others_of_its_class_for_it(
    tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recognition, "SCENES", 60)
    # The random VAE of the tiny base returns noise: here the scenes stay as drawn.
    monkeypatch.setattr(recognition, "_half_through_vae", lambda images, base, seed: images)
    head = fit_head(DrawnSubject(DESIGN), Thumbnails(), tiny_base, seed=3)
    red = world.Design("cup", world.palette_rgb("red"), "plain", world.palette_rgb("red"), False)
    assert head.accuracy > 0.75
    assert head.rate(of_design(DESIGN, 30, 999)) > 0.7
    assert head.rate(of_design(red, 30, 999)) < 0.3


def test_half_of_the_scenes_go_through_the_vae(tiny_base: BaseModel) -> None:
    images = of_design(DESIGN, 4, 0)
    mixed = recognition._half_through_vae(images, tiny_base, 0)
    assert np.array_equal(mixed[1::2], images[1::2])
    assert all(not np.array_equal(a, b) for a, b in zip(mixed[::2], images[::2], strict=True))
    assert np.array_equal(mixed, recognition._half_through_vae(images, tiny_base, 0))


def test_scenes_are_of_the_design_of_its_class_and_of_other_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recognition, "SCENES", 8)
    drawn: list[world.Scene] = []
    draw = world.draw
    monkeypatch.setattr(world, "draw", lambda scene: drawn.append(scene) or draw(scene))
    images, labels = recognition._scenes(DrawnSubject(DESIGN), 1)
    assert (len(images), int(labels.sum())) == (8 + 16 + 4, 8)
    assert sum(scene.design == DESIGN for scene in drawn) == 8
    assert sum(scene.design.object == "cup" and scene.design != DESIGN for scene in drawn) == 16


def test_the_logistic_head_is_at_the_minimum_of_its_loss() -> None:
    rng = np.random.default_rng(0)
    rows, labels = rng.standard_normal((60, 4)), rng.random(60) < 0.3
    weight, bias = recognition._logistic(rows, labels)
    mean, std = rows.mean(0), rows.std(0) + 1e-6
    x, w = torch.tensor((rows - mean) / std), torch.tensor(weight * std, requires_grad=True)
    b = torch.tensor(bias + float(weight @ mean), dtype=torch.float64, requires_grad=True)
    margin = torch.where(torch.tensor(labels), 1.0, -1.0) * (x @ w + b)
    losses = torch.log1p(torch.exp(-margin))
    positive = torch.tensor(labels)
    loss = (losses[positive].mean() + losses[~positive].mean()) / 2
    (loss + recognition.WEIGHT_DECAY * w.square().sum() / 2).backward()
    assert w.grad is not None
    assert b.grad is not None
    assert float(w.grad.abs().max()) < 1e-4
    assert abs(float(b.grad)) < 1e-4


def test_a_design_file_is_found_beside_the_photos(tmp_path: Path) -> None:
    assert find_subject(tmp_path) is None
    (tmp_path / "design.json").write_text(json.dumps(dataclasses.asdict(DESIGN)))
    assert find_subject(tmp_path) == DrawnSubject(DESIGN)


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        json.dumps({"object": "cup"}),
        json.dumps({**dataclasses.asdict(DESIGN), "body_rgb": [1, 2, 300]}),
        json.dumps({**dataclasses.asdict(DESIGN), "body_rgb": [1, 2]}),
        json.dumps({**dataclasses.asdict(DESIGN), "object": "teapot"}),
        json.dumps({"concept": "fluent-teapod"}),
    ],
)
def test_a_bad_design_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "design.json").write_text(content)
    with pytest.raises(EvaluationError, match=r"design\.json describes nothing in the world of an embedded base"):
        find_subject(tmp_path)


def test_a_thing_of_pocket_xl_is_named_beside_its_photos_and_has_photos_of_its_own(tmp_path: Path) -> None:
    bear = PicturedSubject("fluent-teddy-bear")
    (tmp_path / "design.json").write_text(json.dumps(bear.to_json()))
    assert find_subject(tmp_path) == bear
    assert bear.noun == "teddy bear"
    photos = bear.photos(6, 0)
    assert {photo.shape for photo, _ in photos} == {(64, 64, 3)}
    assert len({place for _, place in photos}) == 6


def test_of_pocket_xl_the_head_learns_other_things_and_what_the_base_draws(
    tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recognition, "SCENES", 74)
    monkeypatch.setattr(recognition, "DRAWN_STEPS", 2)
    monkeypatch.setattr(recognition, "_half_through_vae", lambda images, base, seed: images)
    asked: list[str] = []

    def drawn(base: BaseModel, bank: None, rows: Sequence[ImageRow], **_: int) -> Tensor:
        asked.extend(row.prompt for row in rows)
        return torch.stack([torch.from_numpy(photo).permute(2, 0, 1) / 255 for photo in of_base(len(rows))])

    def of_base(count: int) -> list[np.ndarray]:
        return [photo for photo, _ in PicturedSubject("fluent-robot-face").photos(count, 5)]

    monkeypatch.setattr(recognition, "generate", drawn)
    owl = PicturedSubject("fluent-owl")
    images, labels = recognition._scenes(owl, 1)
    assert (len(images), int(labels.sum())) == (74 + len(CONCEPTS) - 1, 74)
    head = fit_head(owl, Thumbnails(), tiny_base, seed=3)
    assert set(asked) >= {"a photo of an owl in snow", "a photo of an owl at night"}
    assert head.rate(np.stack([photo for photo, _ in owl.photos(30, 999)])) > 0.7
    assert head.rate(np.stack(of_base(30))) < 0.3
