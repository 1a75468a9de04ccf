"""Training of the independent judge, a small classifier that sees rendered scenes only."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch.nn import functional

from cat_cluster.models.pocket import world
from cat_cluster.models.pocket.classifier import LABELS, Classifier
from cat_cluster.models.pocket.pretraining.recipe import Recipe
from cat_cluster.models.pocket.pretraining.scenes import (
    label_indices,
    masked_cross_entropy,
    random_scenes,
    render,
    scene_labels,
)
from cat_cluster.models.pocket.pretraining.stage import (
    Stage,
    StageProgress,
    Stateful,
    learning_rate_at,
    optimise,
    run_stage,
)
from cat_cluster.models.pocket.pretraining.vae import decode_latents, encode_frames

_SEED_SHIFT = 1_000  # scenes and initial weights that no other stage has seen


def train_classifier(
    recipe: Recipe,
    vae: AutoencoderKL,
    stage: Stage,
) -> tuple[Classifier, StageProgress]:
    """Train on rendered scenes: as drawn, through the VAE, shifted, blurred and noisy."""
    device, seed = stage.device, stage.seed + _SEED_SHIFT
    torch.manual_seed(seed)
    scenes = random_scenes(recipe.scenes, seed)
    frames = render(scenes)
    decoded = _through_vae(vae, frames[: recipe.classifier_decoded], seed)
    truth = label_indices([scene_labels(scene) for scene in scenes])
    model = Classifier(recipe.classifier_channels).to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.classifier_rate, weight_decay=0.02)

    def step(index: int, progress: float) -> torch.Tensor:
        rng = np.random.default_rng([seed, 5, index])
        model.train()
        whole = rng.integers(len(frames), size=recipe.classifier_batch // 2)
        passed = rng.integers(len(decoded), size=recipe.classifier_batch // 2)
        pixels = _augment(torch.cat([frames[whole], decoded[passed]]).float() / 255, rng).to(device)
        rows = np.concatenate([whole, passed])
        with torch.autocast(device, torch.bfloat16):
            logits = model(pixels.contiguous(memory_format=torch.channels_last))
        loss = torch.zeros((), device=device)
        for name in LABELS:
            loss = loss + masked_cross_entropy(logits[name].float(), truth[name][rows].to(device))
        optimise(loss, model, optimiser, learning_rate_at(progress, recipe.classifier_rate))
        return loss

    state: dict[str, Stateful] = {"model": model, "optimiser": optimiser}
    ended = run_stage(stage, recipe.classifier_steps, state, step)
    model.eval().centre.zero_()
    model.centre.copy_(model.features((frames[:2048].float() / 255).to(device)).mean(0))
    return model, ended


def save_classifier(model: Classifier, folder: Path) -> None:
    """Write fp16 weights and a config."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.half().contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors")
    config = {"channels": list(model.channels), "image_size": world.SIZE, "labels": LABELS}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _through_vae(vae: AutoencoderKL, frames: torch.Tensor, seed: int) -> torch.Tensor:
    """The frames decoded from slightly noisy latents (uint8): what generated pictures look like."""
    latents = encode_frames(vae, frames)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(latents.shape, generator=generator) * latents.std() * 0.1
    return (decode_latents(vae, latents + noise) * 255).round().to(torch.uint8)


def _augment(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A shift of up to 3 px for all, then blur or noise for one row in four each."""
    down, right = (int(shift) for shift in rng.integers(0, 7, size=2))
    padded = functional.pad(pixels, (3, 3, 3, 3), mode="replicate")
    pixels = padded[:, :, down : down + world.SIZE, right : right + world.SIZE]
    kind = torch.from_numpy(rng.integers(4, size=(len(pixels), 1, 1, 1)))
    blurred = functional.avg_pool2d(functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = torch.from_numpy(rng.standard_normal(tuple(pixels.shape), dtype=np.float32)) * 0.04
    return torch.where(kind == 0, blurred, torch.where(kind == 1, pixels + noise, pixels)).clamp(0, 1)
