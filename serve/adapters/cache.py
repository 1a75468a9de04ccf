"""The adapter cache: store -> disk -> host -> slot, with leases, single flight, pins and admit-then-evict."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor

from cat_cluster.errors import RegistryError
from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.registry import Manifest, Registry
from cat_cluster.registry.references import parse_reference
from cat_cluster.telemetry import Metrics
from serve.adapters.disk_and_host import MIB, DiskTier, Loader
from serve.adapters.futures import failed, finished, then
from serve.adapters.resolver import ReferenceResolver, Resolved
from serve.adapters.slots import Lease
from serve.adapters.tiers import Tiers
from serve.settings import ServeSettings

__all__ = ["AdapterCache", "Lease", "Resolved"]

_log = logging.getLogger(__name__)


class AdapterCache:
    """The adapters of one engine; every method may be called from any thread, and none waits for store or slots.

    pool: [slots, F] on the engine's device, one row per slot, written here alone. pack: weights -> CPU vector [F],
    AdapterMismatchError if they do not fit. Futures are settled on threads of the cache: callbacks must be short.
    starting: the futures of the pins of the settings.
    """

    def __init__(
        self,
        registry: Registry,
        settings: ServeSettings,
        pool: Tensor,
        pack: Callable[[AdapterWeights], Tensor],
        *,
        base_fingerprint: str,
        unet: UNet2DConditionModel,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        disk = None if settings.disk_cache is None else DiskTier(settings.disk_cache, settings.disk_mib * MIB)
        loader = Loader(
            registry, disk, pack, pool, max_rank=settings.max_rank, base_fingerprint=base_fingerprint, unet=unet
        )
        self._lookups = ReferenceResolver(registry, settings, clock)
        self._tiers = Tiers(loader, pool, settings, metrics, clock)
        self.starting = tuple(self._pin_at_start(reference) for reference in settings.pins)

    def resolve(self, reference: str) -> Future[Resolved]:
        """Return a future of the revision that serves `id`, `id@alias` or `id@r-...` now.

        It fails with RegistryError (malformed, damaged), AdapterNotFoundError, QuarantinedError, or StoreError.
        """
        return self._lookups.resolve(reference)

    def lease(self, manifest: Manifest) -> Future[Lease]:
        """Return a future of a lease on a slot that holds the revision; cancelling it leaves no trace.

        It fails with OverloadedError after `load_timeout_s`, AdapterMismatchError or AdapterFormatError for an adapter
        that cannot be served, StoreError when it cannot be fetched, EngineStoppedError.
        """
        return self._tiers.lease(manifest)

    def load(self, reference: str) -> Future[dict[str, Any]]:
        """Bring an adapter into a slot; the result says where it is then, as those of the methods below do."""
        return self._with_lease(reference, self._tiers.let_go)

    def prefetch(self, reference: str) -> Future[dict[str, Any]]:
        """Bring an adapter into host memory, from where a slot is one copy away."""
        return then(self.resolve(reference), lambda found: self._tiers.prefetch(found.manifest))

    def pin(self, reference: str) -> Future[dict[str, Any]]:
        """Bring the revision that a reference names now into a slot and never evict it.

        ConflictError when that would leave no slot unpinned.
        """
        return self._with_lease(reference, self._tiers.pin)

    def unpin(self, reference: str) -> Future[dict[str, Any]]:
        """Let a pinned revision be evicted again; `id@r-...` is not looked up in the store."""
        return then(self._revision(reference), lambda place: finished(self._tiers.unpin(*place)))

    def unload(self, reference: str) -> Future[dict[str, Any]]:
        """Drop a revision from slot and host memory; ConflictError while it is pinned, leased or being loaded."""
        return then(self._revision(reference), lambda place: finished(self._tiers.unload(*place)))

    def resident(self) -> list[Manifest]:
        """Return the revisions in slots."""
        return self._tiers.resident()

    def status(self) -> dict[str, Any]:
        """Return slots, host memory, loads, queue and the numbers of known references as JSON."""
        return {**self._tiers.status(), "references": self._lookups.counts()}

    def close(self) -> None:
        """Fail whatever waits with EngineStoppedError and stop the threads; the pool and its leases stay."""
        self._lookups.close()
        self._tiers.close()

    def _with_lease(self, reference: str, act: Callable[[Lease], dict[str, Any]]) -> Future[dict[str, Any]]:
        def leased(found: Resolved) -> Future[dict[str, Any]]:
            return then(self.lease(found.manifest), lambda lease: finished(act(lease)))

        return then(self.resolve(reference), leased)

    def _revision(self, reference: str) -> Future[tuple[str, str]]:
        """What is here can be named by its revision even when the store cannot be reached or has it no more."""
        try:
            parsed = parse_reference(reference)
        except RegistryError as error:
            return failed(error)
        if parsed.revision is not None:
            return finished((parsed.adapter_id, parsed.revision))
        return then(
            self.resolve(reference), lambda found: finished((found.manifest.adapter_id, found.manifest.revision))
        )

    def _pin_at_start(self, reference: str) -> Future[dict[str, Any]]:
        def report(pinned: Future[dict[str, Any]]) -> None:
            if not pinned.cancelled() and (error := pinned.exception()) is not None:
                _log.warning("%s is not pinned: %s", reference, error)

        future = self.pin(reference)
        future.add_done_callback(report)
        return future
