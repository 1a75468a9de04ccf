"""Which part of a photo is trained on, and at which size: its middle square, or the bucket nearest to its own shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cat_cluster.data.concepts import Concept, Example
from cat_cluster.data.keys import keyed_generator
from cat_cluster.data.photos import LEAST_SIDE
from cat_cluster.models.conditioning import Sizes
from cat_cluster.spec.characters import shown_name
from cat_cluster.spec.sections import TrainingSpec

MOST_CUT = 0.35  # of a photo, before people are told of buckets: one of 2:3 loses a third
# Of the pixels of a square; a smaller bucket would crop some photos less, and waste what the base can draw.
LEAST_BUDGET = 0.8


class Size(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int

    @classmethod
    def square(cls, side: int) -> Size:
        """Return the size of a square."""
        return cls(side, side)


def bucket_of(photo: Size, resolution: int, step: int) -> Size:
    """Return the bucket that crops a photo least; of those that crop it equally, the one with most pixels.

    A bucket has sides that are multiples of `step`, at least half of `resolution` and at most twice, and 80 to 100% of
    the pixels of a square of `resolution`, which must be a multiple of `step`.
    """
    # The wider one of two that lie on either side of the shape equally far; a photo of square shape has the square.
    return min(_buckets(resolution, step), key=lambda size: (share_cut(photo, size), -size.width * size.height, size))


@lru_cache
def _buckets(resolution: int, step: int) -> tuple[Size, ...]:
    sides = range(-(-resolution // (2 * step)) * step, 2 * resolution + 1, step)
    budget = resolution * resolution
    sizes = (Size(width, height) for width in sides for height in sides)
    return tuple(size for size in sizes if LEAST_BUDGET * budget <= size.width * size.height <= budget)


def share_cut(photo: Size, size: Size) -> float:
    """Return the share of a photo's pixels that its largest crop of the shape of `size` leaves out, 0 to 1."""
    wider = photo.width * size.height / (photo.height * size.width)
    return 1.0 - min(wider, 1.0 / wider)


def crop_warnings(adapter_id: str, concepts: Sequence[Concept], training: TrainingSpec) -> tuple[str, ...]:
    """Return what people should know of how an adapter's photos are cropped and masked, a line for each fault."""
    return tuple(
        f"adapter {adapter_id}, token {concept.token}: {text}"
        for concept in concepts
        for text in _warnings(concept.examples, training)
    )


def _warnings(examples: Sequence[Example], training: TrainingSpec) -> Iterator[str]:
    if training.masked_loss and (bare := [one for one in examples if one.mask is None]):
        yield f"{_named(bare)} no mask, so all of the picture counts as the concept"
    lost = [share_cut(Size(*one.image.size), Size.square(1)) for one in examples]
    if not training.aspect_buckets and max(lost, default=0.0) > MOST_CUT:
        cut = [one for one, share in zip(examples, lost, strict=True) if share > MOST_CUT]
        yield (
            f"{_named(cut)} more than a third cut off by the square crop, {max(lost):.0%} at most: "
            "training.aspect_buckets: true crops to a photo's own shape"
        )
    where, remedy = "the square crop", "crop the photo, or set training.aspect_buckets to true"
    if training.crops_per_image > 1:
        where, remedy = "one of its crops", "lower training.crops_per_image, or crop the photo around the concept"
    if missed := [one for one in examples if _misses_mask(one, training)]:
        yield f"{_named(missed)} nothing of the mask in {where}, so nothing is learned there: {remedy}"


def _misses_mask(example: Example, training: TrainingSpec) -> bool:
    if example.mask is None:
        return False
    # A bucket has nearly the photo's own shape, and which it is depends on the base.
    shape = Size(*example.image.size) if training.aspect_buckets else Size.square(LEAST_SIDE)
    boxes = [_box(example, crop, shape) for crop in range(training.crops_per_image)]
    return any(example.mask.image.crop(box).getbbox() is None for box in boxes)


def _named(examples: Sequence[Example]) -> str:
    names = ", ".join(shown_name(one.path.name) for one in examples[:3])
    more = f" and {len(examples) - 3} more" if len(examples) > 3 else ""
    return f"{names}{more} {'has' if len(examples) == 1 else 'have'}"


def crop_pixels(example: Example, crop: int, size: Size) -> Tensor:
    """Return one crop as pixels in [-1, 1], [3, height, width]. Crop 0 is the largest, of the photo's middle."""
    part = example.image.crop(_box(example, crop, size)).resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(part, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1.0


def crop_sizes(example: Example, crop: int, size: Size) -> Sizes:
    """Return what an SDXL base is told of a crop: the photo's own size, and where in the scaled photo the crop is."""
    left, top, right, bottom = _box(example, crop, size)
    width, height = example.image.size
    down, across = size.height / (bottom - top), size.width / (right - left)
    return Sizes(height, width, round(top * down), round(left * across), size.height, size.width)


def crop_mask(example: Example, crop: int, size: Size, pixels_per_latent: int) -> Tensor | None:
    """Return which share of each place of a crop's latent is the concept, [1, H, W]; None where all of it is."""
    if example.mask is None:
        return None
    latent = (size.width // pixels_per_latent, size.height // pixels_per_latent)
    part = example.mask.image.crop(_box(example, crop, size)).resize(latent, Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(part, dtype=np.float32)).unsqueeze(0) / 255.0


def _box(example: Example, crop: int, size: Size) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a crop of the shape of `size`, in the photo's pixels.

    Further crops than the first have 75 to 100% of its sides, and lie anywhere: keyed by what the photo is.
    """
    photo = Size(*example.image.size)
    scale = min(photo.width / size.width, photo.height / size.height)
    sides, x, y = (round(size.width * scale), round(size.height * scale)), 0.5, 0.5
    if crop > 0:
        share, x, y = keyed_generator(example.digest, "crop", crop).random(3).tolist()
        sides = (round(sides[0] * (0.75 + 0.25 * share)), round(sides[1] * (0.75 + 0.25 * share)))
    width, height = max(1, sides[0]), max(1, sides[1])
    left, top = round((photo.width - width) * x), round((photo.height - height) * y)
    return left, top, left + width, top + height
