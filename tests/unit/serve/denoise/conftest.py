"""The images that the tests of the engine ask for, and its U-Net calls under watch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cat_cluster.models.base_model import load_base_model
from tests.support.denoised_images import ImageOracle, random_adapter
from tests.support.engines import MIXED, PLAIN, UNGUIDED, Calls


@pytest.fixture(scope="module")
def oracle(tiny_base_folder: Path) -> ImageOracle:
    base = load_base_model(str(tiny_base_folder))
    oracle = ImageOracle(base, {key: random_adapter(base, key, rank=1 + key % 3) for key in range(1, 9)})
    for wanted in [*MIXED, PLAIN, UNGUIDED]:
        oracle.image(wanted)
    return oracle


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """The U-Net calls, watched and computed."""
    calls = Calls(monkeypatch)
    yield calls
    calls.go()


@pytest.fixture
def empty_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Calls that count steps and compute nothing."""
    calls = Calls(monkeypatch, compute=False)
    yield calls
    calls.go()
