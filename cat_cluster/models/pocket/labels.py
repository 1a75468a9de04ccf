"""What there is to say about a scene: the attributes that classifier, CLIP and measurements share."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch.nn import functional

from cat_cluster.models.pocket import world

LABELS: dict[str, tuple[str, ...]] = {
    "object": world.OBJECTS,
    "colour": world.COLOURS,
    "place": world.PLACES,
    "pattern": world.PATTERNS,
    "second_colour": world.COLOURS,
    "eyes": ("no", "yes"),
}
_UNNAMED = -100  # cross_entropy's ignore_index


def labels_of(scene: world.Scene) -> dict[str, str | None]:
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


def labels_said(text: str) -> dict[str, str | None]:
    """What a caption of the world says about each attribute; None where it says nothing."""
    nouns, colours = "|".join(world.OBJECTS), "|".join(world.COLOURS)
    subject = re.search(rf"(?:\b({colours}) )?\b({nouns})\b", text)
    pattern = re.search(rf"(?:\b({colours}) )?\b({'|'.join(world.PATTERNS[1:])})\b", text)
    place = re.search(rf"({'|'.join(world.PLACES)})$", text)
    return {
        "object": subject[2] if subject else None,
        "colour": subject[1] if subject else None,
        "place": place[1] if place else None,
        "pattern": pattern[2] if pattern else None,
        "second_colour": pattern[1] if pattern else None,
        "eyes": "yes" if " eyes" in text else None,
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
