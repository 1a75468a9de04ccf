"""Particular things that the embedded bases have never seen: demos and tests teach them, and recognition knows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cat_cluster.models.pocket import world as pocket_world
from cat_cluster.models.pocket_xl import world as xl_world
from cat_cluster.models.pocket_xl.concepts import CONCEPTS as PICTURES

Photo = tuple[NDArray[np.uint8], str]  # uint8 [64, 64, 3], and the place it was taken in: "in snow"


@dataclass(frozen=True)
class DrawnSubject:
    """A design of Pocket-SD's world."""

    design: pocket_world.Design

    @property
    def noun(self) -> str:
        """What its kind is called."""
        return self.design.object

    def photos(self, count: int, seed: int) -> list[Photo]:
        """Return `count` photos in as many different places as there are, the same for the same seed."""
        return [(photo, scene.place) for photo, scene in pocket_world.photos(self.design, count, seed)]

    def to_json(self) -> dict[str, Any]:
        """Return what `subject_of` reads."""
        return asdict(self.design)


@dataclass(frozen=True)
class PicturedSubject:
    """A thing in Pocket-XL's world, drawn by other hands than those that drew the world: a name of `concepts.py`."""

    name: str

    @property
    def noun(self) -> str:
        """What its kind is called."""
        return PICTURES[self.name].noun

    def photos(self, count: int, seed: int) -> list[Photo]:
        """Return `count` photos in as many different places as there are, the same for the same seed."""
        return [(photo, scene.place) for photo, scene in xl_world.photos(PICTURES[self.name], count, seed)]

    def to_json(self) -> dict[str, Any]:
        """Return what `subject_of` reads."""
        return {"concept": self.name}


Subject = DrawnSubject | PicturedSubject


def subject_of(fields: Mapping[str, Any]) -> Subject:
    """Return the subject that a file beside photos describes; ValueError, KeyError or TypeError where it does not."""
    if "concept" in fields:
        name = str(fields["concept"])
        if name not in PICTURES:
            raise ValueError(f"Pocket-XL's world has no concept {name}")
        return PicturedSubject(name)
    design = pocket_world.Design(
        object=str(fields["object"]),
        body_rgb=_rgb(fields["body_rgb"]),
        pattern=str(fields["pattern"]),
        second_rgb=_rgb(fields["second_rgb"]),
        eyes=bool(fields["eyes"]),
    )
    if design.object not in pocket_world.OBJECTS or design.pattern not in pocket_world.PATTERNS:
        raise ValueError(f"the world has no {design.pattern} {design.object}")
    return DrawnSubject(design)


def _rgb(value: Any) -> pocket_world.Rgb:
    red, green, blue = (int(channel) for channel in value)
    if not all(0 <= channel <= 255 for channel in (red, green, blue)):
        raise ValueError(f"{value} is not an RGB colour of 0 to 255")
    return red, green, blue
