"""Which sizes a service offers where nobody says: those that its base was trained on, or near them."""

from __future__ import annotations

import pytest

from cat_cluster.models.base_files import landscape
from cat_cluster.models.base_model import load_base_model
from cat_cluster.models.pocket_xl.world import FRAMES
from serve.denoise.sizes import parse_sizes


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("tiny_base_folder", ((16, 16), (24, 16), (16, 24))),
        ("tiny_xl_folder", ((16, 16), (20, 12), (12, 20))),
    ],
)
def test_an_sdxl_offers_shapes_of_as_many_pixels_as_its_square(
    request: pytest.FixtureRequest, family: str, sizes: tuple[tuple[int, int], ...]
) -> None:
    base = load_base_model(str(request.getfixturevalue(family)))
    assert parse_sizes(None, base) == sizes
    assert parse_sizes(("24x16",), base) == ((16, 16), (24, 16))


def test_shapes_are_near_those_of_the_training() -> None:
    """SDXL's multi-aspect training had 1216x832 (arXiv 2307.01952, appendix I); Pocket-XL's frames are in its world."""
    assert landscape(1024, 32, of_equal_area=True) == (1248, 832)
    width, height = landscape(64, 8, of_equal_area=True)
    assert (height, width) in FRAMES
    assert landscape(512, 64, of_equal_area=False) == (768, 512)


@pytest.mark.parametrize("side", [64, 128, 512, 1000, 1024])
@pytest.mark.parametrize("unit", [8, 32, 64])
def test_sides_are_whole_units_and_pixels_no_more_than_the_squares(side: int, unit: int) -> None:
    width, height = landscape(side, unit, of_equal_area=True)
    assert width % unit == height % unit == 0
    assert 0 < height <= width
    assert width * height <= side * side
