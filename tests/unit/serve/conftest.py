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


def furnished(base: Path, storage: Path) -> Shop:
    """Three adapters of a base in a registry of their own."""
    shop = Shop(base, load_base_model(str(base)), Registry(LocalStore(storage)))
    for seed, name in enumerate(("cup", "mug", "jar"), 1):
        shop.publish(name, seed)
    return shop


@pytest.fixture(scope="module", params=["tiny_base_folder", "tiny_xl_folder"])
def shop_of_each_family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return furnished(request.getfixturevalue(request.param), tmp_path_factory.mktemp("storage"))


@pytest.fixture(scope="module")
def shop(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    shop = furnished(tiny_base_folder, tmp_path_factory.mktemp("storage"))
    shop.publish("foreign", 1, base_fingerprint="f" * 64)
    shop.publish("wild", 5, factor=1e30)
    return shop


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    yield
    mine = ("cat-", "adapter-")
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith(mine)])
