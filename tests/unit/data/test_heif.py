"""HEIC photos, where the extra `heic` is installed: as their container has them, or a refusal that names the file."""

from __future__ import annotations

import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageOps

from cat_cluster.data import photos
from cat_cluster.data.concepts import load_concept
from cat_cluster.data.edit_image import read_edit_image
from cat_cluster.data.photos import read_photo
from cat_cluster.errors import ConceptError, SpecError
from cat_cluster.spec.concept import ConceptSpec
from tests.unit.data.test_colour import GREEN, WIDE, in_wide, near, seen
from tests.unit.data.test_photos import photo

LOSSLESS = {"quality": -1, "chroma": 444}
_ORIENTATION = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00"  # of an EXIF in big-endian order, before its value


def heic(*images: Image.Image, **options: Any) -> bytes:
    file, kept = pillow_heif.from_pillow(images[0]), io.BytesIO()
    for image in images[1:]:
        file.add_from_pillow(image)
    file.save(kept, **{**LOSSLESS, **options})
    return kept.getvalue()


def turned(stored: Image.Image, *, container: int, exif: int) -> bytes:
    """A photo that its container turns as EXIF's orientation `container` would, and whose EXIF says `exif`."""
    written = Image.Exif()
    written[0x0112] = container
    content = heic(stored, exif=written.tobytes())
    place = content.index(_ORIENTATION) + len(_ORIENTATION)
    return content[:place] + bytes([exif]) + content[place + 1 :]


def error(image: Image.Image, expected: Image.Image) -> int:
    return int(np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int)).max())


@pytest.mark.parametrize("name", ["a.heic", "a.HEIF", "a.hif", "IMG_1", "a.jpg"])
def test_a_heic_photo_is_read_whatever_its_name(tmp_path: Path, name: str) -> None:
    content = heic(photo())
    (tmp_path / name).write_bytes(content)
    [example] = load_concept(ConceptSpec(token="sks", class_noun="cup", images=str(tmp_path))).examples
    assert example.image.mode == "RGB"
    assert error(example.image, photo()) <= 2  # it is stored as luma and chroma
    assert example.digest == hashlib.sha256(content).hexdigest()


def test_a_jpeg_that_is_called_heic_is_read(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.heic", "JPEG", quality=95)
    assert error(read_photo(tmp_path / "a.heic").image, photo()) <= 12


def test_ten_bits_keep_their_tones(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16)[None, :, None], (40, 1, 3))
    kept = io.BytesIO()
    pillow_heif.from_bytes("RGB;16", (256, 40), ramp.tobytes()).save(kept, **LOSSLESS)
    (tmp_path / "a.heic").write_bytes(kept.getvalue())
    assert pillow_heif.open_heif(kept, convert_hdr_to_8bit=False).info["bit_depth"] == 10
    image = read_photo(tmp_path / "a.heic").image
    assert np.abs(np.asarray(image)[0].astype(int) - np.arange(256)[:, None]).max() <= 2


def test_alpha_is_laid_over_white_and_is_what_an_edit_marks(tmp_path: Path) -> None:
    image = Image.new("RGBA", (64, 64), (0, 0, 200, 255))
    image.paste((200, 0, 0, 0), (0, 0, 16, 64))
    (tmp_path / "a.heic").write_bytes(heic(image))
    read = read_photo(tmp_path / "a.heic").image
    assert near(read.getpixel((4, 4)), (255, 255, 255))
    assert near(read.getpixel((40, 4)), (0, 0, 200))
    edit = read_edit_image(heic(image), None, (64, 64))
    assert edit.mask is not None
    assert (edit.mask == (np.arange(64) < 16)[None]).all()


def test_a_profile_is_followed(tmp_path: Path) -> None:
    content = heic(Image.new("RGB", (48, 40), in_wide(GREEN)), icc_profile=WIDE)
    (tmp_path / "a.heic").write_bytes(content)
    assert near(seen(tmp_path / "a.heic"), GREEN)
    assert near(tuple(read_edit_image(content, None, (32, 32)).pixels[9, 9].tolist()), GREEN)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_once_by_its_container_and_not_by_its_exif(tmp_path: Path, orientation: int) -> None:
    stored = photo(size=(64, 48))
    stored.getexif()[0x0112] = orientation
    upright = ImageOps.exif_transpose(stored)
    for exif, container, expected in ((orientation, orientation, upright), (orientation, 1, photo(size=(64, 48)))):
        content = turned(photo(size=(64, 48)), container=container, exif=exif)
        (tmp_path / "a.heic").write_bytes(content)
        image = read_photo(tmp_path / "a.heic").image
        assert image.size == expected.size
        assert error(image, expected) <= 2
        edit = read_edit_image(content, None, expected.size)
        assert edit.notes == ()
        assert error(Image.fromarray(edit.pixels), expected) <= 2


def test_the_thumbnail_in_a_photo_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "LARGEST_SHORT_SIDE", 64)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 640, 3), dtype=np.uint8))
    (tmp_path / "a.heic").write_bytes(heic(noise, thumbnails=[320]))
    image = read_photo(tmp_path / "a.heic").image
    assert error(image, noise.reduce(400 // 64)) <= 2
    assert photos.decoded_bytes(tmp_path / "a.heic") == len(image.tobytes())
    edit = read_edit_image(heic(noise, thumbnails=[320]), None, (64, 40))
    assert error(Image.fromarray(edit.pixels), ImageOps.fit(noise, (64, 40), Image.Resampling.LANCZOS)) <= 2


def test_the_first_of_several_pictures_is_the_one_that_the_file_says(tmp_path: Path) -> None:
    content = heic(photo(1), photo(9), primary_index=1)
    (tmp_path / "a.heic").write_bytes(content)
    assert error(read_photo(tmp_path / "a.heic").image, photo(9)) <= 2
    with pytest.raises(SpecError, match="image: holds several pictures"):
        read_edit_image(content, None, (32, 32))


@pytest.mark.parametrize(
    ("primaries", "curve"),
    [(9, 16), (9, 18), (12, 13), (1, 16)],  # BT.2100 PQ and HLG; Display P3; PQ
)
def test_colours_that_would_be_wrong_are_refused_by_name(tmp_path: Path, primaries: int, curve: int) -> None:
    options = {"color_primaries": primaries, "transfer_characteristics": curve}
    (tmp_path / "a.heic").write_bytes(heic(photo(), **options))
    with pytest.raises(ConceptError, match=rf"a\.heic: its colours .*primaries {primaries}, curve {curve} .* sRGB"):
        read_photo(tmp_path / "a.heic")
    with pytest.raises(SpecError, match="image: its colours"):
        read_edit_image(heic(photo(), **options), None, (32, 32))


def test_sizes_are_limited_before_decoding(tmp_path: Path) -> None:
    content = heic(photo(size=(64, 64)))
    place = content.index(b"ispe") + 8
    (tmp_path / "a.heic").write_bytes(
        content[:place] + (20_001).to_bytes(4, "big") + (10_000).to_bytes(4, "big") + content[place + 8 :]
    )
    with pytest.raises(ConceptError, match=r"a\.heic: has more than 200 megapixels"):
        read_photo(tmp_path / "a.heic")


def test_damage_anywhere_reads_or_is_refused_by_name(tmp_path: Path) -> None:
    path, good, draw = tmp_path / "a.heic", heic(photo()), np.random.default_rng(0)
    refusals = []
    for _ in range(120):
        damaged = bytearray(good[: draw.integers(13, len(good) + 1)] if draw.random() < 0.5 else good)
        for place in draw.integers(12, len(damaged), 3):
            damaged[place] = draw.integers(0, 256)
        path.write_bytes(damaged)
        try:
            assert read_photo(path).image.mode == "RGB"
        except ConceptError as refused:
            refusals.append(str(refused))
    assert len(refusals) > 20
    assert all(text.startswith(f"{path}: ") for text in refusals)
    path.write_bytes(good[:-40])
    with pytest.raises(ConceptError, match=r"a\.heic: is not a readable image, or is cut off \(Invalid input"):
        read_photo(path)


def test_without_the_extra_the_refusal_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for name in ("a.heic", "IMG_1", "b.jpg"):
        (tmp_path / name).write_bytes(heic(photo()))
    with pytest.raises(ConceptError) as caught:
        load_concept(ConceptSpec(token="sks", class_noun="cup", images=str(tmp_path)))
    for name in ("a.heic", "IMG_1", "b.jpg"):
        assert f"{tmp_path / name}: is a HEIC photo, and those are read where pillow-heif is installed" in str(
            caught.value
        )
    assert str(caught.value).count("pip install 'cat-cluster[heic]', or save it as JPEG or PNG") == 3
    with pytest.raises(SpecError, match="image: is a HEIC photo"):
        read_edit_image(heic(photo()), None, (32, 32))
