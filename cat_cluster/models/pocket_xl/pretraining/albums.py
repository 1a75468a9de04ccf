"""What every stage trains on: random scenes, their frames and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from cat_cluster.models.pocket_xl import world
from cat_cluster.models.pocket_xl.emojis import Emoji
from cat_cluster.models.pretraining.vae import crops_around

Shape = tuple[int, int]


@dataclass(frozen=True)
class Album:
    """Scenes and their frames, uint8 [3, H, W] each, of several shapes."""

    scenes: Sequence[world.Scene]
    frames: Sequence[torch.Tensor]

    @cached_property
    def rows(self) -> dict[Shape, np.ndarray]:
        """Which rows have each shape."""
        return rows_by_shape(self.scenes)

    def whole(self, rng: np.random.Generator, count: int) -> torch.Tensor:
        """`count` random frames of one random shape: uint8 [count, 3, H, W]."""
        return torch.stack([self.frames[row] for row in draw_rows(self.rows, rng, count)])

    def crops(self, rng: np.random.Generator, count: int, side: int) -> torch.Tensor:
        """`count` squares uint8 [count, 3, side, side], each near a thing of a random frame."""
        chosen = rng.integers(len(self.scenes), size=count)
        centres = np.array([_centre(self.scenes[row], rng) for row in chosen])
        return crops_around([self.frames[row] for row in chosen], centres, side, rng)


def random_scenes(emojis: Sequence[Emoji], count: int, seed: int, shape: Shape | None = None) -> list[world.Scene]:
    """`count` random scenes, the same for the same seed; all of one `shape`, where it is given."""
    rng = np.random.default_rng(seed)
    return [world.random_scene(emojis, rng, shape) for _ in range(count)]


def make_album(emojis: Sequence[Emoji], count: int, seed: int, shape: Shape | None = None) -> Album:
    """`count` random scenes with their frames."""
    scenes = random_scenes(emojis, count, seed, shape)
    return Album(scenes, [frame_of(scene, emojis) for scene in scenes])


def frame_of(scene: world.Scene, emojis: Sequence[Emoji]) -> torch.Tensor:
    """The frame of a scene: uint8 [3, H, W]."""
    return torch.from_numpy(np.array(world.draw(scene, emojis))).permute(2, 0, 1).contiguous()


def rows_by_shape(scenes: Sequence[world.Scene]) -> dict[Shape, np.ndarray]:
    """Shape -> the rows of the scenes that have it."""
    shapes = np.array([(scene.height, scene.width) for scene in scenes])
    found = [(int(height), int(width)) for height, width in np.unique(shapes, axis=0)]
    return {shape: np.nonzero((shapes == shape).all(1))[0] for shape in found}


def draw_rows(rows: dict[Shape, np.ndarray], rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` rows of one shape: frames of several shapes cannot share a batch. Shapes come as often as their rows."""
    shapes = list(rows)
    sizes = np.array([len(rows[shape]) for shape in shapes])
    return rng.choice(rows[shapes[int(rng.choice(len(shapes), p=sizes / sizes.sum()))]], size=count)


def _centre(scene: world.Scene, rng: np.random.Generator) -> tuple[float, float]:
    thing = scene.things[int(rng.integers(len(scene.things)))]
    top, left = scene.crop
    return thing.x - left, thing.y - top
