"""The drawn places of the embedded bases: sky, ground, a moon or a sun, and soft shadows of what stands there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Rgb = tuple[int, int, int]

_SKY: dict[str, tuple[Rgb, Rgb, Rgb, Rgb]] = {  # sky top, sky low, ground far, ground near
    "on grass": ((112, 176, 236), (196, 224, 244), (104, 176, 78), (66, 134, 54)),
    "on sand": ((120, 200, 236), (60, 140, 196), (238, 214, 152), (214, 182, 116)),
    "in snow": ((176, 190, 208), (206, 214, 226), (244, 247, 252), (222, 230, 242)),
    "at night": ((22, 26, 70), (58, 62, 130), (40, 56, 74), (26, 36, 52)),
    "at sunset": ((104, 58, 128), (250, 150, 76), (104, 62, 76), (62, 38, 58)),
    "on a table": ((226, 214, 190), (206, 192, 168), (164, 106, 64), (118, 74, 42)),
}
PLACES = tuple(_SKY)
_UNIT = 64  # the frame for which distances in pixels were chosen


@dataclass(frozen=True)
class Feet:
    """Where something stands: the middle `x` and height `y` of its foot, and its `size`, in pixels."""

    x: float
    y: float
    size: float


def tint(place: str) -> tuple[float, float, float]:
    """What the light of a place does to the colours of things there: a factor per channel."""
    return {"at night": (0.80, 0.82, 0.92), "at sunset": (1.0, 0.93, 0.90)}.get(place, (1.0, 1.0, 1.0))


def draw_place(place: str, seed: int, light: float, feet: Sequence[Feet], height: int, width: int) -> np.ndarray:
    """The picture of a place with the shadows of what stands there: uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    jitter = rng.uniform(-10, 10, size=(4, 3))
    sky_top, sky_low, far, near = np.asarray(_SKY[place], dtype=np.float64) + jitter
    horizon = float(rng.uniform(28, 40)) * (height / _UNIT)
    side = float(rng.uniform(10, 54)) * (width / _UNIT)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
    slope = horizon + 2.0 * np.sin(columns / width * np.pi + side) * (place != "on a table")
    sky = sky_top + (sky_low - sky_top) * np.clip(rows / slope, 0, 1)[..., None] ** 1.5
    ground = far + (near - far) * np.clip((rows - slope) / (height - slope), 0, 1)[..., None]
    disc = {"at night": (9.0, 5.5, (236, 236, 206)), "at sunset": (horizon - 3, 7.0, (255, 226, 130))}
    if place in disc:
        above, radius, colour = disc[place]
        cover = np.clip(radius + 0.5 - np.hypot(rows - above, columns - side), 0, 1)[..., None]
        sky = sky + (np.asarray(colour, dtype=np.float64) - sky) * cover
    cover = np.clip(rows - slope + 0.5, 0, 1)[..., None]
    picture = sky + (ground - sky) * cover
    for foot in feet:
        shadow = np.exp(-(((columns - foot.x) / (0.5 * foot.size)) ** 2 + ((rows - foot.y) / 4.0) ** 2))
        picture = picture * (1 - 0.35 * shadow * cover[..., 0])[..., None]
    pixels: np.ndarray = np.clip(np.rint(picture * light), 0, 255).astype(np.uint8)
    return pixels
