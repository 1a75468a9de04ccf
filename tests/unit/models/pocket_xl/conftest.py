from __future__ import annotations

from pathlib import Path

import pytest

from cat_cluster.models.pocket_xl.emojis import Emoji, load_emojis
from tests.support.drawn_emojis import write_emojis


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_emojis(tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="session")
def emojis(package: Path) -> tuple[Emoji, ...]:
    return load_emojis(package)
