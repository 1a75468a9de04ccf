"""What every stage trains on: random scenes, their pictures, and their labels as classification targets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from cat_cluster.models.pocket import world
from cat_cluster.models.pocket.classifier import LABELS

_UNNAMED = -100  # cross_entropy's ignore_index


def random_scenes(count: int, seed: int) -> list[world.Scene]:
    """`count` random scenes, the same for the same seed."""
    rng = np.random.default_rng(seed)
    return [world.random_scene(rng) for _ in range(count)]


def render(scenes: Sequence[world.Scene]) -> torch.Tensor:
    """The pictures of scenes: uint8 [N, 3, 64, 64]."""
    frames = np.stack([world.draw(scene) for scene in scenes])
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()


def scene_labels(scene: world.Scene) -> dict[str, str | None]:
    """The true label of each attribute; None where the world has no name for it (a plain design's second colour)."""
    design = scene.design
    return {
        "object": design.object,
        "colour": world.colour_name(design.body_rgb),
        "place": scene.place,
        "pattern": design.pattern,
        "second_colour": None if design.pattern == "plain" else world.colour_name(design.second_rgb),
        "eyes": "yes" if design.eyes else "no",
    }


def label_indices(labels: Sequence[dict[str, str | None]]) -> dict[str, torch.Tensor]:
    """One index tensor [N] per attribute; None becomes a value that `masked_cross_entropy` leaves out."""
    return {
        name: torch.tensor(
            [_UNNAMED if label is None else names.index(label) for label in (row[name] for row in labels)]
        )
        for name, names in LABELS.items()
    }


def masked_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over the named rows; 0 where no row is named (the plain mean would be NaN)."""
    summed = functional.cross_entropy(logits, target, ignore_index=_UNNAMED, reduction="sum")
    return summed / (target != _UNNAMED).sum().clamp(min=1)
