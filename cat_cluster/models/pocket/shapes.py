"""Outlines of the world's objects in a unit frame: x and y in [-1, 1], y downwards."""

from __future__ import annotations

import math
from functools import lru_cache

Points = tuple[tuple[float, float], ...]


def box(left: float, top: float, right: float, bottom: float) -> Points:
    return ((left, top), (right, top), (right, bottom), (left, bottom))


@lru_cache(maxsize=256)
def ellipse(x: float, y: float, rx: float, ry: float) -> Points:
    angles = [2 * math.pi * i / 36 for i in range(36)]
    return tuple((x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles)


def arc(x: float, y: float, outer: float, inner: float) -> Points:
    angles = [math.radians(-85 + 170 * i / 16) for i in range(17)]
    there = [(x + outer * math.cos(a), y + outer * math.sin(a)) for a in angles]
    back = [(x + inner * math.cos(a), y + inner * math.sin(a)) for a in reversed(angles)]
    return tuple(there + back)


def star() -> Points:
    radii = [1.0, 0.52] * 5
    return tuple((r * math.sin(math.pi * i / 5), 0.08 - r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii))


_SHAPES: dict[str, tuple[list[tuple[str, Points]], tuple[tuple[float, float], ...], float]] = {
    "cup": (
        [
            ("shade", arc(0.42, 0.0, 0.55, 0.30)),
            ("body", ((-0.9, -0.75), (0.55, -0.75), (0.42, 0.9), (-0.77, 0.9))),
            ("shade", ellipse(-0.175, -0.75, 0.725, 0.16)),
        ],
        ((-0.48, -0.28), (0.13, -0.28)),
        0.32,
    ),
    "house": (
        [
            ("body", box(-0.78, -0.2, 0.78, 0.92)),
            ("shade", ((-1.0, -0.15), (0.0, -0.98), (1.0, -0.15))),
            ("dark", box(-0.17, 0.45, 0.17, 0.92)),
        ],
        ((-0.42, 0.12), (0.42, 0.12)),
        0.55,
    ),
    "tree": (
        [("wood", box(-0.17, 0.2, 0.17, 1.0)), ("body", ellipse(0.0, -0.28, 0.85, 0.7))],
        ((-0.3, -0.45), (0.3, -0.45)),
        0.05,
    ),
    "fish": (
        [("shade", ((0.4, 0.0), (1.0, -0.5), (1.0, 0.5))), ("body", ellipse(-0.2, 0.0, 0.8, 0.58))],
        ((-0.6, -0.12), (-0.08, -0.12)),
        0.2,
    ),
    "car": (
        [
            ("body", ((-0.62, -0.1), (-0.42, -0.68), (0.38, -0.68), (0.62, -0.1))),
            ("body", ((-1.0, -0.18), (1.0, -0.18), (1.0, 0.55), (-1.0, 0.55))),
            ("glass", ((-0.44, -0.22), (-0.31, -0.54), (0.27, -0.54), (0.44, -0.22))),
            ("dark", ellipse(-0.55, 0.55, 0.28, 0.28)),
            ("dark", ellipse(0.55, 0.55, 0.28, 0.28)),
        ],
        ((-0.32, 0.08), (0.32, 0.08)),
        0.14,
    ),
    "boat": (
        [
            ("wood", box(-0.12, -0.95, 0.0, 0.4)),
            ("body", ((0.0, -0.95), (0.85, 0.22), (0.0, 0.22))),
            ("body", ((-0.12, -0.8), (-0.8, 0.22), (-0.12, 0.22))),
            ("shade", ((-1.0, 0.34), (1.0, 0.34), (0.62, 0.92), (-0.62, 0.92))),
        ],
        ((-0.32, 0.62), (0.32, 0.62)),
        -0.1,
    ),
    "star": ([("body", star())], ((-0.25, -0.1), (0.25, -0.1)), 0.3),
    "flower": (
        [
            ("stem", box(-0.09, 0.2, 0.09, 1.0)),
            *(
                ("body", ellipse(0.58 * math.sin(a), -0.22 - 0.58 * math.cos(a), 0.34, 0.34))
                for a in (math.tau / 5 * i for i in range(5))
            ),
            ("shade", ellipse(0.0, -0.22, 0.42, 0.42)),
        ],
        ((-0.26, -0.26), (0.26, -0.26)),
        -0.22,
    ),
}


@lru_cache(maxsize=8)
def shape_of(name: str) -> tuple[tuple[tuple[str, Points], ...], tuple[tuple[float, float], ...], float]:
    """Parts (role, outline) back to front in [-1, 1], centres of the two eyes, height of the band."""
    parts, eyes, band = _SHAPES[name]
    return tuple(parts), eyes, band
