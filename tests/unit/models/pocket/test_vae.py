from __future__ import annotations

from pathlib import Path

import torch

from cat_cluster.models.pocket.pretraining.recipe import Recipe
from cat_cluster.models.pocket.pretraining.scenes import random_scenes, render
from cat_cluster.models.pocket.pretraining.vae import train_vae
from cat_cluster.models.pretraining.stage import Stage, StageProgress
from cat_cluster.models.pretraining.vae import decode_latents, encode_frames, new_vae


def test_latents_are_four_times_smaller_and_pictures_come_back_in_range() -> None:
    vae = new_vae((8, 8, 8), 8, 64).eval()
    frames = render(random_scenes(3, 0))
    latents = encode_frames(vae, frames, batch=2)
    assert latents.shape == (3, 8, 16, 16)
    pictures = decode_latents(vae, latents * 100, batch=2)
    assert pictures.shape == (3, 3, 64, 64)
    assert pictures.min() >= 0
    assert pictures.max() <= 1


def test_batches_do_not_change_latents() -> None:
    vae = new_vae((8, 8, 8), 8, 64).eval()
    frames = render(random_scenes(5, 0))
    torch.testing.assert_close(encode_frames(vae, frames, batch=2), encode_frames(vae, frames, batch=5))


def test_the_scaling_factor_gives_latents_unit_deviation(tmp_path: Path) -> None:
    recipe, reports = Recipe.tiny(), list[StageProgress]()
    vae, ended = train_vae(recipe, Stage("vae", tmp_path / "vae.pt", "cpu", 0, reports.append))
    frames = render(random_scenes(recipe.scenes, 0))
    scaled = encode_frames(vae, frames) * vae.config.scaling_factor
    torch.testing.assert_close(scaled.std(), torch.tensor(1.0), rtol=1e-3, atol=0)
    assert ended.step == recipe.vae_steps == len(reports)
