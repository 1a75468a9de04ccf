"""The adapter cache: store -> disk -> host -> slot, with leases, single flight, pins and admit-then-evict.

Everything but reading, packing and copying, which threads do, happens on one event loop, so nothing needs a lock.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from torch import Tensor, nn

from cat_cluster.errors import AdapterMismatchError, ConflictError, OverloadedError
from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.registry import Manifest, Reference, Registry
from cat_cluster.registry.references import parse_reference
from cat_cluster.registry.stacks import stack_name
from cat_cluster.telemetry import (
    ADAPTER_EVICTIONS,
    ADAPTER_REQUESTS,
    ADAPTER_SWAPS,
    ADAPTERS_PINNED,
    SLOTS_LEASED,
    SLOTS_USED,
    Metrics,
)
from serve.adapters.disk_cache import DiskCache
from serve.adapters.host_memory import HostMemory
from serve.adapters.loader import MIB, Key, Loader, Tier, key_of, name_of
from serve.adapters.resolver import ReferenceResolver, Resolved
from serve.adapters.shared_tasks import SharedTask, SharedTasks, stopping
from serve.adapters.slots import Lease, Slot, Slots
from serve.settings import ServeSettings

__all__ = ["AdapterCache", "Lease", "Resolved"]

T = TypeVar("T")

_log = logging.getLogger(__name__)


class AdapterCache:
    """The adapters of one engine. Every method runs on one event loop, and none blocks it; leases end on any thread.

    pool: [slots, F] on the engine's device, one row per slot, written here alone. pack: weights -> CPU vector [F], or
    [F + T] with text encoders' layers, of at most text_size; AdapterMismatchError if they do not fit. network: the
    base's. pinning: after `start`, the tasks that pin what the settings name.
    """

    def __init__(
        self,
        registry: Registry,
        settings: ServeSettings,
        pool: Tensor,
        pack: Callable[[AdapterWeights], Tensor],
        *,
        base_fingerprints: Sequence[str],
        network: nn.Module,
        text_size: int = 0,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        disk = None if settings.disk_cache is None else DiskCache(settings.disk_cache, settings.disk_mib * MIB)
        loader = Loader(
            registry,
            disk,
            pack,
            pool,
            max_rank=settings.max_rank,
            base_fingerprints=base_fingerprints,
            network=network,
            text_size=text_size,
        )
        self._settings, self._metrics = settings, metrics
        self._resolver = ReferenceResolver(registry, settings, clock)
        self._host = HostMemory(loader, settings, metrics, clock)
        self._slots = Slots(pool)
        self._copies = SharedTasks[Key, tuple[Slot, Tier]]()  # adapters on their way into a slot
        self._ready = set[Key]()  # those of them that only wait for a slot, or for the copy
        self._copying = asyncio.Lock()  # its queue is that for slots: first ready, first served, one copy at a time
        self._stacking = asyncio.Lock()  # of the caller that holds slots while it waits for more
        self._changed = asyncio.Event()  # a slot may have become free
        self._thread = ThreadPoolExecutor(1, "adapter-copy")
        self._closed = False
        self.pinning: tuple[asyncio.Task[dict[str, Any]], ...] = ()

    def start(self) -> None:
        """Begin to pin what the settings name; what cannot be pinned is logged."""
        self.pinning = tuple(asyncio.create_task(self.pin(reference)) for reference in self._settings.pins)
        for reference, task in zip(self._settings.pins, self.pinning, strict=True):
            task.add_done_callback(lambda done, name=reference: _log_unpinned(done, name))  # type: ignore[misc]

    async def resolve(self, reference: Reference | str) -> Resolved:
        """Return the revision that serves `id`, `id@alias` or `id@r-...` now.

        Raises RegistryError (malformed, damaged), AdapterNotFoundError, QuarantinedError, or StoreError.
        """
        return await self._resolver.resolve(reference)

    def check(self, manifests: Sequence[Manifest]) -> None:
        """Raise ConflictError or AdapterMismatchError for a stack that can have no slots or no rows as things are."""
        if len(manifests) < 2:
            return
        rank = sum(one.rank for one in manifests)
        if rank > self._settings.max_rank:
            ranks = ", ".join(f"{one.adapter_id} {one.rank}" for one in manifests)
            raise AdapterMismatchError(
                f"the stack has rank {rank} in all and this service takes up to {self._settings.max_rank}: name fewer "
                f"adapters, or raise max_rank; the ranks are {ranks}"
            )
        pinned = {key_of(manifest) for slot, manifest in self._slots.held() if slot.pinned}
        needed, free = sum(key_of(one) not in pinned for one in manifests), len(self._slots) - self._slots.pinned
        if needed > free:
            raise ConflictError(
                f"the stack needs {needed} slots at once, and {free} of {len(self._slots)} are not pinned: name fewer "
                "adapters, unpin some, or raise slots"
            )

    async def lease(self, manifests: Sequence[Manifest]) -> tuple[Lease, ...]:
        """Return a lease on a slot for each revision: all, or none; a caller that is cancelled leaves no trace.

        Raises what `check` does, OverloadedError after `load_timeout_s`, AdapterMismatchError or AdapterFormatError for
        an adapter that cannot be served, StoreError when one cannot be fetched, EngineStoppedError.
        """
        self.check(manifests)
        slots = [self._slots.find(self._check(manifest)) for manifest in manifests]
        here = [slot for slot in slots if slot is not None]
        if len(here) == len(slots):
            return tuple(self._granted(slot, "slot") for slot in here)
        if len(manifests) == 1:
            return (await self._within_limit(manifests, self._lease_one(manifests[0])),)
        return await self._within_limit(manifests, self._lease_several(manifests))

    async def load(self, reference: str) -> dict[str, Any]:
        """Bring an adapter into a slot, and say where it is then, as the methods below do."""
        with await self._lease_of(reference) as lease:
            return self._place(lease.manifest.adapter_id, lease.manifest.revision)

    async def prefetch(self, reference: str) -> dict[str, Any]:
        """Bring an adapter into host memory, from where a slot is one copy away."""
        manifest = (await self.resolve(reference)).manifest
        key = self._check(manifest)
        if self._slots.find(key) is None:
            await self._within_limit([manifest], self._host.get(manifest))
        return self._place(manifest.adapter_id, manifest.revision)

    async def pin(self, reference: str) -> dict[str, Any]:
        """Bring the revision that a reference names now into a slot and never evict it.

        ConflictError when that would leave no slot unpinned.
        """
        with await self._lease_of(reference) as lease:
            if not lease.slot.pinned and self._slots.pinned + 1 >= len(self._slots):
                raise ConflictError(
                    f"{lease.manifest.name} cannot be pinned: one of {len(self._slots)} slots must stay free for other "
                    "adapters; unpin one, or raise slots"
                )
            self._slots.pin(lease.slot, True)
            self._record()
            return self._place(lease.manifest.adapter_id, lease.manifest.revision)

    async def unpin(self, reference: str) -> dict[str, Any]:
        """Let a pinned revision be evicted again; `id@r-...` is not looked up in the store."""
        adapter_id, revision = await self._revision(reference)
        pinned = [slot for slot in self._slots.of(adapter_id, revision) if slot.pinned]
        if not pinned:
            names = ", ".join(manifest.name for slot, manifest in self._slots.held() if slot.pinned) or "none"
            raise ConflictError(f"{adapter_id}@{revision} is not pinned: pinned are {names}")
        for slot in pinned:
            self._slots.pin(slot, False)
        self._record()
        return self._place(adapter_id, revision)

    async def unload(self, reference: str) -> dict[str, Any]:
        """Drop a revision from slot and host memory; ConflictError while it is pinned, leased or being loaded."""
        adapter_id, revision = await self._revision(reference)
        name = f"{adapter_id}@{revision}"
        slots = self._slots.of(adapter_id, revision)
        if any(slot.pinned for slot in slots):
            raise ConflictError(f"{name} is pinned: unpin it first")
        if any(slot.leases for slot in slots):
            raise ConflictError(f"{name} is in use: unload it when its images are done")
        if name in map(name_of, (*self._host.loading(), *self._copies.wanted())):
            raise ConflictError(f"{name} is being loaded: unload it when that is done")
        for slot in slots:
            self._slots.empty(slot)
        self._host.drop(adapter_id, revision)
        self._record()
        return self._place(adapter_id, revision)

    def resident(self) -> list[Manifest]:
        """Return the revisions in slots, in the order of the slots."""
        return [manifest for _, manifest in self._slots.held()]

    def status(self) -> dict[str, Any]:
        """Return slots, host memory, loads, queue and the numbers of known references as JSON."""
        wanted = dict.fromkeys((*self._host.loading(), *self._copies.wanted()))
        return {
            "slots": len(self._slots),
            "held": [
                {"slot": slot.index, "model": manifest.name, "leases": slot.leases, "pinned": slot.pinned}
                for slot, manifest in self._slots.held()
            ],
            "host": [name_of(key) for key in self._host.held()],
            "host_bytes": self._host.bytes,
            "loading": [name_of(key) for key in wanted if key not in self._ready],
            "waiting": [name_of(key) for key in wanted if key in self._ready],
            "references": self._resolver.counts(),
        }

    def close(self) -> None:
        """Let all callers that wait get EngineStoppedError, and stop the threads; the pool and its leases stay."""
        self._closed = True
        self._resolver.close()
        self._copies.close()
        self._host.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _check(self, manifest: Manifest) -> Key:
        if self._closed:
            raise stopping()
        self._host.check(manifest)
        return key_of(manifest)

    async def _within_limit(self, manifests: Sequence[Manifest], coming: Coroutine[Any, Any, T]) -> T:
        try:
            async with asyncio.timeout(self._settings.load_timeout_s):
                return await coming
        except TimeoutError:
            have = {*self._ready, *self._host.held(), *(key_of(manifest) for _, manifest in self._slots.held())}
            here = all(key_of(manifest) in have for manifest in manifests)
            reason = f"all {len(self._slots)} slots are in use" if here else "the store is slow"
            name = stack_name(manifest.name for manifest in manifests)
            waited = f"{name} was not ready within {self._settings.load_timeout_s:g} s"
            raise OverloadedError(f"{waited}: {reason}; try again") from None
        finally:
            self._changed.set()  # a slot that was filled for a caller that has left can be taken

    async def _lease_one(self, manifest: Manifest, tier: Tier | None = None) -> Lease:
        """Lease a slot; tier: where the revision was found, if it has been brought into host memory from there."""
        key = self._check(manifest)
        slot = self._slots.find(key)
        if slot is not None:
            return self._granted(slot, tier or "slot")
        slot, found = await self._copies.wait(key, lambda shared: self._fill_slot(shared, manifest))
        return self._granted(slot, tier or found)

    async def _lease_several(self, manifests: Sequence[Manifest]) -> tuple[Lease, ...]:
        """Lease a slot for each revision, once all of them are one copy away.

        Only one caller at a time holds slots while it waits for more: two would wait for each other's. Callers for one
        adapter hold none, and leases end without waiting for others, so the slots that it waits for become free. It
        asks for all at once, and so waits once for those before it in the queue.
        """
        away = [one for one in manifests if self._slots.find(key_of(one)) is None]
        found = await _all_of([asyncio.create_task(self._host.get(one)) for one in away])
        tiers = {key_of(one): tier for one, (_, tier) in zip(away, found, strict=True)}
        async with self._stacking:
            leases = [asyncio.create_task(self._lease_one(one, tiers.get(key_of(one)))) for one in manifests]
            return tuple(await _all_of(leases, _release))

    async def _fill_slot(self, shared: SharedTask[tuple[Slot, Tier]], manifest: Manifest) -> tuple[Slot, Tier]:
        """Bring an adapter into host memory, then into a slot: nothing is evicted for one that is not ready."""
        vector, tier = await self._host.get(manifest)
        key = key_of(manifest)
        self._ready.add(key)
        try:
            return await self._copy_into_slot(shared, manifest, vector), tier
        finally:
            self._ready.discard(key)

    async def _copy_into_slot(self, shared: SharedTask[Any], manifest: Manifest, vector: Tensor) -> Slot:
        async with self._copying:
            # Callers lease a slot that was filled for them at the loop's next turn: until then it is not taken.
            while (taken := self._slots.take(self._copies.wanted())) is None:
                self._changed.clear()
                await self._changed.wait()
            slot, evicts = taken
            self._metrics.inc(ADAPTER_EVICTIONS, float(evicts), tier="slot")
            try:
                await shared.in_thread(self._thread, self._write, slot, vector)
                self._slots.fill(slot, manifest)
            except BaseException:  # of a device that fails: the engine will stop by itself
                self._slots.empty(slot)
                raise
            finally:
                self._record()
        return slot

    def _write(self, slot: Slot, vector: Tensor) -> None:
        started = time.perf_counter()
        self._slots.write(slot, vector)
        self._metrics.observe(ADAPTER_SWAPS, time.perf_counter() - started)

    async def _lease_of(self, reference: str) -> Lease:
        (lease,) = await self.lease([(await self.resolve(reference)).manifest])
        return lease

    async def _revision(self, reference: str) -> tuple[str, str]:
        """Return adapter id and revision; one that the reference names is not looked up, for the store may be away."""
        parsed = parse_reference(reference)
        if parsed.revision is not None:
            return parsed.adapter_id, parsed.revision
        manifest = (await self.resolve(reference)).manifest
        return manifest.adapter_id, manifest.revision

    def _place(self, adapter_id: str, revision: str) -> dict[str, Any]:
        """Say where a revision is: `tier` slot, host or None, and whether it is pinned."""
        slots = self._slots.of(adapter_id, revision)
        in_host = any(key[:2] == (adapter_id, revision) for key in self._host.held())
        return {
            "model": f"{adapter_id}@{revision}",
            "tier": "slot" if slots else "host" if in_host else None,
            "pinned": any(slot.pinned for slot in slots),
        }

    def _granted(self, slot: Slot, tier: Tier) -> Lease:
        lease = self._slots.lease(slot, self._give_back)
        lease.tier = tier
        self._metrics.inc(ADAPTER_REQUESTS, tier=tier)
        self._metrics.set(SLOTS_LEASED, self._slots.leased)
        return lease

    def _give_back(self, lease: Lease) -> None:
        self._slots.give_back(lease)
        self._metrics.set(SLOTS_LEASED, self._slots.leased)
        self._changed.set()

    def _record(self) -> None:
        """Update the metrics of slots, and let the copy that waits for one look again."""
        self._metrics.set(SLOTS_USED, len(self._slots.held()))
        self._metrics.set(ADAPTERS_PINNED, self._slots.pinned)
        self._changed.set()


async def _all_of(tasks: Sequence[asyncio.Task[T]], undo: Callable[[T], None] = lambda _: None) -> list[T]:
    """Return the results of all tasks; with an error, or when cancelled, all end and what they did is undone."""
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
            task.add_done_callback(lambda done: _undo(done, undo))
        raise


def _undo(done: asyncio.Task[T], undo: Callable[[T], None]) -> None:
    if not done.cancelled() and done.exception() is None:
        undo(done.result())


def _release(lease: Lease) -> None:
    lease.release()


def _log_unpinned(pinned: asyncio.Task[dict[str, Any]], reference: str) -> None:
    if not pinned.cancelled() and (error := pinned.exception()) is not None:
        _log.warning("%s is not pinned: %s", reference, error)
