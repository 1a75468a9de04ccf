"""Training of Pocket-SD's VAE: pictures [B, 3, 64, 64] to latents [B, 8, 16, 16] and back."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL

from cat_cluster.models.pocket.pretraining.recipe import Recipe
from cat_cluster.models.pocket.pretraining.scenes import random_scenes, render
from cat_cluster.models.pocket.world import SIZE
from cat_cluster.models.pretraining.stage import Stage, StageProgress
from cat_cluster.models.pretraining.vae import crops_around, fit_vae, new_vae


def train_vae(recipe: Recipe, stage: Stage) -> tuple[AutoencoderKL, StageProgress]:
    """Train on crops around the object, then on whole frames; the averaged model comes with its scaling factor."""
    scenes = random_scenes(recipe.scenes, stage.seed)
    frames = render(scenes)
    centres = np.array([(scene.x, scene.y) for scene in scenes])

    def whole(rng: np.random.Generator, count: int) -> torch.Tensor:
        return frames[rng.integers(len(frames), size=count)]

    def crops(rng: np.random.Generator, count: int) -> torch.Tensor:
        rows = rng.integers(len(frames), size=count)
        return crops_around(frames[rows], centres[rows], recipe.vae_crop, rng)

    torch.manual_seed(stage.seed)
    model = new_vae(recipe.vae_channels, recipe.vae_latent_channels, SIZE)
    return fit_vae(recipe, stage, model, whole, crops, frames[:2048])
