"""Things that no stage of Pocket-XL's pretraining ever sees: a second rendering of 38 objects that its world knows.

Their pictures, Microsoft's Fluent Emoji in 3D, are named by the code points that they share with the world's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from cat_cluster.models.pocket_xl.emojis import cutout

_FOLDER = Path(__file__).resolve().parent / "concepts"


@dataclass(frozen=True)
class Concept:
    """One particular thing: `noun` is what the base calls its kind, `code` the code points of its picture."""

    noun: str
    code: str
    weight: float = 1.0
    recoloured: bool = False

    @cached_property
    def cutout(self) -> Image.Image:
        """Its picture in RGBA without a margin."""
        return cutout(_FOLDER / f"{self.code}.webp")


_CODES = {
    "teddy bear": "1f9f8",
    "dog": "1f415",
    "cat": "1f408",
    "robot face": "1f916",
    "rocket": "1f680",
    "car": "1f697",
    "camera": "1f4f7",
    "teapot": "1fad6",
    "umbrella": "2602-fe0f",
    "school satchel": "1f392",
    "cactus": "1f335",
    "penguin": "1f427",
    "owl": "1f989",
    "turtle": "1f422",
    "octopus": "1f419",
    "cupcake": "1f9c1",
    "doughnut": "1f369",
    "balloon": "1f388",
    "gift": "1f381",
    "house": "1f3e0",
    "tent": "26fa",
    "boat": "26f5",
    "tophat": "1f3a9",
    "alarm clock": "23f0",
    "elephant": "1f418",
    "rabbit": "1f407",
    "duck": "1f986",
    "frog": "1f438",
    "unicorn": "1f984",
    "t rex": "1f996",
    "soccer": "26bd",
    "toolbox": "1f9f0",
    "helicopter": "1f681",
    "tractor": "1f69c",
    "handbag": "1f45c",
    "fish": "1f41f",
    "snail": "1f40c",
    "chair": "1fa91",
}
CONCEPTS: Mapping[str, Concept] = {
    f"fluent-{noun.replace(' ', '-')}": Concept(noun, code) for noun, code in _CODES.items()
}
