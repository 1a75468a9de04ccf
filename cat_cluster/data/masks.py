"""Masks of photos: where in a photo the concept is, from a file beside it or from its own transparency."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from PIL import Image, ImageChops

from cat_cluster.data.photos import Photo, read_photo
from cat_cluster.errors import ConceptError
from cat_cluster.spec.characters import shown_name

# What a mask's name has behind that of its photo, as OneTrainer writes it too: 1.jpg has 1-mask.png.
MASK_ENDINGS = ("-mask", "-masklabel")
_MOST_COLOUR = 32  # levels between the channels of a black and white picture, which a JPEG may have


@dataclass(frozen=True, eq=False)
class Mask:
    """Where a concept is in its photo. image: L, of the photo's size, 255 where all counts. digest: of its file."""

    image: Image.Image
    digest: str


def masks_among(images: Sequence[Path]) -> dict[Path, Path]:
    """Return mask -> photo of the images of a folder; one that is named as a mask of no photo is a photo.

    Raises ConceptError where a photo has two masks, or a mask two photos.
    """
    by_stem: dict[str, list[Path]] = {}
    for path in images:
        by_stem.setdefault(_key(path.stem), []).append(path)
    found: dict[Path, Path] = {}
    for path in images:
        stem = _key(path.stem)
        for ending in MASK_ENDINGS:
            photos = by_stem.get(stem.removesuffix(ending), []) if stem.endswith(ending) else []
            if len(photos) > 1 or any(photo in found.values() for photo in photos):
                raise ConceptError(
                    f"images: {shown_name(path)} is one mask of several photos, or one of several masks of "
                    f"{shown_name(photos[0].name)}; keep one file of each"
                )
            found |= dict.fromkeys([path], photos[0]) if photos else {}
    return found


def refuse_masks(masks: Mapping[Path, Path]) -> None:
    """Raise ConceptError where there are masks: without masked_loss they would be photos to learn."""
    for mask, photo in masks.items():
        raise ConceptError(
            f"images: {shown_name(mask)} is named as the mask of {shown_name(photo.name)}: set training.masked_loss to "
            "true to learn only what it marks, or move it away, or rename it if it is a photo"
        )


def read_mask(path: Path, photo: Photo) -> Mask:
    """Read the mask of a photo: white in black and white, and opaque, where the concept is.

    Raises ConceptError that names the file when it cannot be read, has another size than the photo, is not black and
    white, or marks nothing.
    """
    read = read_photo(path)
    if read.size != photo.size:
        size, wanted = ("x".join(map(str, one.size)) for one in (read, photo))
        raise ConceptError(f"{path}: is a mask of {size} pixels, and its photo has {wanted}; save it in that size")
    if not is_black_and_white(read.image):
        raise ConceptError(
            f"{path}: is a mask, and not black and white; make it white where the concept is, else black"
        )
    marked = read.image.convert("L")
    if read.alpha is not None:
        marked = ImageChops.multiply(marked, read.alpha)
    # Formats are reduced by different factors where a photo is large.
    return _marking(path, Mask(marked.resize(photo.image.size, Image.Resampling.BOX), read.digest))


def mask_of_alpha(path: Path, photo: Photo) -> Mask | None:
    """Return the mask that a photo's transparency is, None for one that is opaque; ConceptError if it marks nothing."""
    return None if photo.alpha is None else _marking(path, Mask(photo.alpha, digest=""))


def is_black_and_white(image: Image.Image) -> bool:
    """Say whether the channels of an RGB image are equal, up to what a JPEG makes of grey."""
    red, green, blue = image.split()
    pairs = ((red, green), (green, blue), (blue, red))
    return max(cast(int, ImageChops.difference(*pair).getextrema()[1]) for pair in pairs) <= _MOST_COLOUR


def _marking(path: Path, mask: Mask) -> Mask:
    if cast(int, mask.image.getextrema()[1]) < 128:
        raise ConceptError(f"{path}: its mask marks nothing; make it white, or opaque, where the concept is")
    return mask


def _key(name: str) -> str:
    # As with captions: some systems store names in decomposed Unicode, others composed.
    return unicodedata.normalize("NFC", name).casefold()
