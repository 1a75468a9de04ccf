"""Embedded colour profiles: photos are seen in sRGB, and those without a profile stay to the bit."""

from __future__ import annotations

import hashlib
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from cat_cluster.data.photos import read_photo
from cat_cluster.errors import ConceptError

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# Wide primaries (XYZ under D50, the columns of Adobe RGB (1998) as its specification lists them) and gamma 2.2.
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
# sRGB's own, from IEC 61966-2-1 adapted to D50.
SRGB_PRIMARIES = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
GAMMA = 2.19921875
GREEN = (30, 180, 70)


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def icc(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", connection: bytes = b"XYZ ") -> bytes:
    """Pack an ICC version 2 profile from its tags (ICC.1:2001-04)."""
    table, data, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", offset + len(data), len(content))
        data += content
    size = offset + len(data)
    head = struct.pack(">I4sI4s4s4s", size, b"none", 0x02100000, kind, space, connection) + bytes(12) + b"acsp"
    return head.ljust(68, b"\0") + fixed(0.9642, 1.0, 0.8249) + bytes(48) + struct.pack(">I", len(tags)) + table + data


def tags_of(curves: list[bytes], colorants: np.ndarray | None) -> dict[bytes, bytes]:
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(GAMMA * 256))
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1.0, 0.8249),
        **dict.fromkeys(curves, curve),
    }
    if colorants is not None:
        names = (b"rXYZ", b"gXYZ", b"bXYZ")
        tags |= {name: b"XYZ " + bytes(4) + fixed(*column) for name, column in zip(names, colorants.T, strict=True)}
    return tags


WIDE = icc(b"RGB ", tags_of([b"rTRC", b"gTRC", b"bTRC"], ADOBE))
GREY = icc(b"GRAY", tags_of([b"kTRC"], None))


def in_wide(rgb: tuple[int, int, int]) -> tuple[int, ...]:
    """The same colour in the wide space, by the equations of both."""
    linear = np.array([v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in np.array(rgb) / 255])
    wide = np.linalg.solve(ADOBE, SRGB_PRIMARIES @ linear)
    return tuple(round(float(v)) for v in 255 * np.clip(wide, 0, 1) ** (1 / GAMMA))


def seen(path: Path) -> tuple[int, int, int]:
    colour = read_photo(path).image.getpixel((20, 20))
    assert isinstance(colour, tuple)
    return colour[0], colour[1], colour[2]


def near(colour: tuple[int, ...], expected: tuple[int, ...], error: int = 3) -> bool:
    return max(abs(a - b) for a, b in zip(colour, expected, strict=True)) <= error


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".avif", ".tif"])
def test_a_photo_is_seen_in_the_colours_of_its_profile(tmp_path: Path, suffix: str) -> None:
    stored = in_wide(GREEN)
    assert not near(stored, GREEN, 40)
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (48, 40), stored).save(path, icc_profile=WIDE, **({} if suffix == ".tif" else {"quality": 95}))
    assert near(seen(path), GREEN, 6 if suffix == ".webp" else 3)


def test_grey_palette_and_transparent_photos_follow_their_profiles_too(tmp_path: Path) -> None:
    stored = in_wide(GREEN)
    Image.new("RGB", (48, 40), stored).quantize(4).save(tmp_path / "palette.png", icc_profile=WIDE)
    Image.new("RGBA", (48, 40), (*stored, 255)).save(tmp_path / "opaque.png", icc_profile=WIDE)
    Image.new("RGBA", (48, 40), (*stored, 128)).save(tmp_path / "half.png", icc_profile=WIDE)
    assert near(seen(tmp_path / "palette.png"), GREEN)
    assert near(seen(tmp_path / "opaque.png"), GREEN)
    assert near(seen(tmp_path / "half.png"), tuple(round(128 / 255 * v + 127) for v in GREEN))
    # A fifth of the light, as gamma 2.2 and as sRGB write it; grey pixels may also have a profile for colours.
    level, expected = round(255 * 0.05 ** (1 / GAMMA)), round(255 * (1.055 * 0.05 ** (1 / 2.4) - 0.055))
    assert level != expected
    for name, mode, value, profile in (
        ("grey.png", "L", level, GREY),
        ("clear.png", "LA", (level, 255), GREY),
        ("coloured.png", "L", level, WIDE),
        ("deep.png", "I;16", level * 257, GREY),
    ):
        Image.new(mode, (48, 40), value).save(tmp_path / name, icc_profile=profile)
        assert near(seen(tmp_path / name), (expected,) * 3, 1), name


def test_photos_without_a_profile_or_in_srgb_stay_to_the_bit(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    for name, options in (("plain.png", {}), ("tagged.png", {"icc_profile": SRGB})):
        Image.fromarray(pixels).save(tmp_path / name, **options)
        photo = read_photo(tmp_path / name)
        image, digest = photo.image, photo.digest
        assert np.array_equal(np.asarray(image), pixels)
        assert digest == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_a_converted_photo_is_another_photo_and_is_not_converted_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (48, 40), in_wide(GREEN)).save(path, icc_profile=WIDE)
    photo = read_photo(path)
    image, digest = photo.image, photo.digest
    # Latents that an earlier version cached under the bytes' digest show other colours.
    assert digest != hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == read_photo(path).digest
    image.crop((0, 0, 40, 40)).save(tmp_path / "published.png")
    assert "icc_profile" not in Image.open(tmp_path / "published.png").info
    assert seen(tmp_path / "published.png") == image.getpixel((20, 20))


def ink_profile(cyan: tuple[int, int, int]) -> bytes:
    """A press whose paper is white, whose cyan is the given Lab colour and whose other inks are black (lut8)."""
    nodes = [(0, 0, 0)] * 16
    nodes[0b0000], nodes[0b1000] = (100, 0, 0), cyan
    ramp = bytes(range(256))
    lab = b"".join(bytes([round(L * 2.55), a + 128, b + 128]) for L, a, b in nodes)
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4 + lab + ramp * 3
    return icc(b"CMYK", {**tags_of([], None), b"A2B0": table}, b"prtr", b"Lab ")


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_cmyk_photos_follow_the_profile_of_their_inks(tmp_path: Path, suffix: str) -> None:
    level, a, b = cyan = (60, -20, -20)
    path = tmp_path / f"a{suffix}"
    Image.new("CMYK", (48, 40), (255, 0, 0, 0)).save(path, icc_profile=ink_profile(cyan))
    f = np.array([(level + 16) / 116 + a / 500, (level + 16) / 116, (level + 16) / 116 - b / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * np.array([0.9642, 1.0, 0.8249])
    linear = np.linalg.solve(SRGB_PRIMARIES, xyz)
    expected = tuple(round(float(v)) for v in 255 * (1.055 * linear ** (1 / 2.4) - 0.055))
    assert near(seen(path), expected)


@pytest.mark.parametrize("profile", [b"not a profile" * 20, WIDE[:200], GREY])
def test_profiles_that_cannot_be_used_are_refused_by_name(tmp_path: Path, profile: bytes) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (48, 40), "red").save(buffer, "PNG", icc_profile=profile)
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    with pytest.raises(ConceptError, match=r"a\.png: its colour profile cannot be used .* save it again in sRGB"):
        read_photo(tmp_path / "a.png")
