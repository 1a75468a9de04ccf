"""Photos as users have them: common formats, modes, turns and colour spaces, or a refusal that names the file."""

from __future__ import annotations

import hashlib
import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from cat_cluster.data.colour import ColourProfile, ProfileError
from cat_cluster.data.heif import heif_opener, is_heif, refuse_foreign_colours
from cat_cluster.errors import ConceptError

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".png", ".apng", ".webp", ".avif", ".bmp", ".dib", ".gif"),
    *(".tif", ".tiff", ".jp2", ".j2k", ".jpx", ".jpf", ".pbm", ".pgm", ".ppm", ".pnm", ".qoi"),
)
# Photos by their name that no decoder here reads. Pillow opens raw ones as TIFF, and finds their thumbnail.
UNREAD_SUFFIXES = (
    *(".jxl", ".jxr", ".tga", ".psd", ".xcf", ".svg", ".eps", ".exr", ".hdr", ".pcx"),
    *(".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw", ".3fr", ".raw"),
)
LEAST_SIDE = 32  # pixels
LONGEST_SIDE = 32_768  # pixels
MOST_ASPECT = 20  # longer side : shorter side
MOST_PIXELS = 200_000_000
MOST_DECODED_BYTES = 4 * 2**30  # of all photos of a concept as they are kept in memory
# Photos of twice this shorter side or more are reduced, never below it: base models see at most 1024 pixels.
LARGEST_SHORT_SIDE = 2048
# Without the list Pillow would also try what is no photo, such as PostScript, which it hands to another program.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "PPM", "QOI")
# A scan of a progressive JPEG may have 33 bytes and be computed over every pixel: 16 MB of them take ten minutes.
_MOST_SCANS = 100  # programs write about ten
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # of a JPEG, but for those within a scan
_END, _SCAN = 0xD9, 0xDA
_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")


@dataclass(frozen=True)
class SizeLimits:
    """How small and how large an image may be, in pixels."""

    least_side: int = LEAST_SIDE
    most_pixels: int = MOST_PIXELS


_PHOTO_LIMITS = SizeLimits()


@dataclass(frozen=True, eq=False)
class Photo:
    """One photo, upright. image: RGB in sRGB, alpha laid over white; alpha: L, None where all of it is opaque.

    size: (width, height) of its file, upright; a large photo is reduced.
    digest: of what was read, the sha256 of the file's bytes, and another where an embedded profile changed the colours.
    """

    image: Image.Image
    alpha: Image.Image | None
    size: tuple[int, int]
    digest: str


@dataclass(frozen=True)
class Still:
    """One picture, upright. sent: (width, height) of its file; pixels: RGB in sRGB, alpha laid over white, scaled to
    cover the size that was asked for and cropped to its middle; alpha: L, 255 is opaque, None where all of it is.
    least_alpha: the least of the file, 255 where all of it is opaque.
    """

    sent: tuple[int, int]
    pixels: Image.Image
    alpha: Image.Image | None
    least_alpha: int


def decoded_bytes(path: Path, limits: SizeLimits = _PHOTO_LIMITS) -> int:
    """Return how many bytes a photo takes in memory once it is read; only its header is looked at.

    Raises ConceptError that names the file when it is no image, or smaller or larger than the limits of this file.
    """
    try:
        file = path.open("rb")
        file.peek(1)
    except OSError as error:
        raise _unreadable(path, error) from error
    with file, _opened(path, file, limits) as image:
        _draft_photo(image)
        factor = _reduction(image)
        return 3 * -(-image.width // factor) * -(-image.height // factor)


def read_photo(path: Path, limits: SizeLimits = _PHOTO_LIMITS) -> Photo:
    """Read one photo, turned upright by its EXIF, the first frame of an animation.

    Raises ConceptError that names the file when it is empty, damaged, smaller or larger than the limits, or made to
    take minutes.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    with _opened(path, io.BytesIO(content), limits) as opened:
        _refuse_scans(path, opened, content)
        profile, size = _profile(path, opened), opened.size
        image, alpha = _upright(path, opened, profile)
        is_turned = _lies_on_its_side(opened)
    # Of a photo in another colour space earlier versions kept latents with its colours wrong, under its plain digest.
    return Photo(
        image,
        alpha,
        size[::-1] if is_turned else size,
        hashlib.sha256(content + (b"" if profile is None else b" in sRGB")).hexdigest(),
    )


def read_still(name: str, content: bytes, limits: SizeLimits, size: tuple[int, int]) -> Still:
    """Read a picture that somebody sends, with the care of read_photo; messages begin with `name`.

    It is scaled before anything else is done to it, since each copy of it takes 4 bytes a pixel. Raises ConceptError
    where read_photo does, and for a file of several pictures, such as an animation.
    """
    path = Path(name)
    with _opened(path, io.BytesIO(content), limits) as opened:
        # A phone's JPEG may have smaller copies of itself behind it, and is then an MPO.
        if opened.format != "MPO" and getattr(opened, "is_animated", False):
            raise ConceptError(f"{path}: holds several pictures, and one is read; send a still image")
        sent, profile = opened.size, _profile(path, opened)
        if opened.format == "JPEG2000" and 2 * sent[0] * sent[1] > limits.most_pixels:  # decoded to 32 bits a channel
            megapixels = limits.most_pixels // (2 * 10**6)
            raise ConceptError(f"{path}: has more than {megapixels} megapixels in JPEG 2000; save it as PNG or JPEG")
        _refuse_scans(path, opened, content)
        # A JPEG is decoded at a half, a quarter or an eighth; twice the size is left to scale, whichever way it lies.
        _draft(opened, (2 * max(size), 2 * max(size)))
        opened.load()
        is_turned = _lies_on_its_side(opened)
        image = _resizable(path, opened)
        least = cast(int, image.getchannel("A").getextrema()[0]) if image.has_transparency_data else 255
        image = ImageOps.exif_transpose(_fitted(image, size[::-1] if is_turned else size))
        alpha = None if least == 255 else image.getchannel("A")
        return Still(sent[::-1] if is_turned else sent, _rgb(path, image, profile), alpha, least)


def opens_as_image(path: Path) -> bool:
    """Say whether a file begins as a photo of a format that is read, whatever its name."""
    try:
        with path.open("rb") as file, _without_warnings():
            if is_heif(file.read(32)):
                return True
            with _identified(file):
                return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # as in _opened
        return False


def _unreadable(path: Path, error: OSError) -> ConceptError:
    return ConceptError(f"{path}: cannot be read: {error.strerror}; check its permissions or remove it")


@contextmanager
def _opened(path: Path, file: IO[bytes], limits: SizeLimits = _PHOTO_LIMITS) -> Iterator[Image.Image]:
    """Open a photo of a size within the limits; what fails in the block is explained as a fault of the file."""
    start = file.read(32)
    file.seek(0)
    if not start:
        raise ConceptError(f"{path}: is empty (0 bytes); replace or remove it")
    suffix = path.suffix.lower()
    if suffix in UNREAD_SUFFIXES and not is_heif(start):
        kind = suffix.removeprefix(".").upper()
        raise ConceptError(f"{path}: is a {kind} photo, which is not read; save it as JPEG or PNG in its place")
    opens = heif_opener(path) if is_heif(start) else _identified
    try:
        with _without_warnings(), opens(file) as image:
            refuse_foreign_colours(path, image)
            _refuse_size(path, image, limits)
            yield image
    except ConceptError:
        raise
    except Image.DecompressionBombError:  # in some formats Pillow's decoders have a limit, that of the process
        raise _too_large(path, min(limits.most_pixels, 2 * (Image.MAX_IMAGE_PIXELS or MOST_PIXELS))) from None
    except Exception as error:  # Pillow's decoders raise whatever damaged bytes make them stumble over.
        raise ConceptError(
            f"{path}: is not a readable image, or is cut off ({' '.join(str(error).split()) or type(error).__name__}); "
            "replace or remove it"
        ) from error


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Odd but readable metadata is none of the user's business.
        yield


def _identified(file: IO[bytes]) -> ImageFile.ImageFile:
    """Open a photo as Image.open does, but for its limit of pixels: that refuses photos of a 200-megapixel phone.

    It could be moved for the whole process only, and so for what other threads open meanwhile.
    """
    Image.init()
    file.seek(0)
    start = file.read(16)
    for name in _FORMATS:
        opens, accepts = Image.OPEN[name]
        try:
            accepted = accepts is None or accepts(start)
            if not accepted or isinstance(accepted, str):  # a text says why it cannot be read here
                continue
            file.seek(0)
            return opens(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # it is of another format
            continue
    raise UnidentifiedImageError("no format of photos begins like this")


def _too_large(path: Path, most_pixels: int) -> ConceptError:
    return ConceptError(f"{path}: has more than {most_pixels // 10**6} megapixels; save a smaller copy of it")


def _refuse_size(path: Path, image: Image.Image, limits: SizeLimits) -> None:
    width, height = image.size
    short, long = sorted((width, height))
    if width * height > limits.most_pixels:
        raise _too_large(path, limits.most_pixels)
    if short < limits.least_side:
        raise ConceptError(
            f"{path}: is {width} x {height} pixels; at least {limits.least_side} on each side are needed: "
            "replace it with a larger photo or remove it"
        )
    if long > LONGEST_SIDE or long > MOST_ASPECT * short:
        raise ConceptError(
            f"{path}: is {width} x {height} pixels; at most {LONGEST_SIDE} on a side, and {MOST_ASPECT} times the "
            "shorter side, are read: crop it or remove it"
        )


def _draft_photo(image: Image.Image) -> None:
    shrink = LARGEST_SHORT_SIDE / min(image.size)
    if shrink < 1:
        _draft(image, (round(image.width * shrink), round(image.height * shrink)))


def _draft(image: Image.Image, size: tuple[int, int]) -> None:
    """Have a JPEG decoded at a half, a quarter or an eighth, never below `size`; others are decoded in full.

    Of a HEIC photo Pillow's draft would be the thumbnail in it, which may be of another picture.
    """
    if _is_jpeg(image):
        image.draft(None, size)


def _is_jpeg(image: Image.Image) -> bool:
    """Say whether it is one, or the first of several in a file, as phones write them."""
    return image.format in ("JPEG", "MPO")


def _refuse_scans(path: Path, image: Image.Image, content: bytes) -> None:
    if _is_jpeg(image) and _has_many_scans(content):
        raise ConceptError(f"{path}: has more than {_MOST_SCANS} scans; save it as a JPEG anew, or as PNG")


def _has_many_scans(jpeg: bytes) -> bool:
    """Say whether a JPEG has more scans than are read, up to its end, behind which a phone may put anything."""
    place, scans = 0, 0
    while (
        scans <= _MOST_SCANS and (marker := _MARKER.search(jpeg, place)) is not None and jpeg[marker.end() - 1] != _END
    ):
        scans += jpeg[marker.end() - 1] == _SCAN
        length = int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")
        place = marker.end() + (length if place else 0)  # the first marker is that of the start, alone
    return scans > _MOST_SCANS


def _reduction(image: Image.Image) -> int:
    return max(1, min(image.size) // LARGEST_SHORT_SIDE)


def _profile(path: Path, image: Image.Image) -> ColourProfile | None:
    """Return the embedded profile of a photo, None for one that has none or is in sRGB already."""
    content = image.info.get("icc_profile")
    if not content:
        return None
    with _explained_profile(path):
        profile = ColourProfile(content)
        return None if profile.is_srgb() else profile


@contextmanager
def _explained_profile(path: Path) -> Iterator[None]:
    try:
        yield
    except ProfileError as error:
        raise ConceptError(
            f"{path}: its colour profile cannot be used ({error}): save it again in sRGB, or without a profile"
        ) from error


def _lies_on_its_side(image: Image.Image) -> bool:
    """Say whether a photo that has been loaded is yet to be turned by 90 degrees.

    Loading turns a TIFF. What else a file may hold as its orientation turns nothing.
    """
    return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)


def _upright(path: Path, image: Image.Image, profile: ColourProfile | None) -> tuple[Image.Image, Image.Image | None]:
    _draft_photo(image)
    upright = ImageOps.exif_transpose(image)
    factor = _reduction(upright)
    colours, alpha = _rgb(path, upright, profile), _alpha(upright)
    if factor == 1:
        return colours, alpha
    return colours.reduce(factor), None if alpha is None else alpha.reduce(factor)


def _alpha(image: Image.Image) -> Image.Image | None:
    if not image.has_transparency_data or image.mode in _SIXTEEN_BIT_MODES:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else alpha


def _resizable(path: Path, image: Image.Image) -> Image.Image:
    """Return an image in a mode that can be interpolated, its transparency, if it has any, as a channel A."""
    if image.mode in _SIXTEEN_BIT_MODES:
        if image.has_transparency_data:
            raise ConceptError(f"{path}: is transparent and has 16 bits; save it as an 8-bit PNG")
        eight_bits = _from_sixteen_bits(path, image)
        eight_bits.info = image.info  # how it is turned
        return eight_bits
    if image.mode in ("L", "LA", "RGB", "RGBA", "CMYK", "F") and "transparency" not in image.info:
        return image
    is_grey = image.mode in ("1", "L", "La")
    if image.has_transparency_data:
        return image.convert("LA" if is_grey else "RGBA")
    return image.convert("L" if is_grey else "RGB")


def _fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return an image scaled to cover `size` and cropped to its middle; itself where it has that size."""
    return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def _rgb(path: Path, image: Image.Image, profile: ColourProfile | None) -> Image.Image:
    if image.mode in _SIXTEEN_BIT_MODES:
        return _opaque_rgb(path, _from_sixteen_bits(path, image), profile)
    if image.mode == "F":
        raise ConceptError(f"{path}: holds floating-point values; save it as an 8-bit PNG or JPEG")
    if image.has_transparency_data:
        alpha = image.convert("RGBA")
        if profile is not None:
            grey = image.mode in ("L", "LA", "La")
            colours = _opaque_rgb(path, alpha.convert("L" if grey else "RGB"), profile)
            colours.putalpha(alpha.getchannel("A"))
            alpha = colours
        white = Image.new("RGBA", alpha.size, "white")
        return Image.alpha_composite(white, alpha).convert("RGB")
    return _opaque_rgb(path, image, profile)


def _opaque_rgb(path: Path, image: Image.Image, profile: ColourProfile | None) -> Image.Image:
    if profile is None:
        return image.convert("RGB")
    with _explained_profile(path):
        return profile.to_srgb(image)


def _from_sixteen_bits(path: Path, image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow's own conversion would clip everything above 255 to white."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ConceptError(f"{path}: holds values of more than 16 bits; save it as an 8-bit PNG or JPEG")
    values = values.astype(np.int32)
    values += 128
    values //= 257
    return Image.fromarray(values.astype(np.uint8))
