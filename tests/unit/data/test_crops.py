"""Crops: the bucket that leaves out least of a photo, and where in it a crop lies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cat_cluster.data.concepts import Example
from cat_cluster.data.crops import Size, bucket_of, crop_pixels, crop_sizes, share_cut


def left_out(photo: Size, size: Size) -> float:
    """Oracle: scale the photo until it covers the size, and count what hangs over."""
    scale = max(size.width / photo.width, size.height / photo.height)
    return 1 - size.width * size.height / (photo.width * scale * photo.height * scale)


@pytest.mark.parametrize(
    ("photo", "bucket"),
    [
        ((4000, 4000), (512, 512)),
        ((3000, 4000), (448, 576)),  # a phone's photo: 4% are cut off, and a quarter for a square
        ((4000, 3000), (576, 448)),
        ((1080, 1920), (384, 640)),
        ((600, 400), (576, 384)),
        ((4000, 200), (1024, 256)),  # none is longer than four times its height
    ],
)
def test_the_bucket_of_a_photo_has_its_shape(photo: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert bucket_of(Size(*photo), 512, 64) == bucket


@given(
    width=st.integers(32, 5000),
    height=st.integers(32, 5000),
    step=st.sampled_from([8, 16, 32, 64]),
    count=st.integers(1, 16),
)
@settings(max_examples=200, deadline=None)
def test_no_other_bucket_leaves_out_less(width: int, height: int, step: int, count: int) -> None:
    photo, resolution = Size(width, height), step * count
    found = bucket_of(photo, resolution, step)
    sides = [n * step for n in range(1, 2 * count + 1) if 2 * n * step >= resolution]
    others = [Size(w, h) for w in sides for h in sides if 0.8 * resolution**2 <= w * h <= resolution**2]
    assert found in others
    least = min(left_out(photo, size) for size in others)
    assert left_out(photo, found) == pytest.approx(least, abs=1e-9) == pytest.approx(share_cut(photo, found), abs=1e-9)
    assert left_out(photo, found) <= left_out(photo, Size.square(resolution)) + 1e-9


def example(width: int, height: int) -> Example:
    """A photo whose red rises to the right and whose green rises downwards."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    image = Image.fromarray(np.stack([red, green, 0 * red], axis=-1).round().astype(np.uint8))
    return Example(Path("a.png"), "digest", image, "a sks cup", "a cup")


def test_further_crops_are_keyed_by_the_photo() -> None:
    photo, other = example(90, 60), replace(example(90, 60), digest="other")
    first = crop_pixels(photo, 1, Size(48, 32))
    assert torch.equal(first, crop_pixels(photo, 1, Size(48, 32)))
    assert not torch.equal(first, crop_pixels(photo, 2, Size(48, 32)))
    assert not torch.equal(first, crop_pixels(other, 1, Size(48, 32)))
    assert first.abs().max() <= 1.0


def test_the_first_crop_is_the_middle_of_the_photo_as_large_as_can_be() -> None:
    photo = example(90, 60)
    wanted = photo.image.crop((15, 0, 75, 60)).resize((48, 48), Image.Resampling.LANCZOS)
    pixels = (crop_pixels(photo, 0, Size(48, 48)) + 1.0) * 127.5
    assert np.array_equal(pixels.round().permute(1, 2, 0).numpy().astype(np.uint8), np.asarray(wanted))
    wide = (crop_pixels(photo, 0, Size(48, 32)) + 1.0) * 127.5
    assert wide.shape == (3, 32, 48)
    whole = photo.image.resize((48, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(wide.round().permute(1, 2, 0).numpy().astype(np.uint8), np.asarray(whole))


@pytest.mark.parametrize("size", [Size(48, 48), Size(64, 32), Size(32, 56)])
@pytest.mark.parametrize("crop", [0, 1, 2, 3])
def test_what_a_base_is_told_of_a_crop_is_where_it_is(size: Size, crop: int) -> None:
    """Oracle: the colours of the crop's corner, which say where in the photo it comes from."""
    photo = example(640, 480)
    told, pixels = crop_sizes(photo, crop, size), (crop_pixels(photo, crop, size) + 1.0) / 2.0
    assert told[:2] == (480, 640)
    assert told[4:] == (size.height, size.width)
    (red_left, red_right), (green_top, green_bottom) = pixels[0, 0, [0, -1]].tolist(), pixels[1, [0, -1], 0].tolist()
    across = (red_right - red_left) * 640 / (size.width - 1)  # pixels of the photo for one of the crop
    down = (green_bottom - green_top) * 480 / (size.height - 1)
    assert across == pytest.approx(down, rel=0.04), "nothing is stretched"
    assert told.crop_left == pytest.approx(red_left * 640 / across, abs=1.5)
    assert told.crop_top == pytest.approx(green_top * 480 / down, abs=1.5)
