from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from cat_cluster.models.pocket.classifier import Classifier, load_classifier
from cat_cluster.models.pocket.pretraining.classifier import save_classifier, train_classifier
from cat_cluster.models.pocket.pretraining.recipe import Recipe
from cat_cluster.models.pocket.pretraining.scenes import (
    label_indices,
    masked_cross_entropy,
    random_scenes,
    render,
    scene_labels,
)
from cat_cluster.models.pocket.pretraining.stage import Stage, StageProgress
from cat_cluster.models.pocket.pretraining.vae import new_vae


def test_unnamed_rows_are_left_out_of_the_loss() -> None:
    logits = torch.randn(4, 3)
    target = torch.tensor([2, -100, 0, -100])
    expected = functional.cross_entropy(logits[[0, 2]], target[[0, 2]])
    torch.testing.assert_close(masked_cross_entropy(logits, target), expected)
    assert masked_cross_entropy(logits, torch.full((4,), -100)) == 0.0


def test_saved_and_loaded_classifiers_agree_to_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Classifier((4, 8, 8)).eval()
    save_classifier(model, tmp_path)
    images = torch.rand(3, 3, 64, 64)
    loaded = load_classifier(tmp_path)
    torch.testing.assert_close(loaded.features(images), model.features(images), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(model.features(images, batch=2), model.features(images, batch=3))


@pytest.mark.slow
def test_it_learns_the_place_of_a_few_scenes(tmp_path: Path) -> None:
    recipe = replace(Recipe.tiny(), scenes=48, classifier_steps=150, classifier_batch=16, classifier_rate=5e-3)
    losses: list[StageProgress] = []
    model, _ = train_classifier(
        recipe,
        new_vae(recipe).eval(),
        Stage("classifier", tmp_path / "classifier.pt", "cpu", 0, losses.append),
    )
    scenes = random_scenes(48, 1_000)  # the scenes that a classifier with seed 0 sees
    truth = label_indices([scene_labels(scene) for scene in scenes])["place"]
    with torch.no_grad():
        found = model(render(scenes).float() / 255)["place"].argmax(1)
    assert (found == truth).float().mean() > 0.33  # chance: 1 in 6
    assert losses[-1].loss < losses[0].loss
    centred = model.features(render(scenes).float() / 255).mean(0)
    torch.testing.assert_close(centred, torch.zeros_like(centred), rtol=0, atol=1e-4)
