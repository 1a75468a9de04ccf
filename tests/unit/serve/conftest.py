"""A registry of adapters to serve, and the check that no thread is left."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cat_cluster.models.base_model import load_base_model
from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore
from tests.support.engines import wait_until
from tests.support.services import Shop


@pytest.fixture(scope="module")
def shop(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    storage = tmp_path_factory.mktemp("storage")
    shop = Shop(tiny_base_folder, load_base_model(str(tiny_base_folder)), Registry(LocalStore(storage)))
    for seed, name in enumerate(("cup", "mug", "jar"), 1):
        shop.publish(name, seed)
    shop.publish("foreign", 1, base_fingerprint="f" * 64)
    shop.publish("wild", 5, factor=1e30)
    return shop


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    yield
    mine = ("cat-", "adapter-")
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith(mine)])
