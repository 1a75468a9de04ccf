"""Adapters on their way from the store: files on disk, and packed vectors in host memory."""

from __future__ import annotations

import logging
import os
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from cat_cluster.errors import AdapterMismatchError, OutputError
from cat_cluster.files import write_whole
from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.registry import Manifest, Registry
from cat_cluster.registry.manifest import WEIGHTS, sha256

Key = tuple[str, str, str]  # adapter id, revision, sha256 of the weights: what was published under it never changes
Tier = Literal["slot", "host", "disk", "store"]

MIB = 1 << 20
_HEADER_BYTES = MIB  # names and shapes in a file of weights; those of SDXL take a third of it

# A file of ours, or what a crash left of one (see write_whole): nothing else in the folder is ever removed.
_OURS = re.compile(r"[0-9a-f]{64}\.safetensors|\.[0-9a-f]{32}")

_log = logging.getLogger(__name__)


def key_of(manifest: Manifest) -> Key:
    """Return what names a revision's weights in every tier."""
    stored = manifest.objects.get(WEIGHTS)
    return manifest.adapter_id, manifest.revision, "" if stored is None else stored.sha256


class DiskTier:
    """Downloaded files named by their sha256, at most `budget` bytes, the least recently used go first.

    Several processes may share the folder. A cache that cannot be read or written is logged and done without.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self._folder = folder
        self._budget = budget

    def read(self, digest: str) -> bytes | None:
        """Return the file of a digest; None if it is not there or damaged, and then it is removed."""
        path = self._path(digest)
        try:
            data = path.read_bytes()
            if sha256(data) == digest:
                os.utime(path)
                return data
            _log.warning("%s is damaged and will be fetched again", path)
            path.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            _log.warning("the disk cache cannot be used: %s", error)
        return None

    def write(self, digest: str, data: bytes) -> int:
        """Keep a file, unless it is larger than the whole cache; return how many others were removed for it."""
        if len(data) > self._budget:
            return 0
        try:
            write_whole(self._path(digest), data)
            return self._shrink()
        except (OutputError, OSError) as error:
            _log.warning("the disk cache cannot be used: %s", error)
            return 0

    def _shrink(self) -> int:
        files = [(entry.stat(), Path(entry.path)) for entry in os.scandir(self._folder) if _OURS.fullmatch(entry.name)]
        excess = sum(stat.st_size for stat, _ in files) - self._budget
        removed = 0
        for stat, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= stat.st_size
            removed += 1
        return removed

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}.safetensors"


class HostTier:
    """Packed adapters in host memory, at most `budget` bytes, the least recently used go first. Not thread-safe."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._vectors: OrderedDict[Key, Tensor] = OrderedDict()
        self.bytes = 0

    def get(self, key: Key) -> Tensor | None:
        """Return an adapter's vector [F], and count that as a use."""
        vector = self._vectors.get(key)
        if vector is not None:
            self._vectors.move_to_end(key)
        return vector

    def put(self, key: Key, vector: Tensor) -> int:
        """Keep a vector, unless it is larger than the whole tier; return how many others were evicted for it."""
        self.drop(key)
        if vector.nbytes > self._budget:
            return 0
        self._vectors[key] = vector
        self.bytes += vector.nbytes
        evicted = 0
        while self.bytes > self._budget:
            _, oldest = self._vectors.popitem(last=False)
            self.bytes -= oldest.nbytes
            evicted += 1
        return evicted

    def drop(self, key: Key) -> None:
        """Forget an adapter, if it is there."""
        vector = self._vectors.pop(key, None)
        self.bytes -= 0 if vector is None else vector.nbytes

    def held(self) -> list[Key]:
        """Return what is kept, the least recently used first."""
        return list(self._vectors)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A verified, packed adapter [F] in host memory, the tier it came from, and its file."""

    vector: Tensor
    tier: Tier
    data: bytes


class Loader:
    """Reads an adapter from disk or store, verifies and packs it; it evicts nothing. Safe to call from any thread."""

    def __init__(
        self,
        registry: Registry,
        disk: DiskTier | None,
        pack: Callable[[AdapterWeights], Tensor],
        pool: Tensor,
        *,
        max_rank: int,
        base_fingerprint: str,
        unet: UNet2DConditionModel,
    ) -> None:
        self._registry = registry
        self._disk = disk
        self._pack = pack
        self._dtype, self._pinned = pool.dtype, pool.is_cuda
        self._max_rank = max_rank
        self._max_bytes = 4 * pool.shape[1] + _HEADER_BYTES  # files hold fp32
        self._base_fingerprint = base_fingerprint
        self._unet = unet

    def check(self, manifest: Manifest) -> None:
        """Raise AdapterMismatchError for an adapter that its manifest shows not to fit a slot."""
        stored = manifest.objects.get(WEIGHTS)
        if manifest.rank > self._max_rank:
            raise AdapterMismatchError(
                f"{manifest.name} has rank {manifest.rank} and this service takes up to {self._max_rank}: "
                "raise max_rank, or train it with a smaller rank"
            )
        if stored is not None and stored.size > self._max_bytes:
            raise AdapterMismatchError(
                f"the weights of {manifest.name} have {stored.size} bytes and a slot takes up to {self._max_bytes}: "
                "raise max_rank, or have more layers in targets"
            )

    def load(self, manifest: Manifest) -> Loaded:
        """Return an adapter ready to be copied into a slot.

        Raises AdapterMismatchError for another base, too large a rank or foreign layers, AdapterFormatError for damaged
        weights, StoreError when they cannot be fetched.
        """
        self.check(manifest)
        tier: Tier = "store"
        data = b""

        def fetch(key: str) -> bytes:
            nonlocal tier, data
            found = None if self._disk is None else self._disk.read(manifest.objects[WEIGHTS].sha256)
            tier = "store" if found is None else "disk"
            data = self._registry.store.get(key) if found is None else found
            return data

        weights = self._registry.load_weights(
            manifest, base_fingerprint=self._base_fingerprint, unet=self._unet, fetch=fetch
        )
        with torch.inference_mode():
            vector = self._pack(weights).to(self._dtype).contiguous()
            return Loaded(vector.pin_memory() if self._pinned else vector, tier, data)

    def keep(self, manifest: Manifest, loaded: Loaded) -> int:
        """Write the file of an adapter from the store to disk; return how many files were evicted for it."""
        if self._disk is None or loaded.tier != "store":
            return 0
        return self._disk.write(manifest.objects[WEIGHTS].sha256, loaded.data)
