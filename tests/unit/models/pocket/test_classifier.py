from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from cat_cluster.models.base_model import load_base_model
from cat_cluster.models.pocket.classifier import Classifier, load_classifier
from cat_cluster.models.pocket.pretraining.classifier import train_classifier
from cat_cluster.models.pocket.pretraining.recipe import Recipe
from cat_cluster.models.pocket.pretraining.scenes import (
    label_indices,
    masked_cross_entropy,
    random_scenes,
    render,
    scene_labels,
)
from cat_cluster.models.pretraining.classifier import save_classifier
from cat_cluster.models.pretraining.stage import Stage, StageProgress


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
def test_it_learns_a_few_scenes_by_heart(tmp_path: Path) -> None:
    """Of objects, colours and places it names most, of which a guess would be right for one in six or fewer."""
    channels = (8, 16, 16)
    recipe = replace(
        Recipe.tiny(),
        scenes=16,
        classifier_channels=channels,
        classifier_decoded=16,
        classifier_steps=150,
        classifier_batch=16,
        classifier_rate=1e-2,
    )
    losses: list[StageProgress] = []
    stage = Stage("classifier", tmp_path / "classifier.pt", "cpu", 0, losses.append)
    model, _ = train_classifier(recipe, load_base_model("pocket").vae, stage)
    scenes = random_scenes(16, 1_000)  # the scenes that a classifier with seed 0 sees
    truth = label_indices([scene_labels(scene) for scene in scenes])
    pictures = render(scenes).float() / 255
    with torch.no_grad():
        found = model(pictures)
    right = [float((found[name].argmax(1) == truth[name]).float().mean()) for name in ("object", "colour", "place")]
    assert sum(right) / 3 > 0.5, right
    assert losses[-1].loss < losses[0].loss / 1.5
    centred = model.features(pictures).mean(0)
    torch.testing.assert_close(centred, torch.zeros_like(centred), rtol=0, atol=1e-4)
