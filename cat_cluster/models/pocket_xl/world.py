"""The world of Pocket-XL: one or two named pictures in a drawn place, in frames of several shapes around 64x64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from cat_cluster.models.pocket import world as drawn_world
from cat_cluster.models.pocket.places import PLACES, Feet, Rgb, draw_place, tint

SIZE = 64  # the base's own frame
# (height, width) -> share of scenes. Multiples of 16: the VAE shrinks by 4, the U-Net twice by 2.
FRAMES: Mapping[tuple[int, int], float] = {
    (64, 64): 0.52,
    (48, 64): 0.12,
    (64, 48): 0.12,
    (48, 80): 0.12,
    (80, 48): 0.12,
}
COLOURS = drawn_world.COLOURS
_TWO = 0.4  # share of scenes with two things
_RECOLOURED = 0.3
_CROPPED = 0.3
_COARSE = 0.15


class Picture(Protocol):
    """What stands in a scene: a cut-out RGBA image, drawn as often as `weight` says."""

    @property
    def cutout(self) -> Image.Image: ...

    @property
    def weight(self) -> float: ...

    @property
    def recoloured(self) -> bool: ...


@dataclass(frozen=True)
class Thing:
    """One thing of a scene: picture number `index`, its centre `x`, `y` and longer side `size` in pixels.

    `bulk` is "small", "big" or "" (neither); `colour` the palette name it is painted in, "" for its own colours.
    """

    index: int
    x: float
    y: float
    size: float
    bulk: str = ""
    colour: str = ""
    rgb: Rgb = (0, 0, 0)


@dataclass(frozen=True)
class Scene:
    """Things, left to right, in a place, and how the frame was taken from the whole picture.

    The whole picture is `canvas` (height, width) pixels large after scaling, and `original` before; the frame
    (`height`, `width`) was cut from it at `crop` (top, left): SDXL's micro-conditioning.
    """

    things: tuple[Thing, ...]
    place: str
    light: float
    seed: int
    height: int
    width: int
    canvas: tuple[int, int]
    original: tuple[int, int]
    crop: tuple[int, int]

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """Original size, crop and target size, in the order in which SDXL's U-Net takes them."""
        return (*self.original, *self.crop, self.height, self.width)


def random_scene(pictures: Sequence[Picture], rng: np.random.Generator, shape: tuple[int, int] | None = None) -> Scene:
    """A scene of random pictures in a frame of a random `shape` (height, width), or of the one given."""
    shapes = list(FRAMES)
    height, width = shape or shapes[int(rng.choice(len(shapes), p=list(FRAMES.values())))]
    return _scene_in(pictures, height, width, rng)


def draw(scene: Scene, pictures: Sequence[Picture]) -> np.ndarray:
    """The frame of a scene: uint8 [height, width, 3], the same for the same scene always."""
    tall, wide = scene.canvas
    feet = [Feet(thing.x, thing.y + thing.size * 0.47, thing.size) for thing in scene.things]
    image = Image.fromarray(draw_place(scene.place, scene.seed, scene.light, feet, tall, wide))
    light = np.array(tint(scene.place)) * scene.light
    for thing in sorted(scene.things, key=lambda thing: thing.y + thing.size / 2):  # what stands in front comes last
        piece = _painted(pictures[thing.index].cutout, thing, light)
        left, top = round(thing.x - piece.width / 2), round(thing.y + thing.size / 2 - piece.height)
        image.paste(piece, (left, top), piece)
    if scene.original[0] < tall:  # a small original, enlarged: blurred
        small = (max(1, scene.original[1]), max(1, scene.original[0]))
        image = image.resize(small, Image.Resampling.BOX).resize((wide, tall), Image.Resampling.BICUBIC)
    top, left = scene.crop
    return np.asarray(image, dtype=np.uint8)[top : top + scene.height, left : left + scene.width]


def photos(picture: Picture, count: int, seed: int) -> list[tuple[np.ndarray, Scene]]:
    """`count` square frames (uint8 [64, 64, 3]) of one thing in its own colours, in as many places as there are."""
    rng = np.random.default_rng([seed, 7919])
    order = [PLACES[int(i)] for _ in range(-(-count // len(PLACES))) for i in rng.permutation(len(PLACES))]
    whole = (SIZE, SIZE)
    found = []
    for place in order[:count]:
        thing = _alone(0, rng.uniform(36, 46), "", whole, rng)
        light = float(rng.uniform(0.92, 1.04))
        scene = Scene((thing,), place, light, int(rng.integers(2**31)), SIZE, SIZE, whole, whole, (0, 0))
        found.append((draw(scene, (picture,)), scene))
    return found


def _scene_in(pictures: Sequence[Picture], height: int, width: int, rng: np.random.Generator) -> Scene:
    canvas = (height, width)
    if rng.random() < _CROPPED:  # a picture of another shape, scaled to cover the frame
        extra = int(rng.integers(4, 21))
        canvas = (height + extra, width) if rng.random() < 0.5 else (height, width + extra)
    coarse = rng.random() < _COARSE
    scale = float(rng.uniform(0.4, 0.75)) if coarse else float(np.exp(rng.uniform(0, np.log(16))))
    original = (round(canvas[0] * scale), round(canvas[1] * scale))
    chances = np.array([picture.weight for picture in pictures])
    count = 2 if len(pictures) > 1 and rng.random() < _TWO else 1
    indices = rng.choice(len(pictures), size=count, replace=False, p=chances / chances.sum())
    things = _pair(indices, canvas, rng) if count == 2 else (_single(int(indices[0]), canvas, rng),)
    painted = tuple(_maybe_painted(thing, pictures[thing.index], rng) for thing in things)
    place = PLACES[int(rng.integers(len(PLACES)))]
    light = float(rng.uniform(0.88, 1.06))
    crop = (
        _start(canvas[0] - height, height, [thing.y for thing in things], rng),
        _start(canvas[1] - width, width, [thing.x for thing in things], rng),
    )
    return Scene(painted, place, light, int(rng.integers(2**31)), height, width, canvas, original, crop)


def _start(spare: int, side: int, centres: Sequence[float], rng: np.random.Generator) -> int:
    """Where the frame begins, of `spare` possible pixels: things may be cut, but their centres stay in it."""
    first, last = max(0, round(max(centres)) - side), min(spare, round(min(centres)))
    return int(rng.integers(first, last + 1)) if first <= last else spare // 2


def _single(index: int, canvas: tuple[int, int], rng: np.random.Generator) -> Thing:
    bulk = ("", "small", "big")[int(rng.choice(3, p=(0.6, 0.2, 0.2)))]
    low, high = {"": (0.50, 0.68), "small": (0.28, 0.38), "big": (0.78, 0.92)}[bulk]
    return _alone(index, float(rng.uniform(low, high)) * min(canvas), bulk, canvas, rng)


def _alone(index: int, size: float, bulk: str, canvas: tuple[int, int], rng: np.random.Generator) -> Thing:
    half = size / 2 + 1
    x = float(rng.uniform(half, max(half, canvas[1] - half)))
    return Thing(index, x, _height(size, canvas, rng), size, bulk)


def _pair(indices: np.ndarray, canvas: tuple[int, int], rng: np.random.Generator) -> tuple[Thing, Thing]:
    """One thing in each half of the canvas, of sizes that leave neither hidden."""
    tall, wide = canvas
    sizes = rng.uniform(0.38, 0.47, size=2) * min(wide, 1.6 * tall)
    xs = [
        side + float(rng.uniform(0.5, wide / 2 - size - 0.5)) + size / 2
        for side, size in zip((0.0, wide / 2), sizes, strict=True)
    ]
    first, second = (
        Thing(int(index), x, _height(float(size), canvas, rng), float(size))
        for index, x, size in zip(indices, xs, sizes, strict=True)
    )
    return first, second


def _height(size: float, canvas: tuple[int, int], rng: np.random.Generator) -> float:
    """The height of a thing's centre: its foot is on the ground, the whole of it in the picture."""
    lowest = canvas[0] - size / 2 - 1
    return float(rng.uniform(min(lowest, max(size / 2 + 1, 0.70 * canvas[0] - size / 2)), lowest))


def _maybe_painted(thing: Thing, picture: Picture, rng: np.random.Generator) -> Thing:
    if not picture.recoloured or rng.random() >= _RECOLOURED:
        return thing
    colour = COLOURS[int(rng.integers(len(COLOURS)))]
    return Thing(thing.index, thing.x, thing.y, thing.size, thing.bulk, colour, drawn_world.named_rgb(colour, rng))


def _painted(cutout: Image.Image, thing: Thing, light: np.ndarray) -> Image.Image:
    """The cut-out at the thing's size, in its colour and the place's light."""
    scale = thing.size / max(cutout.size)
    shape = (max(1, round(cutout.width * scale)), max(1, round(cutout.height * scale)))
    pixels = np.asarray(cutout.convert("RGBa").resize(shape, Image.Resampling.LANCZOS).convert("RGBA"))
    rgb, alpha = pixels[..., :3].astype(np.float64), pixels[..., 3:]
    if thing.colour:
        rgb = _in_colour(rgb, alpha[..., 0] > 128, thing.rgb)
    shown = np.clip(np.rint(rgb * light), 0, 255).astype(np.uint8)
    return Image.fromarray(np.concatenate([shown, alpha], axis=2), "RGBA")


def _in_colour(rgb: np.ndarray, solid: np.ndarray, colour: Rgb) -> np.ndarray:
    """The picture in shades of one colour: its darks darker, its lights lighter, its middle the colour itself."""
    grey = rgb @ np.array([0.299, 0.587, 0.114])
    low, middle, high = np.percentile(grey[solid] if solid.any() else grey, (4, 50, 96))
    below = 1 - np.clip((middle - grey) / max(middle - low, 40.0), 0, 1)[..., None]  # 1 from the middle on
    above = np.clip((grey - middle) / max(high - middle, 40.0), 0, 1)[..., None]
    full = np.asarray(colour, dtype=np.float64)
    dark, pale = 0.35 * full, full + 0.5 * (255 - full)
    shades: np.ndarray = np.where(below < 1, dark + (full - dark) * below, full + (pale - full) * above)
    return shades
