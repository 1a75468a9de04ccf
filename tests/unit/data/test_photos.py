"""Photos as users have them: every format, mode and orientation, and damage that is refused by name."""

from __future__ import annotations

import hashlib
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cat_cluster.data import concepts
from cat_cluster.data import photos as images
from cat_cluster.data.concepts import load_concept
from cat_cluster.data.photo_folder import find_images
from cat_cluster.data.photos import read_photo
from cat_cluster.errors import ConceptError
from cat_cluster.spec.concept import ConceptSpec


def photo(seed: int = 0, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A smooth picture, so that lossy formats return nearly what was saved."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    channels = [200 * x, 200 * y, 20.0 * (seed % 10) + 20 + 0 * x]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (1, 2):
        photo(number).save(tmp_path / f"{number}.png")
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(ConceptError) as caught:
        load_concept(ConceptSpec(token="sks", class_noun="cup", images=str(folder)))
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".png", ".webp", ".bmp", ".gif", ".tif"])
def test_every_format_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    photo().save(path)
    read = read_photo(path)
    image, digest = read.image, read.digest
    assert (image.mode, image.size) == ("RGB", (48, 40))
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    error = np.abs(np.asarray(image, dtype=int) - np.asarray(photo(), dtype=int))
    assert error.mean() < (8 if suffix == ".gif" else 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    photo().convert(mode).save(path)
    expected = np.asarray(photo().convert(mode).convert("RGB"), dtype=int)
    assert np.abs(np.asarray(read_photo(path).image, dtype=int) - expected).mean() < 3


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_grey_keeps_its_tones(tmp_path: Path, name: str) -> None:
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (40, 1))
    Image.fromarray(ramp).save(tmp_path / name)
    image = read_photo(tmp_path / name).image
    assert np.array_equal(np.asarray(image)[0, :, 0], np.arange(256))


@pytest.mark.parametrize(("dtype", "value"), [(np.int32, 70_000), (np.int32, -1), (np.float32, 0.5)])
def test_wider_values_are_refused_by_name(tmp_path: Path, dtype: type, value: float) -> None:
    Image.fromarray(np.full((40, 40), value, dtype=dtype)).save(tmp_path / "deep.tif")
    with pytest.raises(ConceptError, match=r"deep\.tif: .* save it as an 8-bit PNG"):
        read_photo(tmp_path / "deep.tif")


def test_alpha_is_laid_over_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    half = Image.new("RGBA", (40, 40), (0, 0, 0, 128))
    clear.save(tmp_path / "clear.png")
    half.save(tmp_path / "half.webp", lossless=True)
    Image.new("LA", (40, 40), (0, 0)).save(tmp_path / "grey.png")
    palette = Image.new("P", (40, 40), 0)
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "palette.gif", transparency=0)
    colours = {p.name: read_photo(p).image.getpixel((5, 5)) for p in find_images(tmp_path)}
    white = (255, 255, 255)
    assert colours == {"clear.png": white, "grey.png": white, "half.webp": (127, 127, 127), "palette.gif": white}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_exif_orientation_is_applied(tmp_path: Path, name: str, orientation: int) -> None:
    stored = Image.new("RGB", (64, 48), "black")
    stored.paste("white", (0, 0, 32, 24))  # Its bright corner is at the top left as stored.
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / name, exif=exif)
    read = read_photo(tmp_path / name)
    image = read.image
    assert read.size == image.size
    # Where the first row and first column of the stored image are seen, from the EXIF standard.
    left = orientation in (1, 4, 5, 8)
    top = orientation in (1, 2, 5, 6)
    assert image.size == ((64, 48) if orientation < 5 else (48, 64))
    corner = (4 if left else image.width - 5, 4 if top else image.height - 5)
    opposite = (image.width - 1 - corner[0], image.height - 1 - corner[1])
    grey = np.asarray(image.convert("L"))
    assert grey[corner[1], corner[0]] > 200
    assert grey[opposite[1], opposite[0]] < 50


@pytest.mark.parametrize("orientation", [0, 9, 255])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_an_orientation_that_means_nothing_turns_nothing(tmp_path: Path, name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo(size=(64, 48)).save(tmp_path / name, exif=exif)
    read = read_photo(tmp_path / name)
    assert read.size == read.image.size == (64, 48)


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (40, 40), colour) for colour in ("red", "blue"))
    red.save(tmp_path / "a.gif", save_all=True, append_images=[blue])
    assert read_photo(tmp_path / "a.gif").image.getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(1, 1), (31, 400), (400, 31)])
def test_tiny_images_are_refused_by_name(tmp_path: Path, size: tuple[int, int]) -> None:
    photo(size=size).save(tmp_path / "tiny.png")
    message = refusal(tmp_path)
    assert f"tiny.png: is {size[0]} x {size[1]} pixels; at least 32" in message


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_large_photos_are_reduced_but_not_below_the_limit(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "LARGEST_SHORT_SIDE", 64)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(size=(640, 400)).save(tmp_path / f"a{suffix}", exif=exif)
    image = read_photo(tmp_path / f"a{suffix}").image
    assert 64 <= image.width < 128
    assert image.height / image.width == pytest.approx(1.6, abs=0.05)


def claim_size(path: Path, width: int, height: int) -> None:
    """Write a small PNG whose header claims another size."""
    photo().save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", width, height)  # PNG: signature, length, IHDR, then the size
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def test_more_pixels_than_the_limit_are_refused_before_decoding(tmp_path: Path) -> None:
    for name, width, height in (("bomb.png", 20_001, 10_000), ("worse.png", 30_000, 30_000)):
        claim_size(tmp_path / name, width, height)
    before = Image.MAX_IMAGE_PIXELS
    message = refusal(tmp_path)
    assert "bomb.png: has more than 200 megapixels" in message
    assert "worse.png: has more than 200 megapixels" in message
    assert before == Image.MAX_IMAGE_PIXELS


def test_the_limit_of_pixels_is_that_of_the_file_and_others_keep_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A photo that the process's own limit refuses is read, and while it is, another thread has that limit."""
    photo(size=(640, 400)).save(tmp_path / "a.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    seen: list[int | None] = []
    upright = images._upright

    def watching(*arguments: Any) -> Any:
        seen.append(Image.MAX_IMAGE_PIXELS)
        return upright(*arguments)

    monkeypatch.setattr(images, "_upright", watching)
    assert read_photo(tmp_path / "a.jpg").image.size == (640, 400)
    assert images.opens_as_image(tmp_path / "a.jpg")
    assert (seen, Image.MAX_IMAGE_PIXELS) == ([1000], 1000)
    limits = images.SizeLimits(most_pixels=255_999)
    with pytest.raises(ConceptError, match=r"^sent: has more than 0 megapixels"):
        images.read_still("sent", (tmp_path / "a.jpg").read_bytes(), limits, (64, 64))


def test_what_pillow_itself_refuses_in_some_formats_is_told_with_its_limit(tmp_path: Path) -> None:
    photo().save(tmp_path / "huge.webp", xmp=b"<x/>")
    content = bytearray((tmp_path / "huge.webp").read_bytes())
    assert content[12:16] == b"VP8X"
    content[24:30] = b"\xfe\x3f\0" * 2  # 16383 x 16383, of which 1 is taken off
    (tmp_path / "huge.webp").write_bytes(content)
    assert "huge.webp: has more than 178 megapixels" in refusal(tmp_path)
    limits = images.SizeLimits(most_pixels=16_000_000)
    with pytest.raises(ConceptError, match=r"^sent: has more than 16 megapixels"):
        images.read_still("sent", bytes(content), limits, (64, 64))


@pytest.mark.parametrize("size", [(6_200_000, 32), (32, 6_200_000), (32_769, 4000), (661, 33)])
def test_long_strips_are_refused_before_decoding(tmp_path: Path, size: tuple[int, int]) -> None:
    claim_size(tmp_path / "strip.png", *size)
    message = refusal(tmp_path)
    assert f"strip.png: is {size[0]} x {size[1]} pixels; at most 32768 on a side, and 20 times" in message
    claim_size(tmp_path / "strip.png", 660, 33)
    assert "is cut off" in refusal(tmp_path)  # of the size that is just allowed; its pixels are not there


@pytest.mark.parametrize("size", [(48, 40), (640, 127), (640, 128), (640, 200), (643, 401), (500, 1300)])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_the_header_says_what_a_photo_takes_in_memory(
    tmp_path: Path, suffix: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "LARGEST_SHORT_SIDE", 64)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(size=size).save(tmp_path / f"a{suffix}", exif=exif)
    assert images.decoded_bytes(tmp_path / f"a{suffix}") == len(read_photo(tmp_path / f"a{suffix}").image.tobytes())


def test_photos_that_would_fill_the_memory_are_refused_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):  # 9000 x 8000 pixels are kept at a third: 24 MB each
        claim_size(tmp_path / f"{number}.png", 9000, 8000)
    for number in range(30, 90):
        claim_size(tmp_path / f"{number}.png", 8000, 4000)
    message = refusal(tmp_path)
    assert "its 90 photos take 6.0 GiB of memory, and one concept may take 4 GiB; use fewer" in message
    monkeypatch.setattr(concepts, "MOST_DECODED_BYTES", 8 * 2**30)
    assert "0.png: is not a readable image, or is cut off" in refusal(tmp_path)


def test_all_damaged_files_are_named_in_one_error(folder: Path) -> None:
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("not an image")
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    photo(size=(200, 200)).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-900])
    message = refusal(folder)
    assert {line.split(": ")[0] for line in message.splitlines()[1:]} == {
        str(folder / name) for name in ("cut.jpg", "empty.jpg", "link.png", "text.jpg")
    }
    assert "replace or remove it" in message


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".gif", ".tif"])
def test_damage_anywhere_reads_or_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    photo().save(path)
    good = path.read_bytes()
    draw = np.random.default_rng(0)
    refusals = []
    for _ in range(120):
        damaged = bytearray(good[: draw.integers(1, len(good) + 1)] if draw.random() < 0.5 else good)
        for place in draw.integers(0, len(damaged), 3):
            damaged[place] = draw.integers(0, 256)
        path.write_bytes(damaged)
        try:
            image = read_photo(path).image
        except ConceptError as error:
            refusals.append(str(error))
        else:
            assert image.mode == "RGB"
    assert len(refusals) > 20
    assert all(text.startswith(f"{path}: ") for text in refusals)


def test_other_and_hidden_files_are_passed_over(folder: Path) -> None:
    (folder / "notes.md").write_text("x")
    (folder / "._1.png").write_bytes(b"not an image")
    (folder / "album.png").mkdir()
    assert [path.name for path in find_images(folder)] == ["1.png", "2.png"]


def test_a_folder_that_gives_no_image_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path} holds no image" in refusal(tmp_path)
    assert "is not there" in refusal(tmp_path / "missing")
    (tmp_path / "file").touch()
    assert "is a file" in refusal(tmp_path / "file")
