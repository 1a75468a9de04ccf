"""Training of Pocket-XL's VAE: pictures [B, 3, H, W] to latents [B, 8, H/4, W/4] and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL

from cat_cluster.models.pocket import weights_path
from cat_cluster.models.pocket_xl.emojis import Emoji
from cat_cluster.models.pocket_xl.pretraining.albums import make_album
from cat_cluster.models.pocket_xl.pretraining.recipe import Recipe
from cat_cluster.models.pocket_xl.world import SIZE
from cat_cluster.models.pretraining.stage import Stage, StageProgress
from cat_cluster.models.pretraining.vae import fit_vae


def train_vae(recipe: Recipe, emojis: Sequence[Emoji], stage: Stage) -> tuple[AutoencoderKL, StageProgress]:
    """Train Pocket-SD's VAE on, first on crops around things, then on whole frames; its scaling factor is its own.

    Half of the rows have other colours than the world's: a thing that is not of it must come through, too.
    """
    album = make_album(emojis, recipe.vae_scenes, stage.seed)

    def whole(rng: np.random.Generator, count: int) -> torch.Tensor:
        return other_colours(album.whole(rng, count), rng)

    def crops(rng: np.random.Generator, count: int) -> torch.Tensor:
        return other_colours(album.crops(rng, count, recipe.vae_crop), rng)

    square = album.rows[SIZE, SIZE][:2048]
    sample = torch.stack([album.frames[row] for row in square])
    start = AutoencoderKL.from_pretrained(weights_path() / "vae")
    return fit_vae(recipe, stage, start, whole, crops, sample)


def other_colours(frames: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Half of the rows [N, 3, H, W] with their channels in another order, each a little stronger or weaker."""
    changed = frames.clone()
    for row in np.nonzero(rng.random(len(frames)) < 0.5)[0]:
        strength = torch.from_numpy(rng.uniform(0.75, 1.15, size=(3, 1, 1)).astype(np.float32))
        order = torch.from_numpy(rng.permutation(3))
        changed[row] = (frames[row][order].float() * strength).round().clamp(0, 255).to(torch.uint8)
    return changed
