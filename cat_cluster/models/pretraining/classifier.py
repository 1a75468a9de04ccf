"""What the training of both bases' independent judges shares: pictures as a U-Net would paint them, and the files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch.nn import functional

from cat_cluster.models.pocket.classifier import Classifier
from cat_cluster.models.pretraining.vae import decode_latents, encode_frames

SEED_SHIFT = 1_000  # scenes and initial weights that no other stage has seen
_SHIFT = 3


def through_vae(vae: AutoencoderKL, frames: torch.Tensor, seed: int) -> torch.Tensor:
    """The frames decoded from slightly noisy latents (uint8): what generated pictures look like."""
    latents = encode_frames(vae, frames)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(latents.shape, generator=generator) * latents.std() * 0.1
    return (decode_latents(vae, latents + noise) * 255).round().to(torch.uint8)


def shifted(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A shift of up to 3 px for all, then blur or noise for one row in four each; pixels [N, 3, H, W] in [0, 1]."""
    height, width = pixels.shape[-2:]
    down, right = (int(shift) for shift in rng.integers(0, 2 * _SHIFT + 1, size=2))
    padded = functional.pad(pixels, (_SHIFT,) * 4, mode="replicate")
    pixels = padded[:, :, down : down + height, right : right + width]
    kind = torch.from_numpy(rng.integers(4, size=(len(pixels), 1, 1, 1)))
    blurred = functional.avg_pool2d(functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = torch.from_numpy(rng.standard_normal(tuple(pixels.shape), dtype=np.float32)) * 0.04
    return torch.where(kind == 0, blurred, torch.where(kind == 1, pixels + noise, pixels)).clamp(0, 1)


def save_classifier(model: Classifier, folder: Path) -> None:
    """Write fp16 weights and a config."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.half().contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors")
    config = {"channels": list(model.channels), "image_size": 64, "labels": model.labels}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
