"""A base's VAE: pictures [B, 3, H, W] to latents [B, C, H/f, W/f] and back, f = 4 with three levels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from cat_cluster.models.pretraining.stage import (
    Stage,
    StageProgress,
    half_precision,
    learning_rate_at,
    optimise,
    run_stage,
    update_average,
)


class VaeRecipe(Protocol):
    """The numbers of a VAE's training."""

    @property
    def vae_steps(self) -> int: ...
    @property
    def vae_batch(self) -> int: ...
    @property
    def vae_crop(self) -> int: ...
    @property
    def vae_frame_share(self) -> float: ...
    @property
    def vae_rate(self) -> float: ...
    @property
    def vae_kl(self) -> float: ...


# Rows of uint8 [N, 3, H, W]: whole frames of one shape, or crops around the things in them.
Whole = Callable[[np.random.Generator, int], torch.Tensor]


def new_vae(channels: Sequence[int], latent_channels: int, sample_size: int) -> AutoencoderKL:
    """An untrained VAE: no attention, one normalisation group; `sample_size` is the side of a square frame.

    Many GroupNorm groups take the channel means away, and colour lives in them: with one group it is learnt early.
    """
    levels = len(channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=1,
        sample_size=sample_size,
        mid_block_add_attention=False,
    )


def fit_vae(
    recipe: VaeRecipe,
    stage: Stage,
    model: AutoencoderKL,
    whole: Whole,
    crops: Whole,
    sample: torch.Tensor,
) -> tuple[AutoencoderKL, StageProgress]:
    """Train `model` on `crops`, then on `whole` frames; its average comes with the scaling factor of `sample`.

    `whole` and `crops` draw that many rows with a generator; `sample` are uint8 frames [N, 3, S, S].
    """
    device, seed = stage.device, stage.seed
    model = model.to(device=device, memory_format=torch.channels_last).train()
    average = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.vae_rate, betas=(0.9, 0.99), weight_decay=1e-4)

    def step(index: int, progress: float) -> torch.Tensor:
        rng = np.random.default_rng([seed, 2, index])
        on_frames = progress >= 1 - recipe.vae_frame_share
        rows = whole(rng, max(1, recipe.vae_batch // 2)) if on_frames else crops(rng, recipe.vae_batch)
        pixels = (rows.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with half_precision(device, enabled=not on_frames):  # half the time; the end is in fp32
            loss = _loss(model, pixels, recipe, np.random.default_rng([seed, 3, index]), noisy=progress >= 0.5)
        optimise(loss, model, optimiser, learning_rate_at(progress, recipe.vae_rate))
        update_average(average, model, 0.998, index)
        return loss

    state = {"model": model, "average": average, "optimiser": optimiser}
    ended = run_stage(stage, recipe.vae_steps, state, step)
    average.eval()
    deviation = float(encode_frames(average, sample).std())
    average.register_to_config(scaling_factor=round(1 / deviation, 5))
    return average, ended


@torch.no_grad()
def encode_frames(vae: AutoencoderKL, frames: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """Unscaled latent means [N, C, H/f, W/f] of uint8 frames [N, 3, H, W]."""
    device = next(vae.parameters()).device
    chunks = [frames[i : i + batch].to(device).float() / 127.5 - 1 for i in range(0, len(frames), batch)]
    return torch.cat([vae.encode(chunk).latent_dist.mean.cpu() for chunk in chunks])


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """Pictures [N, 3, H, W] in [0, 1] of unscaled latents [N, C, H/f, W/f]."""
    device = next(vae.parameters()).device
    chunks = [vae.decode(latents[i : i + batch].to(device)).sample.cpu() for i in range(0, len(latents), batch)]
    return (torch.cat(chunks) / 2 + 0.5).clamp(0, 1)


def crops_around(
    frames: Sequence[torch.Tensor] | torch.Tensor, centres: np.ndarray, side: int, rng: np.random.Generator
) -> torch.Tensor:
    """One square uint8 [N, 3, side, side] of each frame [3, H, W], near its centre (x, y) of `centres` [N, 2]."""
    corners = centres - side / 2 + rng.uniform(-side / 2, side / 2, size=(len(frames), 2))
    found = []
    for frame, corner in zip(frames, np.rint(corners).astype(int), strict=True):
        x, y = (int(np.clip(low, 0, length - side)) for low, length in zip(corner, frame.shape[:0:-1], strict=True))
        found.append(frame[:, y : y + side, x : x + side])
    return torch.stack(found)


def _loss(
    model: AutoencoderKL, pixels: torch.Tensor, recipe: VaeRecipe, rng: np.random.Generator, *, noisy: bool
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
    per_crop = recipe.vae_crop**2 / (pixels.shape[-1] * pixels.shape[-2])  # kl() sums: its weight is per latent
    kl: torch.Tensor = posterior.kl().float().mean() * per_crop
    loss: torch.Tensor = functional.l1_loss(decoded, pixels) + 2 * functional.mse_loss(decoded, pixels)
    return loss + recipe.vae_kl * kl
