"""Training services on a store of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cat_cluster.cluster import train_service
from cat_cluster.store import LocalStore
from tests.support.train_services import Preparation, Room, Service


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def start(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Service]]:
    monkeypatch.setattr(train_service, "EngineRoom", Room)
    monkeypatch.setattr(train_service, "Preparation", Preparation)
    started: list[Service] = []

    def make(**options: Any) -> Service:
        started.append(Service(store, **options))
        return started[-1]

    yield make
    for one in started:
        one.service.__exit__(None, None, None)
