"""A tiny random Stable Diffusion XL, a diffusers folder in the layout of the release."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.conftest import write_tiny_tokenizer

# The scheduler_config.json of Stable Diffusion XL 1.0.
XL_SCHEDULER: Mapping[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
# As in NoobAI XL v-pred: v-prediction on a schedule that ends in pure noise.
ZERO_SNR: Mapping[str, Any] = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
POOLED = 20


def write_tiny_xl_base(
    folder: Path, *, scheduler_config: Mapping[str, Any] | None = None, force_zeros: bool = True, seed: int = 0
) -> Path:
    """Write all parts and model_index.json: 4 latent channels of 8 x 8, images of 16 x 16 pixels."""
    write_tiny_tokenizer(folder / "tokenizer")
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):  # the second one pads with "!"
        path = folder / "tokenizer_2" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "!"}))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = {"unet": _unet(), "vae": _vae(), **_text_encoders(folder)}
    for name, module in parts.items():
        module.save_pretrained(folder / name)
    (folder / "scheduler").mkdir()
    config = {**XL_SCHEDULER, **(scheduler_config or {})}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config, indent=2))
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": "0.35.0",
        "force_zeros_for_empty_prompt": force_zeros,
        "scheduler": ["diffusers", EulerDiscreteScheduler.__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16 + 24,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=POOLED + 6 * 8,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.13025,
        force_upcast=True,
    )


def _text_encoders(folder: Path) -> dict[str, torch.nn.Module]:
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())

    def config(width: int, layers: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=77,
            projection_dim=POOLED,
            bos_token_id=vocabulary["<|startoftext|>"],
            eos_token_id=vocabulary["<|endoftext|>"],
            pad_token_id=vocabulary["<|endoftext|>"],
        )

    return {
        "text_encoder": CLIPTextModel(config(16, 2)),
        "text_encoder_2": CLIPTextModelWithProjection(config(24, 3)),
    }
