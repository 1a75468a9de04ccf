"""The procedural world of Pocket-SD: 64x64 scenes of one object in one place, and their captions.

The shapes are smooth and broad on purpose: a small VAE must be able to hold every feature that tells one
particular object from another.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from cat_cluster.models.pocket.places import PLACES as PLACES
from cat_cluster.models.pocket.places import Feet, draw_place, tint
from cat_cluster.models.pocket.places import Rgb as Rgb
from cat_cluster.models.pocket.shapes import Points, box, ellipse, shape_of

SIZE = 64
_ZOOM = 4  # drawn at 4x and reduced: antialiasing

OBJECTS = ("cup", "house", "tree", "fish", "car", "boat", "star", "flower")
PATTERNS = ("plain", "stripes", "band", "spots", "checks")

# name -> (hue, saturation, value) ranges; disjoint, so that a name is a function of the colour.
_PALETTE: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((0.975, 1.010), (0.78, 0.95), (0.75, 0.92)),
    "orange": ((0.065, 0.090), (0.82, 1.00), (0.90, 1.00)),
    "yellow": ((0.135, 0.165), (0.75, 0.95), (0.90, 1.00)),
    "green": ((0.300, 0.390), (0.60, 0.85), (0.50, 0.75)),
    "blue": ((0.580, 0.640), (0.70, 0.95), (0.65, 0.95)),
    "purple": ((0.745, 0.795), (0.50, 0.80), (0.50, 0.72)),
    "pink": ((0.895, 0.945), (0.35, 0.55), (0.94, 1.00)),
    "brown": ((0.050, 0.080), (0.55, 0.75), (0.36, 0.50)),
    "white": ((0.000, 1.000), (0.00, 0.05), (0.94, 1.00)),
    "black": ((0.000, 1.000), (0.00, 0.25), (0.06, 0.14)),
}
COLOURS = tuple(_PALETTE)
_OUTLINE: Rgb = (28, 24, 30)
_CONTRAST = 0.45  # least RGB distance (unit cube) between the two colours of a pattern


@dataclass(frozen=True)
class Design:
    """One particular object: what stays the same in all its photos.

    `second_rgb` colours the pattern and means nothing where `pattern` is "plain".
    """

    object: str
    body_rgb: Rgb
    pattern: str
    second_rgb: Rgb
    eyes: bool


@dataclass(frozen=True)
class Scene:
    """One view of a design: `x`, `y` its centre and `scale` its size in pixels, `light` a brightness factor."""

    design: Design
    place: str
    x: float
    y: float
    scale: float
    light: float
    seed: int


def colour_name(rgb: Rgb) -> str | None:
    """The palette name of a colour, or None for a colour outside every named range."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in rgb))
    slack = 0.012  # rounding to 8 bits moves a colour by less than this
    for name, (hues, saturations, values) in _PALETTE.items():
        middle, reach = sum(hues) / 2, (hues[1] - hues[0]) / 2
        distance = abs((hue - middle + 0.5) % 1.0 - 0.5)
        if (
            distance <= reach + slack
            and saturations[0] - slack <= saturation <= saturations[1] + slack
            and values[0] - slack <= value <= values[1] + slack
        ):
            return name
    return None


def palette_rgb(name: str) -> Rgb:
    """The colour in the middle of a palette name's range."""
    hues, saturations, values = _PALETTE[name]
    return _rgb(sum(hues) / 2, sum(saturations) / 2, sum(values) / 2)


def named_rgb(name: str, rng: np.random.Generator) -> Rgb:
    """A random colour of a palette name's range."""
    return _rgb(*(low + (high - low) * rng.random() for low, high in _PALETTE[name]))


def nearest_colour(rgb: Rgb) -> str:
    """The palette name whose middle is nearest in RGB: defined for every colour."""
    named = colour_name(rgb)
    return named if named is not None else min(COLOURS, key=lambda name: _distance(rgb, palette_rgb(name)))


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene of a random design; designs that look like a held-out concept never come up."""
    while True:
        design = _random_design(rng)
        if _kin(design) not in _held_out():
            return _view(design, PLACES[int(rng.integers(len(PLACES)))], rng)


def photos(design: Design, count: int, seed: int) -> list[tuple[np.ndarray, Scene]]:
    """`count` photos (uint8 [64, 64, 3]) of one design in as many different places as there are."""
    rng = np.random.default_rng([seed, 7919])
    order = [PLACES[int(i)] for _ in range(-(-count // len(PLACES))) for i in rng.permutation(len(PLACES))]
    scenes = [_view(design, place, rng) for place in order[:count]]
    return [(draw(scene), scene) for scene in scenes]


def draw(scene: Scene) -> np.ndarray:
    """The picture of a scene: uint8 [64, 64, 3], the same for the same scene always."""
    image = Image.fromarray(_background(scene)).resize((SIZE * _ZOOM,) * 2, Image.Resampling.BILINEAR)
    parts, eyes, band = shape_of(scene.design.object)
    pen = ImageDraw.Draw(image)
    outline = _lit(_OUTLINE, scene)
    for _, points in parts:  # all outlines first: only the silhouette keeps one
        corners = _place_points(points, scene)
        pen.line([*corners, corners[0], corners[1]], fill=outline, width=round(2.2 * _ZOOM), joint="curve")
    body = _body_paint(scene, band)
    for role, points in parts:
        corners = _place_points(points, scene)
        if role == "body":
            mask = Image.new("L", image.size, 0)
            ImageDraw.Draw(mask).polygon(corners, fill=255)
            image.paste(body, (0, 0), mask)
        else:
            pen.polygon(corners, fill=_lit(_role_rgb(role, scene.design), scene))
    if scene.design.eyes:
        for centre in eyes:
            for radius, colour in ((0.24, _OUTLINE), (0.19, (250, 250, 250)), (0.10, (15, 12, 18))):
                ring = _place_points(ellipse(*centre, radius, radius), scene)
                pen.polygon(ring, fill=_lit(colour, scene))
    return np.asarray(image.reduce(_ZOOM), dtype=np.uint8)


def _rgb(hue: float, saturation: float, value: float) -> Rgb:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _distance(a: Rgb, b: Rgb) -> float:
    return math.dist(a, b) / 255


def _random_colour(rng: np.random.Generator) -> Rgb:
    if rng.random() < 0.2:  # anywhere: the VAE must hold colours that have no name, too
        return _rgb(rng.random(), rng.random() ** 0.5, 0.15 + 0.85 * rng.random())
    return named_rgb(COLOURS[int(rng.integers(len(COLOURS)))], rng)


def _random_design(rng: np.random.Generator) -> Design:
    body, second = _random_colour(rng), _random_colour(rng)
    while _distance(body, second) < _CONTRAST:
        second = _random_colour(rng)
    pattern = PATTERNS[int(rng.choice(len(PATTERNS), p=(0.4, 0.15, 0.15, 0.15, 0.15)))]
    return Design(OBJECTS[int(rng.integers(len(OBJECTS)))], body, pattern, second, bool(rng.random() < 0.35))


def _view(design: Design, place: str, rng: np.random.Generator) -> Scene:
    scale = float(rng.uniform(32, 44))
    half = scale / 2 + 2
    x = float(rng.uniform(half, SIZE - half))
    y = float(rng.uniform(max(half, 30), SIZE - half))
    return Scene(design, place, x, y, scale, float(rng.uniform(0.88, 1.06)), int(rng.integers(2**31)))


def _kin(design: Design) -> tuple[str, str, str, str]:
    second = "" if design.pattern == "plain" else nearest_colour(design.second_rgb)
    return design.object, nearest_colour(design.body_rgb), design.pattern, second


def _lit(rgb: Rgb, scene: Scene) -> Rgb:
    factors = tint(scene.place)
    red, green, blue = (
        min(255, round(channel * factor * scene.light)) for channel, factor in zip(rgb, factors, strict=True)
    )
    return red, green, blue


def _role_rgb(role: str, design: Design) -> Rgb:
    fixed: dict[str, Rgb] = {
        "dark": (48, 46, 54),
        "wood": (122, 82, 48),
        "glass": (188, 220, 236),
        "stem": (60, 130, 60),
    }
    if role in fixed:
        return fixed[role]
    red, green, blue = (round(channel * 0.72) for channel in design.body_rgb)  # "shade": the body, darker
    return red, green, blue


def _place_points(points: Points, scene: Scene) -> list[tuple[float, float]]:
    half = scene.scale / 2
    return [((scene.x + px * half) * _ZOOM, (scene.y + py * half) * _ZOOM) for px, py in points]


def _body_paint(scene: Scene, band: float) -> Image.Image:
    """The body's colours over the whole canvas, to be pasted through the body's masks; `band` is the band's height."""
    design = scene.design
    paint = Image.new("RGB", (SIZE * _ZOOM,) * 2, _lit(design.body_rgb, scene))
    pen = ImageDraw.Draw(paint)
    second = _lit(design.second_rgb, scene)
    patches: list[Points] = []
    if design.pattern == "stripes":
        patches = [box(c - 0.16, -1.1, c + 0.16, 1.1) for c in (-0.96, -0.32, 0.32, 0.96)]
    elif design.pattern == "band":
        patches = [box(-1.1, band - 0.2, 1.1, band + 0.2)]
    elif design.pattern == "spots":
        patches = [
            ellipse(0.62 * column + 0.31 * (row % 2), 0.54 * row + 0.03, 0.19, 0.19)
            for row in range(-2, 3)
            for column in range(-2, 2)
        ]
    elif design.pattern == "checks":
        side = 0.42
        patches = [
            box(side * column, side * row, side * (column + 1), side * (row + 1))
            for row in range(-3, 3)
            for column in range(-3, 3)
            if (row + column) % 2
        ]
    for points in patches:
        pen.polygon(_place_points(points, scene), fill=second)
    return paint


def _background(scene: Scene) -> np.ndarray:
    foot = Feet(scene.x, scene.y + scene.scale * 0.47, scene.scale)
    return draw_place(scene.place, scene.seed, scene.light, (foot,), SIZE, SIZE)


def _concept(noun: str, body: str, pattern: str, second: str, eyes: bool) -> Design:
    return Design(noun, palette_rgb(body), pattern, palette_rgb(second), eyes)


CONCEPTS: dict[str, Design] = {
    "striped-cup": _concept("cup", "yellow", "band", "blue", False),
    "spotted-cup": _concept("cup", "white", "spots", "red", True),
    "checked-cup": _concept("cup", "pink", "checks", "green", False),
    "clown-fish": _concept("fish", "orange", "stripes", "white", True),
    "dusk-fish": _concept("fish", "purple", "band", "yellow", True),
    "blossom-tree": _concept("tree", "pink", "spots", "white", True),
    "checked-house": _concept("house", "blue", "checks", "yellow", False),
    "candy-house": _concept("house", "red", "stripes", "white", True),
    "banded-car": _concept("car", "green", "band", "orange", True),
    "ladybird-car": _concept("car", "red", "spots", "black", False),
    "bee-boat": _concept("boat", "yellow", "stripes", "black", True),
    "harlequin-star": _concept("star", "white", "checks", "purple", True),
    "banded-star": _concept("star", "blue", "band", "pink", True),
    "spotted-flower": _concept("flower", "purple", "spots", "yellow", True),
}


@lru_cache(maxsize=1)
def _held_out() -> frozenset[tuple[str, str, str, str]]:
    return frozenset(_kin(design) for design in CONCEPTS.values())
