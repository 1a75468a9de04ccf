"""A registry with a cache on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel

from tests.support.served_adapters import World


@pytest.fixture(scope="module")
def unet(tiny_base_folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_base_folder / "unet")


@pytest.fixture
def world(unet: UNet2DConditionModel, tmp_path: Path) -> Iterator[World]:
    world = World(unet, tmp_path)
    yield world
    world.close()
