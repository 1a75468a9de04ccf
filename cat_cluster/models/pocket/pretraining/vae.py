"""Pocket-SD's VAE: pictures [B, 3, 64, 64] to latents [B, 8, 16, 16] and back."""

from __future__ import annotations

import copy

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from cat_cluster.models.pocket import world
from cat_cluster.models.pocket.pretraining.recipe import Recipe
from cat_cluster.models.pocket.pretraining.scenes import random_scenes, render
from cat_cluster.models.pocket.pretraining.stage import (
    Stage,
    StageProgress,
    learning_rate_at,
    optimise,
    run_stage,
    update_average,
)


def new_vae(recipe: Recipe) -> AutoencoderKL:
    """An untrained VAE: 4x down, no attention, one normalisation group.

    Many GroupNorm groups take the channel means away, and colour lives in them: with one group it is learnt early.
    """
    levels = len(recipe.vae_channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=recipe.vae_channels,
        layers_per_block=1,
        latent_channels=recipe.vae_latent_channels,
        norm_num_groups=1,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
    )


def train_vae(recipe: Recipe, stage: Stage) -> tuple[AutoencoderKL, StageProgress]:
    """Train on crops around the object, then on whole frames; the averaged model comes with its scaling factor."""
    device, seed = stage.device, stage.seed
    torch.manual_seed(seed)
    scenes = random_scenes(recipe.scenes, seed)
    frames = render(scenes)
    centres = np.array([(scene.x, scene.y) for scene in scenes])
    model = new_vae(recipe).to(device=device, memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.vae_rate, betas=(0.9, 0.99), weight_decay=1e-4)

    def step(index: int, progress: float) -> torch.Tensor:
        rng = np.random.default_rng([seed, 2, index])
        whole = progress >= 1 - recipe.vae_frame_share
        rows = rng.integers(len(frames), size=max(1, recipe.vae_batch // 2) if whole else recipe.vae_batch)
        pixels = frames[rows] if whole else _crops(frames, centres, rows, recipe.vae_crop, rng)
        pixels = (pixels.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16, enabled=not whole):  # half the time; the end is in fp32
            loss = _loss(model, pixels, recipe, np.random.default_rng([seed, 3, index]), noisy=progress >= 0.5)
        optimise(loss, model, optimiser, learning_rate_at(progress, recipe.vae_rate))
        update_average(average, model, 0.998, index)
        return loss

    state = {"model": model, "average": average, "optimiser": optimiser}
    ended = run_stage(stage, recipe.vae_steps, state, step)
    average.eval()
    deviation = float(encode_frames(average, frames[:2048]).std())
    average.register_to_config(scaling_factor=round(1 / deviation, 5))
    return average, ended


@torch.no_grad()
def encode_frames(vae: AutoencoderKL, frames: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """Unscaled latent means [N, C, 16, 16] of uint8 frames [N, 3, 64, 64]."""
    device = next(vae.parameters()).device
    chunks = [frames[i : i + batch].to(device).float() / 127.5 - 1 for i in range(0, len(frames), batch)]
    return torch.cat([vae.encode(chunk).latent_dist.mean.cpu() for chunk in chunks])


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """Pictures [N, 3, 64, 64] in [0, 1] of unscaled latents [N, C, 16, 16]."""
    device = next(vae.parameters()).device
    chunks = [vae.decode(latents[i : i + batch].to(device)).sample.cpu() for i in range(0, len(latents), batch)]
    return (torch.cat(chunks) / 2 + 0.5).clamp(0, 1)


def _crops(
    frames: torch.Tensor, centres: np.ndarray, rows: np.ndarray, side: int, rng: np.random.Generator
) -> torch.Tensor:
    corners = centres[rows] - side / 2 + rng.uniform(-side / 2, side / 2, size=(len(rows), 2))
    corners = np.clip(np.rint(corners), 0, world.SIZE - side).astype(int)
    return torch.stack([frames[row, :, y : y + side, x : x + side] for row, (x, y) in zip(rows, corners, strict=True)])


def _loss(
    model: AutoencoderKL, pixels: torch.Tensor, recipe: Recipe, rng: np.random.Generator, *, noisy: bool
) -> torch.Tensor:
    """L1 + 2 MSE + KL; noise on the latents (from half of the training on) teaches the decoder to forgive a U-Net."""
    posterior = model.encode(pixels).latent_dist
    latents = posterior.mean
    if noisy:
        noise = torch.from_numpy(rng.standard_normal(tuple(latents.shape), dtype=np.float32)).to(latents.device)
        amount = torch.from_numpy(rng.uniform(0, 0.1, size=(len(latents), 1, 1, 1)).astype(np.float32))
        spread = latents.detach().std() * amount.to(latents.device)
        latents = latents + noise * (posterior.std**2 + spread**2).sqrt()
    decoded = model.decode(latents).sample.float()
    per_crop = (recipe.vae_crop / pixels.shape[-1]) ** 2  # kl() sums: keep its weight per latent on whole frames
    kl: torch.Tensor = posterior.kl().float().mean() * per_crop
    loss: torch.Tensor = functional.l1_loss(decoded, pixels) + 2 * functional.mse_loss(decoded, pixels)
    return loss + recipe.vae_kl * kl
