"""Pocket-XL's U-Net: predicts noise under two encoders' text, pooled text and the picture's sizes and crop."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from transformers import CLIPTokenizer

from cat_cluster.models.pocket_xl import world
from cat_cluster.models.pocket_xl.captions import scene_caption
from cat_cluster.models.pocket_xl.emojis import Emoji
from cat_cluster.models.pocket_xl.pretraining.albums import Shape, draw_rows, frame_of, random_scenes, rows_by_shape
from cat_cluster.models.pocket_xl.pretraining.recipe import Recipe
from cat_cluster.models.pocket_xl.pretraining.text import encode_texts
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

_SHARD = 2_000  # scenes whose latents are kept in one file
_EMPTY = 0.10  # share of rows without a caption; half of them as zeros, as SDXL's pipeline leaves out a prompt
_TIME_IDS = 6


def new_unet(recipe: Recipe) -> UNet2DConditionModel:
    """An untrained U-Net of SDXL's kind: as there, the first level has no attention."""
    attending = len(recipe.unet_channels) - 1
    return UNet2DConditionModel(
        sample_size=world.SIZE // 4,
        in_channels=recipe.vae_latent_channels,
        out_channels=recipe.vae_latent_channels,
        block_out_channels=recipe.unet_channels,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * attending),
        up_block_types=(*("CrossAttnUpBlock2D",) * attending, "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=1,
        cross_attention_dim=recipe.first_width + recipe.clip_width,
        attention_head_dim=recipe.unet_heads,  # diffusers' name for the number of heads
        norm_num_groups=recipe.unet_groups,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=recipe.unet_time_width,
        projection_class_embeddings_input_dim=recipe.clip_width + _TIME_IDS * recipe.unet_time_width,
    )


def new_scheduler() -> EulerDiscreteScheduler:
    """Stable Diffusion XL's noise schedule and sampler."""
    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )


def train_unet(
    recipe: Recipe,
    emojis: Sequence[Emoji],
    vae: AutoencoderKL,
    encoders: Sequence[nn.Module],
    tokenizers: Sequence[CLIPTokenizer],
    stage: Stage,
) -> tuple[UNet2DConditionModel, StageProgress]:
    """Train on kept latents of the world's scenes, captions drawn afresh each time; returns the averaged model."""
    device, seed = stage.device, stage.seed
    torch.manual_seed(seed)
    scenes = random_scenes(emojis, recipe.unet_scenes, seed + 2)
    rows = rows_by_shape(scenes)
    latents = kept_latents(vae, scenes, emojis, stage.checkpoint.with_name("latents"))
    model = new_unet(recipe).to(device=device, memory_format=torch.channels_last)
    model.set_attn_processor(AttnProcessor())  # faster than the fused kernel on a CPU at this size
    average = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.unet_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    alphas = new_scheduler().alphas_cumprod.to(device)
    predict = torch.compile(model) if stage.compiled else model

    def step(index: int, progress: float) -> torch.Tensor:
        rng = np.random.default_rng([seed, 4, index])
        chosen = draw_rows(rows, rng, recipe.unet_batch)
        texts = [scene_caption(scenes[row], emojis, rng) for row in chosen]
        states, pooled = _with_gaps(encoders, tokenizers, texts, rng)
        ids = torch.tensor([scenes[row].time_ids for row in chosen], dtype=torch.float32, device=device)
        clean = torch.stack([latents[row] for row in chosen]).to(device).float()
        batch = add_noise(clean.contiguous(memory_format=torch.channels_last), alphas, rng)
        with half_precision(device):
            added = {"text_embeds": pooled, "time_ids": ids}
            predicted = predict(batch.noisy, batch.steps, states, added_cond_kwargs=added).sample
        loss = snr_weighted(predicted.float(), batch.noise, batch.alpha)
        optimise(loss, model, optimiser, learning_rate_at(progress, recipe.unet_rate))
        update_average(average, model, recipe.unet_ema, index)
        return loss

    state = {"model": model, "average": average, "optimiser": optimiser}
    ended = run_stage(stage, recipe.unet_steps, state, step)
    return average.eval(), ended


def kept_latents(
    vae: AutoencoderKL, scenes: Sequence[world.Scene], emojis: Sequence[Emoji], folder: Path
) -> list[torch.Tensor]:
    """Scaled latents fp16 [C, H/4, W/4] of each scene, kept in files: encoding them takes minutes on a CPU."""
    folder.mkdir(parents=True, exist_ok=True)
    latents: list[torch.Tensor] = []
    for start in range(0, len(scenes), _SHARD):
        shard = folder / f"{start:07}.pt"
        if not shard.exists():
            partial = shard.with_suffix(".partial")
            torch.save(_encoded(vae, scenes[start : start + _SHARD], emojis), partial)
            os.replace(partial, shard)
        latents += torch.load(shard, weights_only=True)
    return latents


def _encoded(vae: AutoencoderKL, scenes: Sequence[world.Scene], emojis: Sequence[Emoji]) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    shapes: dict[Shape, np.ndarray] = rows_by_shape(scenes)
    for rows in shapes.values():
        frames = torch.stack([frame_of(scenes[row], emojis) for row in rows])
        scaled = (encode_frames(vae, frames) * vae.config.scaling_factor).half()
        found.update({int(row): latent.clone() for row, latent in zip(rows, scaled, strict=True)})
    return [found[row] for row in range(len(scenes))]


def _with_gaps(
    encoders: Sequence[nn.Module], tokenizers: Sequence[CLIPTokenizer], texts: Sequence[str], rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text states and pooled text, of some rows the empty prompt's and of some zeros."""
    gap = rng.random(len(texts))
    states, pooled = encode_texts(
        encoders, tokenizers, ["" if hole < _EMPTY / 2 else text for hole, text in zip(gap, texts, strict=True)]
    )
    zeros = torch.from_numpy((gap >= _EMPTY / 2) & (gap < _EMPTY)).to(states.device)
    return states.masked_fill(zeros[:, None, None], 0.0), pooled.masked_fill(zeros[:, None], 0.0)
