"""The bases that training is tried on."""

from __future__ import annotations

from pathlib import Path

import pytest

from cat_cluster.models.base_model import BaseModel, load_base_model


@pytest.fixture
def base(tiny_base_folder: Path) -> BaseModel:
    return load_base_model(str(tiny_base_folder))


@pytest.fixture(params=["tiny_base_folder", "tiny_xl_folder"])
def of_each_family(request: pytest.FixtureRequest) -> BaseModel:
    return load_base_model(str(request.getfixturevalue(request.param)))
