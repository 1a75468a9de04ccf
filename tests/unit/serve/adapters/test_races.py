"""Many threads on one cache: whatever they do, a lease's slot holds its adapter, and nothing is left behind."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import CancelledError, Future
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cat_cluster.errors import CatClusterError
from cat_cluster.registry import Manifest
from cat_cluster.registry.manifest import WEIGHTS
from serve.adapters.cache import Lease
from tests.support.served_adapters import SOON, CacheOnLoop, World, lease, wait_until

pytestmark = pytest.mark.slow

IDS = [f"a{number}" for number in range(12)]


THREADS, SECONDS = 8, 4.0


class Vectors:
    """What each file of weights packs to, recorded before its revision is published."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._vectors: dict[str, Tensor] = {}

    def publish(self, adapter_id: str, seed: int) -> None:
        manifest = self._world.publish(adapter_id, seed=seed)
        self._vectors.setdefault(manifest.objects[WEIGHTS].sha256, self._world.vector(manifest))

    def of(self, manifest: Manifest) -> Tensor:
        wait_until(lambda: manifest.objects[WEIGHTS].sha256 in self._vectors)
        return self._vectors[manifest.objects[WEIGHTS].sha256]


class User(threading.Thread):
    """Leases, checks, holds, cancels, loads, prefetches and unloads at random until told to stop."""

    def __init__(self, cache: CacheOnLoop, vectors: Vectors, seed: int, stop: threading.Event) -> None:
        super().__init__()
        self._cache = cache
        self._vectors = vectors
        self._random = random.Random(seed)
        self._done = stop
        self.problems: list[BaseException] = []
        self.granted = 0

    def run(self) -> None:
        while not self._done.is_set():
            try:
                self._act()
            except (CatClusterError, CancelledError):
                pass  # deleted, not there yet, cancelled, or no slot within the limit
            except BaseException as error:
                self.problems.append(error)
                return

    def _act(self) -> None:
        dice, reference = self._random.random(), self._random.choice(IDS)
        if dice < 0.1:
            action = self._random.choice([self._cache.load, self._cache.prefetch, self._cache.unload])
            action(reference).result(SOON)
            return
        future = self._cache.lease(self._cache.resolve(reference).result(SOON).manifest)
        if dice < 0.4:
            time.sleep(self._random.random() * 0.003)
            if future.cancel():
                return
        self._hold(future)

    def _hold(self, future: Future[Lease]) -> None:
        with future.result(SOON) as granted:
            wanted = self._vectors.of(granted.manifest)
            assert torch.equal(granted.flat, wanted), "granted with other weights"
            time.sleep(self._random.random() * 0.003)
            assert torch.equal(granted.flat, wanted), "overwritten while leased"
            self.granted += 1


def change_the_registry(world: World, vectors: Vectors, stop: threading.Event) -> None:
    """Publish new revisions, move aliases back and delete what no alias names."""
    dice = random.Random(99)
    while not stop.is_set():
        adapter_id = dice.choice(IDS)
        vectors.publish(adapter_id, dice.randrange(1000))
        manifests = world.registry.revisions(adapter_id)
        world.registry.set_alias(adapter_id, "latest", dice.choice(manifests).revision)
        for manifest in manifests[2:]:
            try:
                world.registry.delete(adapter_id, manifest.revision)
            except CatClusterError:
                continue  # an alias names it


def test_slots_hold_what_was_leased_whatever_threads_do(world: World, tmp_path: Path) -> None:
    vectors = Vectors(world)
    for seed, adapter_id in enumerate(IDS):
        vectors.publish(adapter_id, seed)
    cache = world.cache(
        host_mib=1, disk_cache=tmp_path / "disk", disk_mib=1, alias_ttl_s=0.02, missing_ttl_s=0.02, load_timeout_s=5.0
    )
    stop = threading.Event()
    users = [User(cache, vectors, seed, stop) for seed in range(THREADS)]
    publisher = threading.Thread(target=change_the_registry, args=(world, vectors, stop))
    for thread in (*users, publisher):
        thread.start()
    time.sleep(SECONDS)
    stop.set()
    for thread in (*users, publisher):
        thread.join(SOON)
        assert not thread.is_alive()
    assert [problem for user in users for problem in user.problems] == []
    assert all(user.granted > 10 for user in users), [user.granted for user in users]

    wait_until(cache.is_idle)
    status = cache.status()
    assert (status["loading"], status["waiting"]) == ([], [])
    assert [slot for slot in status["held"] if slot["leases"] or slot["pinned"]] == []
    assert world.metric("cat_adapter_slots_leased") == 0
    assert world.metric("cat_adapter_slots_used") == len(status["held"])
    assert status["host_bytes"] <= 1 << 20
    final = [world.registry.resolve(adapter_id) for adapter_id in IDS[:3]]
    leases = [lease(cache, manifest) for manifest in final]  # every slot can still be had
    for one in leases:
        assert torch.equal(one.flat, vectors.of(one.manifest))
        one.release()
