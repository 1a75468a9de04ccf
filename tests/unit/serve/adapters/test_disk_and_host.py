"""The disk cache and host memory: bounded, verified, and never a reason for a request to fail."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch

from serve.adapters.disk_cache import DiskCache
from serve.adapters.host_memory import Vectors
from tests.support.served_adapters import World, lease, wait_until, weights_key


def put(disk: DiskCache, data: bytes) -> str:
    digest = hashlib.sha256(data).hexdigest()
    disk.write(digest, data)
    return digest


def test_the_least_recently_used_files_go_and_foreign_files_stay(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, budget=300)
    (tmp_path / "notes.txt").write_bytes(b"x" * 1000)
    left_by_a_crash = tmp_path / f".{'0' * 32}"
    left_by_a_crash.write_bytes(b"x" * 100)
    os.utime(left_by_a_crash, (0, 0))
    digests = []
    for number in range(3):
        digests.append(put(disk, bytes([number]) * 100))
        os.utime(tmp_path / f"{digests[-1]}.safetensors", (number + 1, number + 1))
    assert not left_by_a_crash.exists()
    assert disk.read(digests[0]) == bytes(100)
    digests.append(put(disk, bytes([3]) * 100))
    assert [disk.read(digest) is not None for digest in digests] == [True, False, True, True]
    assert (tmp_path / "notes.txt").exists()
    put(disk, b"y" * 150)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) <= 300
    assert disk.write("0" * 64, b"x" * 301) == 0
    assert disk.read("0" * 64) is None


def test_a_damaged_file_is_dropped(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, budget=1000)
    digest = put(disk, b"good")
    (tmp_path / f"{digest}.safetensors").write_bytes(b"evil")
    assert disk.read(digest) is None
    assert os.listdir(tmp_path) == []


def test_a_disk_that_cannot_be_used_is_done_without(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    manifest = world.publish("cup")
    cache = world.cache(disk_cache=tmp_path / "file" / "cache")
    lease(cache, manifest).release()
    wait_until(lambda: "the disk cache cannot be used" in caplog.text)


def test_a_file_on_disk_saves_the_store_unless_it_is_damaged(world: World, tmp_path: Path) -> None:
    manifest = world.publish("cup")
    file = tmp_path / "disk" / f"{manifest.objects['weights'].sha256}.safetensors"
    lease(world.cache(disk_cache=tmp_path / "disk"), manifest).release()
    wait_until(file.exists)
    with lease(world.cache(disk_cache=tmp_path / "disk"), manifest) as granted:
        assert torch.equal(granted.flat, world.vector(manifest))
        assert world.metric("cat_adapter_requests_total", tier="disk") == 1
    file.write_bytes(b"evil")
    cache = world.cache(disk_cache=tmp_path / "disk")
    with lease(cache, manifest):
        assert world.store.asked[weights_key(manifest)] == 1
    wait_until(lambda: file.exists() and file.read_bytes() != b"evil")


def test_a_vector_larger_than_host_memory_evicts_nothing() -> None:
    host = Vectors(budget=100)
    small, large = ("a", "r", "1"), ("b", "r", "2")
    assert host.put(small, torch.zeros(20)) == 0
    assert host.put(large, torch.zeros(30)) == 0
    assert (host.held(), host.bytes) == ([small], 80)
    assert host.put(large, torch.zeros(10)) == 1
    assert (host.held(), host.bytes) == ([large], 40)
    host.drop(small)
    host.drop(large)
    assert (host.held(), host.bytes) == ([], 0)
