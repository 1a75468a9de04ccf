"""The files of an edit: what is read of them, what a mask marks, and what is refused by its field."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cat_cluster.data.edit_image import EditImage, read_edit_image
from cat_cluster.errors import SpecError
from tests.unit.data.test_colour import GREEN, WIDE, in_wide

SIZE = (32, 32)


def picture(width: int = 32, height: int = 32) -> Image.Image:
    """Red grows to the right and green downwards."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, np.full_like(across, 60)], axis=-1).astype(np.uint8))


def saved(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    kept = io.BytesIO()
    image.save(kept, kind, **options)
    return kept.getvalue()


def black_and_white(mode: str = "L", size: tuple[int, int] = SIZE) -> Image.Image:
    """White in its left quarter."""
    marks = Image.new("L", size, 0)
    marks.paste(255, (0, 0, size[0] // 4, size[1]))
    return marks.convert(mode)


def transparent(size: tuple[int, int] = SIZE) -> Image.Image:
    """A picture that is transparent in its left quarter."""
    image = picture(*size).convert("RGBA")
    image.putalpha(Image.eval(black_and_white(size=size), lambda level: 255 - level))
    return image


def refusal(*files: bytes | None, size: tuple[int, int] = SIZE) -> str:
    with pytest.raises(SpecError) as refused:
        read_edit_image(files[0] or b"", files[1] if len(files) > 1 else None, size)
    return str(refused.value)


def test_an_image_of_the_size_is_as_it_was_sent() -> None:
    read = read_edit_image(saved(picture()), None, SIZE)
    assert (read.pixels == np.asarray(picture())).all()
    assert (read.mask, read.notes) == (None, ())


def left_quarter(read: EditImage) -> bool:
    assert read.mask is not None
    return bool((read.mask == (np.arange(32) < 8)[None]).all())


@pytest.mark.parametrize(
    "mask",
    [
        saved(transparent()),
        saved(transparent(), "webp", lossless=True),
        saved(black_and_white()),
        saved(black_and_white("1")),
        saved(black_and_white("RGB")),
        saved(black_and_white("RGBA")),  # opaque: it is told by its colours
        saved(black_and_white("P")),
        saved(black_and_white("RGB"), "jpeg", quality=95),
    ],
)
def test_a_mask_marks_by_transparency_or_else_by_white(mask: bytes) -> None:
    read = read_edit_image(saved(picture()), mask, SIZE)
    assert left_quarter(read)
    assert read.notes == ()


def test_an_image_without_a_mask_is_edited_where_it_is_transparent() -> None:
    read = read_edit_image(saved(transparent()), None, SIZE)
    assert left_quarter(read)
    assert (read.pixels[:, :8] == 255).all()  # laid over white, as photos are
    assert read.notes == ("image: its transparent areas are what is edited, since there is no mask",)
    with_mask = read_edit_image(saved(transparent()), saved(Image.new("L", SIZE, 255)), SIZE)
    assert with_mask.mask is not None
    assert with_mask.mask.all()
    assert with_mask.notes == ("image: its transparent areas are laid over white, since there is a mask",)


def test_another_size_covers_and_keeps_the_middle_of_image_and_mask_alike() -> None:
    wide, size = picture(128, 64), (128, 64)
    marks = Image.new("L", size, 0)
    marks.paste(255, (32, 0, 64, 64))  # the left half of the middle
    read = read_edit_image(saved(wide), saved(marks), SIZE)
    middle = np.asarray(wide.crop((32, 0, 96, 64)).resize(SIZE, Image.Resampling.BOX), dtype=int)
    assert np.abs(read.pixels.astype(int) - middle).max() <= 6
    assert read.mask is not None
    assert (read.mask == (np.arange(32) < 16)[None]).all()
    assert read.notes == ("image: 128x64 pixels, scaled and cropped to its middle for 32x32",)
    assert read_edit_image(saved(picture(64, 64)), None, SIZE).notes == ("image: 64x64 pixels, scaled for 32x32",)


def test_a_turned_photo_and_its_mask_are_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees to the right to be seen
    upright = picture(64, 32)
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    read = read_edit_image(saved(stored, exif=exif), saved(black_and_white(size=(64, 32))), (64, 32))
    assert (read.pixels == np.asarray(upright)).all()
    assert read.mask is not None
    assert (read.mask == (np.arange(64) < 16)[None]).all()
    assert read.notes == ()


def test_a_large_jpeg_and_a_png_mask_of_it_are_of_one_size() -> None:
    """The JPEG is decoded at half its size, and compared by the one that it was sent with."""
    exif = Image.Exif()
    exif[0x0112] = 8
    photo = Image.new("RGB", (5000, 4201), (10, 200, 30))
    read = read_edit_image(saved(photo, "jpeg", exif=exif), saved(black_and_white(size=(4201, 5000))), SIZE)
    assert left_quarter(read)
    assert read.notes[0].startswith("image: 4201x5000 pixels, scaled and cropped")


def test_colours_are_those_of_the_profile() -> None:
    read = read_edit_image(saved(Image.new("RGB", SIZE, in_wide(GREEN)), icc_profile=WIDE), None, SIZE)
    assert np.abs(read.pixels[0, 0].astype(int) - GREEN).max() <= 3
    assert np.abs(np.array(in_wide(GREEN)) - GREEN).max() > 10


def bomb(side: int = 30_000) -> bytes:
    """A PNG of a few kilobytes that says it has many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    packed = zlib.compress(b"\0" * 1_000_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def animation(kind: str) -> bytes:
    return saved(picture(), kind, save_all=True, append_images=[picture().rotate(90)], duration=100)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"not an image", "is not a readable image"),
        (saved(picture())[:60], "cut off"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a readable image"),
        (bomb(), "megapixels"),
        (bomb(9000), "more than 64 megapixels"),
        (saved(picture(4, 4)), "at least 8 on each side"),
        (saved(picture(800, 8)), "times the shorter side"),
        (b"\0\0\0\x18ftypheic\0\0\0\0" + b"\0" * 40, "HEIC"),
        (saved(picture(), icc_profile=b"junk" * 50), "colour profile cannot be used"),
        *((animation(kind), "several pictures") for kind in ("gif", "webp", "png", "tiff")),
    ],
)
def test_what_is_no_still_picture_is_refused_by_its_field(content: bytes, said: str) -> None:
    assert refusal(content).startswith("image: ")
    assert said in refusal(content)
    told = refusal(saved(picture()), content)
    assert told.startswith("mask: ")
    assert said in told


def test_a_phones_picture_with_smaller_copies_behind_it_is_read() -> None:
    photo = saved(picture(), "mpo", save_all=True, append_images=[picture(16, 16)])
    assert read_edit_image(photo, None, SIZE).mask is None


def nothing_marked() -> bytes:
    return saved(black_and_white().point(lambda _: 0))


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (lambda: saved(black_and_white(size=(32, 31))), "mask: is 32x31 pixels and the image 32x32"),
        (lambda: saved(picture()), "mask: has no transparent area and is not black and white"),
        (nothing_marked, "mask: marks nothing to edit"),
    ],
)
def test_a_mask_that_cannot_be_meant_is_refused(mask: Callable[[], bytes], said: str) -> None:
    assert refusal(saved(picture()), mask()).startswith(said)
