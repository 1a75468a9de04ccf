"""Settings from the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from cat_cluster.errors import SpecError
from cat_cluster.settings import load_settings


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CAT_STORAGE", "CAT_CACHE_DIR", "CAT_DEVICE"):
        monkeypatch.delenv(name, raising=False)


def test_defaults() -> None:
    settings = load_settings()
    assert (settings.storage, settings.device) == ("./cat-storage", "auto")
    assert settings.cache_dir == Path.home() / ".cache" / "cat-cluster"


def test_environment_overrides_and_empty_means_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAT_STORAGE", "/somewhere")
    monkeypatch.setenv("CAT_CACHE_DIR", "~/caches")
    monkeypatch.setenv("CAT_DEVICE", "")
    settings = load_settings()
    assert (settings.storage, settings.device) == ("/somewhere", "auto")
    assert settings.cache_dir == Path.home() / "caches"


def test_a_bad_device_is_refused_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAT_DEVICE", "gpu")
    with pytest.raises(SpecError, match=r"CAT_DEVICE=gpu: .*cuda:1"):
        load_settings()
