"""The image that an edit begins with, and its mask, from the files that somebody sends to the pixels of one size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from cat_cluster.data.masks import is_black_and_white
from cat_cluster.data.photos import SizeLimits, Still, read_still
from cat_cluster.errors import ConceptError, SpecError

# An ingress has room for two or three copies of such an image, at 4 bytes a pixel; phones make 12 megapixels as a rule.
LIMITS = SizeLimits(least_side=8, most_pixels=4096 * 4096)
_HALF = 128  # of 255: from here on an area is marked, or opaque


@dataclass(frozen=True)
class EditImage:
    """pixels: uint8 [H, W, 3]; mask: bool [H, W], True where the image is edited, None: everywhere.

    notes: what was done to either that its sender may not expect.
    """

    pixels: NDArray[np.uint8]
    mask: NDArray[np.bool_] | None
    notes: tuple[str, ...]


def read_edit_image(image: bytes, mask: bytes | None, size: tuple[int, int]) -> EditImage:
    """Read the files of an image and its mask, scaled to cover `size` (width, height) and cropped to its middle.

    The mask marks what is edited: by transparent areas, as OpenAI has it, or, where none of it is transparent, by white
    in black and white. Without a mask the image's own transparent areas are it. What is at least half opaque is not
    transparent. Raises SpecError that begins with `image:` or `mask:`.
    """
    read = _read("image", image, size)
    notes = []
    if read.sent != size:
        change = "scaled" if read.sent[0] * size[1] == read.sent[1] * size[0] else "scaled and cropped to its middle"
        notes.append(f"image: {read.sent[0]}x{read.sent[1]} pixels, {change} for {size[0]}x{size[1]}")
    marks: Image.Image | None = None
    if mask is not None:
        marks = _marks(_read("mask", mask, size), read.sent)
        if read.alpha is not None:
            notes.append("image: its transparent areas are laid over white, since there is a mask")
    elif read.alpha is not None and read.least_alpha < _HALF:
        marks = ImageChops.invert(read.alpha)
        notes.append("image: its transparent areas are what is edited, since there is no mask")
    elif read.alpha is not None:
        notes.append("image: is laid over white and edited whole, since none of it is more than half transparent")
    edited = None if marks is None else np.asarray(marks) >= _HALF
    if edited is not None and not edited.any():
        if mask is not None:
            raise SpecError("mask: marks nothing to edit; make areas transparent, or white in a black and white mask")
        raise SpecError(
            "image: its transparent areas, which are what is edited, are too small; make them larger, or save it "
            "without transparency to edit all of it"
        )
    return EditImage(np.asarray(read.pixels), edited, tuple(notes))


def _read(field: str, content: bytes, size: tuple[int, int]) -> Still:
    try:
        return read_still(field, content, LIMITS, size)
    except ConceptError as error:
        raise SpecError(str(error)) from error


def _marks(mask: Still, sent: tuple[int, int]) -> Image.Image:
    """Return a mask as L, white where the image is edited; sent: the size of its image's file."""
    if mask.sent != sent:
        raise SpecError(
            f"mask: is {mask.sent[0]}x{mask.sent[1]} pixels and the image {sent[0]}x{sent[1]}; send them of one size"
        )
    if mask.alpha is not None and mask.least_alpha < _HALF:
        return ImageChops.invert(mask.alpha)
    if not is_black_and_white(mask.pixels):
        raise SpecError(
            "mask: has no transparent area and is not black and white; make what is to be edited transparent, or white "
            "on black"
        )
    return mask.pixels.convert("L")
