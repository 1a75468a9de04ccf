"""Photos as users have them: any common format, mode and orientation, or a refusal that names the file."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cat_cluster.errors import ConceptError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LEAST_SIDE = 32  # pixels
MOST_PIXELS = 200_000_000
# Photos of twice this shorter side or more are reduced, never below it: base models see at most 1024 pixels.
LARGEST_SHORT_SIDE = 2048
_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def find_images(folder: Path) -> tuple[Path, ...]:
    """Return the image files of a folder sorted by name; other files and hidden ones are passed over.

    Raises ConceptError when the folder is missing, is a file, cannot be listed, or holds no image.
    """
    try:
        found = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
        # A link that leads nowhere is kept: reading it says so, passing over it would lose a photo silently.
        paths = sorted((p for p in found if p.is_file() or (p.is_symlink() and not p.is_dir())), key=lambda p: p.name)
    except FileNotFoundError:
        raise ConceptError(f"images: {folder} is not there; give the folder of the concept's photos") from None
    except NotADirectoryError:
        raise ConceptError(f"images: {folder} is a file; give the folder that holds the photos") from None
    except OSError as error:
        raise ConceptError(f"images: {folder} cannot be listed: {error.strerror}") from error
    if not paths:
        raise ConceptError(f"images: {folder} holds no image; put photos there ({' '.join(IMAGE_SUFFIXES)})")
    return tuple(paths)


def read_image(path: Path) -> tuple[Image.Image, str]:
    """Read one photo: RGB, turned upright by its EXIF, alpha laid over white, the first frame of an animation.

    Returns the image and the sha256 of the file's bytes. Raises ConceptError that names the file when it is empty,
    damaged, smaller than 32 pixels on a side or larger than 200 megapixels.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConceptError(f"{path}: cannot be read: {error.strerror}; check its permissions or remove it") from error
    if not content:
        raise ConceptError(f"{path}: is empty (0 bytes); replace or remove it")
    try:
        with _pixel_limit(), Image.open(io.BytesIO(content)) as opened:
            _refuse_tiny(path, opened)
            image = _upright_rgb(path, opened)
    except ConceptError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        megapixels = MOST_PIXELS // 10**6
        raise ConceptError(f"{path}: has more than {megapixels} megapixels; save a smaller copy of it") from None
    except Exception as error:  # Pillow's decoders raise whatever damaged bytes make them stumble over.
        raise ConceptError(
            f"{path}: is not a readable image, or is cut off ({' '.join(str(error).split()) or type(error).__name__}); "
            "replace or remove it"
        ) from error
    return image, hashlib.sha256(content).hexdigest()


@contextmanager
def _pixel_limit() -> Iterator[None]:
    """Hold Pillow to our limit of pixels: its own lets no photo of a 200-megapixel phone through."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Odd but readable metadata is none of the user's business.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _refuse_tiny(path: Path, image: Image.Image) -> None:
    width, height = image.size
    if min(width, height) < LEAST_SIDE:
        raise ConceptError(
            f"{path}: is {width} x {height} pixels; at least {LEAST_SIDE} on each side are needed: "
            "replace it with a larger photo or remove it"
        )


def _upright_rgb(path: Path, image: Image.Image) -> Image.Image:
    shrink = LARGEST_SHORT_SIDE / min(image.size)
    if shrink < 1:
        # JPEG is decoded at a half, a quarter or an eighth, never below the size asked for; others in full.
        image.draft(None, (round(image.width * shrink), round(image.height * shrink)))
    upright = _rgb(path, ImageOps.exif_transpose(image))
    factor = min(upright.size) // LARGEST_SHORT_SIDE
    return upright.reduce(factor) if factor > 1 else upright


def _rgb(path: Path, image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT_MODES:
        return _from_sixteen_bits(path, image)
    if image.mode == "F":
        raise ConceptError(f"{path}: holds floating-point values; save it as an 8-bit PNG or JPEG")
    if image.has_transparency_data:
        alpha = image.convert("RGBA")
        white = Image.new("RGBA", alpha.size, "white")
        return Image.alpha_composite(white, alpha).convert("RGB")
    return image.convert("RGB")


def _from_sixteen_bits(path: Path, image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow's own conversion would clip everything above 255 to white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ConceptError(f"{path}: holds values of more than 16 bits; save it as an 8-bit PNG or JPEG")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
