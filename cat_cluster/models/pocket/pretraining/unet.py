"""Pocket-SD's U-Net: predicts the noise in latents [B, 8, 16, 16] under text [B, L, D]."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from transformers import CLIPTokenizer

from cat_cluster.models.pocket import world
from cat_cluster.models.pocket.pretraining.captions import scene_caption
from cat_cluster.models.pocket.pretraining.recipe import Recipe
from cat_cluster.models.pocket.pretraining.scenes import random_scenes, render
from cat_cluster.models.pretraining.clip import tokenize
from cat_cluster.models.pretraining.noise import add_noise, snr_weighted
from cat_cluster.models.pretraining.stage import (
    Stage,
    StageProgress,
    half_precision,
    learning_rate_at,
    optimise,
    run_stage,
    update_average,
)
from cat_cluster.models.pretraining.vae import encode_frames

_EMPTY_SHARE = 0.1


def new_unet(recipe: Recipe) -> UNet2DConditionModel:
    """An untrained U-Net with cross-attention at both levels."""
    return UNet2DConditionModel(
        sample_size=world.SIZE // 4,
        in_channels=recipe.vae_latent_channels,
        out_channels=recipe.vae_latent_channels,
        block_out_channels=recipe.unet_channels,
        down_block_types=("CrossAttnDownBlock2D",) * len(recipe.unet_channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(recipe.unet_channels),
        layers_per_block=1,
        cross_attention_dim=recipe.clip_width,
        attention_head_dim=recipe.unet_head_dim,
        norm_num_groups=recipe.unet_groups,
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def train_unet(
    recipe: Recipe,
    vae: AutoencoderKL,
    encoder: nn.Module,
    tokenizer: CLIPTokenizer,
    stage: Stage,
) -> tuple[UNet2DConditionModel, StageProgress]:
    """Train on cached latents of the world's scenes, captions drawn afresh each time; returns the averaged model."""
    device, seed = stage.device, stage.seed
    torch.manual_seed(seed)
    scenes = random_scenes(recipe.scenes, seed)
    latents = _cached_latents(vae, scenes, stage.checkpoint.with_name("latents.pt"))
    model = new_unet(recipe).to(device=device, memory_format=torch.channels_last)
    model.set_attn_processor(AttnProcessor())  # faster than the fused kernel on a CPU at this size
    average = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.unet_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    alphas = new_scheduler().alphas_cumprod.to(device)
    predict = torch.compile(model) if stage.compiled else model

    def step(index: int, progress: float) -> torch.Tensor:
        rng = np.random.default_rng([seed, 4, index])
        rows = rng.integers(len(scenes), size=recipe.unet_batch)
        texts = [
            "" if rng.random() < _EMPTY_SHARE else scene_caption(scenes[row], rng, rare=recipe.unet_unknown_words)
            for row in rows
        ]
        text = encode_texts(encoder, tokenizer, texts)
        clean = latents[rows].to(device).contiguous(memory_format=torch.channels_last)
        batch = add_noise(clean, alphas, rng)
        with half_precision(device):
            predicted = predict(batch.noisy, batch.steps, text).sample
        loss = snr_weighted(predicted.float(), batch.noise, batch.alpha)
        optimise(loss, model, optimiser, learning_rate_at(progress, recipe.unet_rate))
        update_average(average, model, recipe.unet_ema, index)
        return loss

    state = {"model": model, "average": average, "optimiser": optimiser}
    ended = run_stage(stage, recipe.unet_steps, state, step)
    return average.eval(), ended


def _cached_latents(vae: AutoencoderKL, scenes: Sequence[world.Scene], cache: Path) -> torch.Tensor:
    """Scaled latents [N, C, 16, 16] of the scenes, kept in a file: encoding them takes minutes on a CPU."""
    if cache.exists():
        kept: torch.Tensor = torch.load(cache, weights_only=True)
        return kept
    latents: torch.Tensor = encode_frames(vae, render(scenes)) * vae.config.scaling_factor
    partial = cache.with_suffix(".partial")
    torch.save(latents, partial)
    os.replace(partial, cache)
    return latents


@torch.no_grad()
def encode_texts(encoder: nn.Module, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Text states [N, L, D] as the stock pipeline makes them: padded to the full length, no attention mask."""
    device = next(encoder.parameters()).device
    states: torch.Tensor = encoder(tokenize(tokenizer, texts).to(device)).last_hidden_state
    return states
