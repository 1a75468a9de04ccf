"""The independent judge: a small ResNet, of another architecture and seed than CLIP, that saw rendered scenes only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from cat_cluster.errors import BaseModelError
from cat_cluster.models.pocket import world

LABELS: dict[str, tuple[str, ...]] = {
    "object": world.OBJECTS,
    "colour": world.COLOURS,
    "place": world.PLACES,
    "pattern": world.PATTERNS,
    "second_colour": world.COLOURS,
    "eyes": ("no", "yes"),
}


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
    """Recognises what `labels` name in pictures [N, 3, 64, 64] in [0, 1]: one head for each, of so many classes."""

    centre: torch.Tensor

    def __init__(self, channels: tuple[int, ...], labels: Mapping[str, Sequence[str]] = LABELS) -> None:
        super().__init__()
        self.channels = channels
        self.labels = {name: tuple(classes) for name, classes in labels.items()}
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels[0], 3, padding=1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU()
        )
        widths = [channels[0], *channels]
        self.blocks = nn.Sequential(*(_Residual(a, b) for a, b in pairwise(widths)))
        self.register_buffer("centre", torch.zeros(channels[-1]))
        self.bottleneck = nn.Linear(2 * channels[-1], channels[-1])
        self.heads = nn.ModuleDict({name: nn.Linear(channels[-1], len(of)) for name, of in self.labels.items()})

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
                labels = {name: classes[best[name][row]] for name, classes in self.labels.items()}
                found.append(labels | ({"second_colour": ""} if labels.get("pattern") == "plain" else {}))
        return found


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
    model = Classifier(tuple(config["channels"]), config["labels"])
    model.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in tensors.items()})
    return model.eval()
