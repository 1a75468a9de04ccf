"""The independent judge: a small ResNet, of another architecture and seed than CLIP, that saw rendered scenes only."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from cat_cluster.errors import BaseModelError
from cat_cluster.models.pocket import world
from cat_cluster.models.pocket.labels import LABELS, label_indices, labels_of, masked_cross_entropy
from cat_cluster.models.pocket.loop import (
    Budget,
    Pulse,
    Sitting,
    Stateful,
    optimise,
    random_scenes,
    rate_at,
    render,
    run_stage,
)
from cat_cluster.models.pocket.recipe import Recipe
from cat_cluster.models.pocket.vae import decode_latents, encode_frames

_SEED_SHIFT = 1_000  # scenes and initial weights that no other stage has seen


class _Residual(nn.Module):
    """Two 3x3 convolutions with BatchNorm beside a strided 1x1 one (He et al. 2016)."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride=2, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outer)
        self.second = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outer)
        self.skip = nn.Conv2d(inner, outer, 1, stride=2, bias=False)
        self.skip_norm = nn.BatchNorm2d(outer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.first_norm(self.first(x)))
        return functional.relu(self.second_norm(self.second(y)) + self.skip_norm(self.skip(x)))


class Classifier(nn.Module):
    """Recognises object, colour, place, pattern, second colour and eyes in pictures [N, 3, 64, 64] in [0, 1]."""

    centre: torch.Tensor

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.channels = channels
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels[0], 3, padding=1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU()
        )
        widths = [channels[0], *channels]
        self.blocks = nn.Sequential(*(_Residual(a, b) for a, b in pairwise(widths)))
        self.register_buffer("centre", torch.zeros(channels[-1]))
        self.bottleneck = nn.Linear(2 * channels[-1], channels[-1])
        self.heads = nn.ModuleDict({name: nn.Linear(channels[-1], len(of)) for name, of in LABELS.items()})

    def penultimate(self, images: torch.Tensor) -> torch.Tensor:
        """Features [N, F] before the last activation, with gradient, not centred."""
        maps = self.blocks(self.stem((images - 0.5) * 2))
        pooled: torch.Tensor = self.bottleneck(torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1))
        return pooled

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = functional.relu(self.penultimate(images))
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def features(self, images: torch.Tensor, batch: int = 128) -> torch.Tensor:
        """Penultimate features [N, F] of pictures [N, 3, 64, 64] in [0, 1], not normalised.

        The world's mean is taken away: cosines then compare what differs between pictures.
        """
        chunks = [self.penultimate(images[i : i + batch]) for i in range(0, len(images), batch)]
        return torch.cat(chunks) - self.centre

    @torch.no_grad()
    def predict(self, images: torch.Tensor, batch: int = 128) -> list[dict[str, str]]:
        """One {head: label} per picture; the second colour is "" where no pattern was seen."""
        found: list[dict[str, str]] = []
        for i in range(0, len(images), batch):
            best = {name: logits.argmax(1).tolist() for name, logits in self(images[i : i + batch]).items()}
            for row in range(len(images[i : i + batch])):
                labels = {name: LABELS[name][best[name][row]] for name in LABELS}
                found.append(labels | ({"second_colour": ""} if labels["pattern"] == "plain" else {}))
        return found


def train_classifier(
    recipe: Recipe,
    vae: AutoencoderKL,
    checkpoint: Path,
    sitting: Sitting,
) -> tuple[Classifier, Pulse]:
    """Train on rendered scenes: as drawn, through the VAE, shifted, blurred and noisy."""
    device, seed = sitting.device, sitting.seed + _SEED_SHIFT
    torch.manual_seed(seed)
    scenes = random_scenes(recipe.scenes, seed)
    frames = render(scenes)
    decoded = _through_vae(vae, frames[: recipe.classifier_decoded], seed)
    truth = label_indices([labels_of(scene) for scene in scenes])
    model = Classifier(recipe.classifier_channels).to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.classifier_rate, weight_decay=0.02)

    def step(index: int, progress: float) -> torch.Tensor:
        rng = np.random.default_rng([seed, 5, index])
        model.train()
        whole = rng.integers(len(frames), size=recipe.classifier_batch // 2)
        passed = rng.integers(len(decoded), size=recipe.classifier_batch // 2)
        pixels = _disturb(torch.cat([frames[whole], decoded[passed]]).float() / 255, rng).to(device)
        rows = np.concatenate([whole, passed])
        with torch.autocast(device, torch.bfloat16):
            logits = model(pixels.contiguous(memory_format=torch.channels_last))
        loss = torch.zeros((), device=device)
        for name in LABELS:
            loss = loss + masked_cross_entropy(logits[name].float(), truth[name][rows].to(device))
        optimise(loss, model, optimiser, rate_at(progress, recipe.classifier_rate))
        return loss

    state: dict[str, Stateful] = {"model": model, "optimiser": optimiser}
    pulse = run_stage(
        "classifier", checkpoint, Budget(recipe.classifier_steps, sitting.seconds), state, step, sitting.report
    )
    model.eval().centre.zero_()
    model.centre.copy_(model.features((frames[:2048].float() / 255).to(device)).mean(0))
    return model, pulse


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


def load_classifier(folder: Path) -> Classifier:
    """The classifier of a folder, fp32, in evaluation mode; `BaseModelError` where there is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "model.safetensors")
    except FileNotFoundError as missing:
        raise BaseModelError(
            f"no pocket classifier in {folder} ({missing.filename} is missing); "
            "point to a folder written by `cat-cluster pocket pretrain`"
        ) from missing
    model = Classifier(tuple(config["channels"]))
    model.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in tensors.items()})
    return model.eval()


def _through_vae(vae: AutoencoderKL, frames: torch.Tensor, seed: int) -> torch.Tensor:
    """The frames decoded from slightly noisy latents (uint8): what generated pictures look like."""
    latents = encode_frames(vae, frames)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(latents.shape, generator=generator) * latents.std() * 0.1
    return (decode_latents(vae, latents + noise) * 255).round().to(torch.uint8)


def _disturb(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A shift of up to 3 px for all, then blur or noise for one row in four each."""
    down, right = (int(shift) for shift in rng.integers(0, 7, size=2))
    padded = functional.pad(pixels, (3, 3, 3, 3), mode="replicate")
    pixels = padded[:, :, down : down + world.SIZE, right : right + world.SIZE]
    kind = torch.from_numpy(rng.integers(4, size=(len(pixels), 1, 1, 1)))
    blurred = functional.avg_pool2d(functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = torch.from_numpy(rng.standard_normal(tuple(pixels.shape), dtype=np.float32)) * 0.04
    return torch.where(kind == 0, blurred, torch.where(kind == 1, pixels + noise, pixels)).clamp(0, 1)
