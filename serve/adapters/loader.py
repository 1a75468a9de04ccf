"""An adapter on its way from disk or store into host memory: fetched, verified and packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cat_cluster.errors import AdapterMismatchError, AdapterNotFoundError, ObjectNotFoundError
from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.registry import Manifest, Reference, Registry
from cat_cluster.registry.manifest import WEIGHTS
from serve.adapters.disk_cache import DiskCache

Key = tuple[str, str, str]  # adapter id, revision, sha256 of the weights: what was published under it never changes
Tier = Literal["slot", "host", "disk", "store"]

MIB = 1 << 20
_HEADER_BYTES = MIB  # names and shapes in a file of weights; those of SDXL take a third of it


def key_of(manifest: Manifest) -> Key:
    """Return what names a revision's weights in every tier."""
    stored = manifest.objects.get(WEIGHTS)
    return manifest.adapter_id, manifest.revision, "" if stored is None else stored.sha256


def name_of(key: Key) -> str:
    """Return the revision's name, `id@r-...`."""
    return f"{key[0]}@{key[1]}"


@dataclass(frozen=True, eq=False)
class Loaded:
    """A verified, packed adapter [F] or [F + T] in host memory, the tier it came from, and its file."""

    vector: Tensor
    tier: Tier
    data: bytes


class Loader:
    """Reads an adapter from disk or store, verifies and packs it; it evicts nothing. Safe to call from any thread."""

    def __init__(
        self,
        registry: Registry,
        disk: DiskCache | None,
        pack: Callable[[AdapterWeights], Tensor],
        pool: Tensor,
        *,
        max_rank: int,
        base_fingerprints: Sequence[str],
        network: nn.Module,
        text_size: int,
    ) -> None:
        """text_size: T, the floats that layers of text encoders may add to a row of the pool."""
        self._registry = registry
        self._disk = disk
        self._pack = pack
        self._dtype, self._page_locked = pool.dtype, pool.is_cuda
        self._max_rank = max_rank
        self._max_bytes = 4 * (pool.shape[1] + text_size) + _HEADER_BYTES  # files hold fp32
        self._base_fingerprints = base_fingerprints
        self._network = network

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
        weights, AdapterNotFoundError for a revision deleted since it was looked up, StoreError when its weights cannot
        be fetched.
        """
        self.check(manifest)
        try:
            return self._read(manifest)
        except ObjectNotFoundError:
            if self._registry.look_up(Reference(manifest.adapter_id, manifest.revision)) is None:
                raise AdapterNotFoundError(
                    f"{manifest.name} was deleted: GET /v1/models lists those there are"
                ) from None
        return self._read(manifest)  # its manifest is there: it may have been published again meanwhile

    def keep(self, manifest: Manifest, loaded: Loaded) -> int:
        """Write the file of an adapter from the store to disk; return how many files were evicted for it."""
        if self._disk is None or loaded.tier != "store":
            return 0
        return self._disk.write(manifest.objects[WEIGHTS].sha256, loaded.data)

    def _read(self, manifest: Manifest) -> Loaded:
        tier: Tier = "store"
        data = b""

        def fetch(key: str) -> bytes:
            nonlocal tier, data
            found = None if self._disk is None else self._disk.read(manifest.objects[WEIGHTS].sha256)
            tier = "store" if found is None else "disk"
            data = self._registry.store.get(key) if found is None else found
            return data

        try:
            weights = self._registry.load_weights(
                manifest, base_fingerprints=self._base_fingerprints, unet=self._network, fetch=fetch
            )
            with torch.inference_mode():
                vector = self._pack(weights).to(self._dtype).contiguous()
                return Loaded(vector.pin_memory() if self._page_locked else vector, tier, data)
        except AdapterMismatchError as error:  # it may be one of several on an image
            named = manifest.name in str(error)
            raise AdapterMismatchError(str(error) if named else f"{manifest.name}: {error}") from error
