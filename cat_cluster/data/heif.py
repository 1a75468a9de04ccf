"""HEIC and HEIF photos, which iPhones and some cameras write: read where the extra `heic` is installed.

Pillow has no decoder for them. pillow-heif brings libheif, which turns a photo as its container says; what its EXIF
says of that is the same turn again, and is not applied.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

from PIL import Image, ImageFile

from cat_cluster.errors import ConceptError

HEIF_SUFFIXES = (".heic", ".heif", ".hif")
_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
# Of ITU-T H.273, 8.1 and 8.2. Primaries: those of sRGB, not known, and of the two televisions before it, which are near
# it; curves: not known, sRGB's, and those of standard television, which are near it.
_NEAR_SRGB_PRIMARIES = (1, 2, 5, 6)
_NEAR_SRGB_CURVES = (1, 2, 6, 13, 14, 15)


def is_heif(start: bytes) -> bool:
    """Say whether a file that begins so is one, whatever its name; AVIF, which shares the container, is none."""
    return start[4:8] == b"ftyp" and start[8:12] in _BRANDS and b"avi" not in start


def heif_opener(path: Path) -> Callable[[IO[bytes]], ImageFile.ImageFile]:
    """Return what opens such a file. Raises ConceptError that names the file where the extra is not installed."""
    try:
        from pillow_heif import HeifImageFile
    except ModuleNotFoundError:
        raise ConceptError(
            f"{path}: is a HEIC photo, and those are read where pillow-heif is installed: pip install "
            "'cat-cluster[heic]', or save it as JPEG or PNG in its place"
        ) from None
    # A class that is made as Pillow makes those of its own formats: registered there it would serve the whole process.
    return lambda file: cast(ImageFile.ImageFile, HeifImageFile(file, ""))


def refuse_foreign_colours(path: Path, image: Image.Image) -> None:
    """Raise ConceptError for a photo in colours that are not near sRGB's and have no ICC profile to be converted by."""
    colours = image.info.get("nclx_profile")
    if colours is None or image.info.get("icc_profile"):
        return
    primaries, curve = colours["color_primaries"], colours["transfer_characteristics"]
    if primaries not in _NEAR_SRGB_PRIMARIES or curve not in _NEAR_SRGB_CURVES:
        raise ConceptError(
            f"{path}: its colours are of another space than sRGB, or of high dynamic range (primaries {primaries}, "
            f"curve {curve} of ITU-T H.273), and it has no ICC profile; save it as JPEG or PNG in sRGB in its place"
        )
