"""The files of an edit: what is read of them, what a mask marks, and what is refused by its field."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from cat_cluster.data.edit_image import EditImage, read_edit_image
from cat_cluster.errors import SpecError
from tests.unit.data.test_colour import GREEN, WIDE, in_wide

ROOT = Path(__file__).parents[3]
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


def with_alpha(image: Image.Image, alpha: int, box: tuple[int, int, int, int] | None = None) -> bytes:
    """An image with this alpha everywhere, or in a box alone."""
    levels = Image.new("L", image.size, alpha if box is None else 255)
    if box is not None:
        levels.paste(alpha, box)
    image.putalpha(levels)
    return saved(image)


@pytest.mark.parametrize("box", [None, (5, 5, 6, 6)])
@pytest.mark.parametrize("alpha", [128, 254])
def test_what_is_half_opaque_is_not_transparent(alpha: int, box: tuple[int, int, int, int] | None) -> None:
    """Programs leave a pixel of alpha 254 in pictures that nobody calls transparent."""
    read = read_edit_image(with_alpha(picture(), alpha, box), None, SIZE)
    assert read.mask is None
    assert read.notes == ("image: is laid over white and edited whole, since none of it is more than half transparent",)
    masked = read_edit_image(saved(picture()), with_alpha(black_and_white("RGB"), alpha, box), SIZE)
    assert left_quarter(masked), "its colours tell"


def test_transparent_areas_that_vanish_are_refused() -> None:
    """Nobody asked for all of the picture."""
    one = (5, 5, 6, 6)
    told = refusal(with_alpha(picture(320, 320), 0, one))
    assert told.startswith("image: its transparent areas, which are what is edited, are too small")
    white = Image.new("RGB", (320, 320), "white")
    assert refusal(saved(picture(320, 320)), with_alpha(white, 0, one)).startswith("mask: marks nothing to edit")


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
    """The JPEG is decoded at an eighth of its size, and compared by the one that it was sent with."""
    exif = Image.Exif()
    exif[0x0112] = 8
    photo = Image.new("RGB", (4032, 3024), (10, 200, 30))  # a phone's 12 megapixels
    read = read_edit_image(saved(photo, "jpeg", exif=exif), saved(black_and_white(size=(3024, 4032))), SIZE)
    assert left_quarter(read)
    assert read.notes[0].startswith("image: 3024x4032 pixels, scaled and cropped")


@pytest.mark.parametrize(("kind", "mode"), [("png", "RGBA"), ("png", "I;16"), ("tiff", "RGB"), ("webp", "RGB")])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_turn_is_undone_once(kind: str, mode: str, orientation: int) -> None:
    """As Pillow does it to the whole picture; here it is turned after it was scaled."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture(128, 96)
    if mode == "I;16":
        stored = Image.fromarray(np.asarray(stored.convert("L")).astype(np.uint16) * 257)
    elif mode == "RGBA":
        stored.putalpha(stored.getchannel("G"))
    content = saved(stored, kind, exif=exif, lossless=True)
    read = read_edit_image(content, None, (64, 32))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    if mode == "I;16":
        upright = Image.fromarray((np.asarray(upright) // 257).astype(np.uint8))
    theirs = ImageOps.fit(upright, (64, 32), Image.Resampling.LANCZOS).convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", (64, 32), "white"), theirs).convert("RGB")
    assert np.abs(read.pixels.astype(int) - np.asarray(expected)).max() <= 2
    assert read.notes[0].startswith(f"image: {upright.width}x{upright.height} pixels, scaled and cropped")


def orientation(kind: int, value: bytes) -> bytes:
    """EXIF with one entry, the orientation, of a kind of TIFF's: 2 text, 3 a number."""
    entry = struct.pack("<HHHI", 1, 0x0112, kind, 1) + value.ljust(4, b"\0")
    return b"Exif\0\0II*\0\x08\0\0\0" + entry + b"\0" * 4


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize(
    "exif", [*(orientation(3, bytes([value])) for value in (0, 9, 255)), orientation(2, b"6")], ids=str
)
def test_an_orientation_that_means_nothing_turns_nothing(kind: str, exif: bytes) -> None:
    options = {"quality": 95} if kind == "jpeg" else {"lossless": True}
    read = read_edit_image(saved(picture(64, 32), kind, exif=exif, **options), None, (64, 32))
    assert np.abs(read.pixels.astype(int) - np.asarray(picture(64, 32))).max() <= 8
    assert read.notes == ()


PEAK = """
import io, sys
from pathlib import Path
from PIL import Image
from cat_cluster.data.edit_image import read_edit_image

def peak() -> int:
    # Not getrusage's: a process begins with the peak of the one that started it.
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

small = io.BytesIO()
Image.new("RGBA", (64, 64)).save(small, "png")
read_edit_image(small.getvalue(), None, (512, 512))
content = Path(sys.argv[1]).read_bytes()
before = peak()
read_edit_image(content, content if sys.argv[2] == "masked" else None, (512, 512))
print((peak() - before) // 1024)
"""


@pytest.mark.parametrize(("kind", "masked", "most"), [("png", "masked", 200), ("webp", "alone", 320)])
def test_the_largest_picture_leaves_an_ingress_its_memory(kind: str, masked: str, most: int, tmp_path: Path) -> None:
    """MiB at the peak; the whole picture takes 64. WebP's decoder holds two more of it."""
    side = np.arange(4096) // 16
    levels = np.broadcast_to(side.astype(np.uint8), (4096, 4096))
    image = Image.fromarray(np.stack([levels, levels.T, levels, levels], axis=-1))
    image.save(tmp_path / "image", kind, compress_level=1, method=0)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "image", masked], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 64 < int(done.stdout) < most


def test_a_large_jpeg_2000_is_refused_for_what_its_decoder_takes() -> None:
    told = refusal(saved(Image.new("L", (3000, 3000)), "jpeg2000"))
    assert told == "image: has more than 8 megapixels in JPEG 2000; save it as PNG or JPEG"
    assert read_edit_image(saved(picture(64, 64), "jpeg2000"), None, SIZE).mask is None


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_a_colour_that_stands_for_transparency_is_edited(mode: str) -> None:
    marks = black_and_white().convert(mode)
    read = read_edit_image(saved(marks.resize((64, 64)), transparency=255 if mode != "1" else 1), None, SIZE)
    assert left_quarter(read)


def test_a_transparent_picture_of_16_bits_is_refused() -> None:
    image = Image.fromarray(np.full((32, 32), 500, np.uint16))
    assert "is transparent and has 16 bits; save it as an 8-bit PNG" in refusal(saved(image, transparency=500))


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
        (bomb(4100), "more than 16 megapixels"),
        (saved(picture(4, 4)), "at least 8 on each side"),
        (saved(picture(800, 8)), "times the shorter side"),
        (b"\0\0\0\x18ftypheic\0\0\0\0" + b"\0" * 40, "cut off (Invalid input"),
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


def scans(count: int) -> bytes:
    """A progressive JPEG with one of its scans repeated, and bytes behind its end that look like more of them."""
    whole = saved(picture(), "jpeg", progressive=True)
    start, end = (whole.index(b"\xff\xda", place) for place in (0, whole.index(b"\xff\xda") + 2))
    there = whole.count(b"\xff\xda")
    return whole[:start] + whole[start:end] * (count - there + 1) + whole[end:] + b"\xff\xda\x00\x02" * 500


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    """Each has a few bytes and is computed over every pixel: one file would keep all others from being read."""
    read = read_edit_image(scans(100), None, SIZE)
    assert np.abs(read.pixels.astype(int) - np.asarray(picture())).mean() < 8
    assert refusal(scans(101)) == "image: has more than 100 scans; save it as a JPEG anew, or as PNG"
    assert refusal(saved(picture()), scans(101)).startswith("mask: has more than 100 scans")


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
