"""Host memory and slots: who waits for which adapter, who uses it, and what goes when there is no room.

Callers only change tables under one lock; a few workers fetch, verify and pack; one keeper thread alone writes to the
pool. Nobody waits for a slot but in a queue of futures, and nothing is evicted for an adapter that is not ready.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from cat_cluster.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    CatClusterError,
    ConflictError,
    EngineStoppedError,
    ObjectNotFoundError,
    OverloadedError,
    RegistryError,
)
from cat_cluster.registry import Manifest
from cat_cluster.telemetry import (
    ADAPTER_EVICTIONS,
    ADAPTER_FAILURES,
    ADAPTER_LOADS,
    ADAPTER_REQUESTS,
    ADAPTER_SWAPS,
    ADAPTERS_PINNED,
    HOST_BYTES,
    SLOTS_LEASED,
    SLOTS_USED,
    Metrics,
)
from serve.adapters.disk_and_host import MIB, HostTier, Key, Loaded, Loader, Tier, key_of
from serve.adapters.flights import Flight, Waiter, Wants
from serve.adapters.futures import bare, claim, fail, failed, finished, then
from serve.adapters.slots import Lease, Slot, Slots
from serve.settings import ServeSettings

_LOADERS = 4
_MOST_FAILURES = 1024
_LASTING = (AdapterFormatError, AdapterMismatchError, RegistryError, ObjectNotFoundError)  # asking again does not help

_log = logging.getLogger(__name__)


class Tiers:
    """Adapters in host memory and in the slots of a pool [slots, F]; every method may be called from any thread."""

    def __init__(
        self, loader: Loader, pool: Tensor, settings: ServeSettings, metrics: Metrics, clock: Callable[[], float]
    ) -> None:
        self._loader = loader
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._host = HostTier(settings.host_mib * MIB)
        self._slots = Slots(pool)
        self._flights: dict[Key, Flight] = {}
        self._queue: deque[Flight] = deque()  # ready, waiting for a slot
        self._deadlines: deque[tuple[Flight, Waiter]] = deque()  # all may wait equally long: the first is due first
        self._failures: OrderedDict[Key, tuple[Exception, float]] = OrderedDict()  # and until when they are remembered
        self._closed = False
        self._changed = threading.Condition()
        self._workers = ThreadPoolExecutor(_LOADERS, "adapter-load")
        self._keeper = threading.Thread(target=self._keep, name="adapter-slots", daemon=True)
        self._keeper.start()

    def lease(self, manifest: Manifest) -> Future[Lease]:
        """Return a future of a lease; see AdapterCache.lease."""
        return self._ask(manifest, "slot")

    def prefetch(self, manifest: Manifest) -> Future[dict[str, Any]]:
        """Bring an adapter into host memory; the result says where it is."""
        return then(self._ask(manifest, "host"), lambda _: finished(self.place(manifest.adapter_id, manifest.revision)))

    def let_go(self, lease: Lease) -> dict[str, Any]:
        """Release a lease and say where the adapter is."""
        lease.release()
        return self.place(lease.manifest.adapter_id, lease.manifest.revision)

    def pin(self, lease: Lease) -> dict[str, Any]:
        """Turn a lease into a pin; ConflictError when no slot would be left for others."""
        with self._changed:
            full = not lease.slot.pinned and self._slots.pinned + 1 >= len(self._slots)
            if not full:
                self._slots.pin(lease.slot, True)
            self._record()
        placed = self.let_go(lease)
        if full:
            raise ConflictError(
                f"{lease.manifest.name} cannot be pinned: one of {len(self._slots)} slots must stay free for other "
                "adapters; unpin one, or raise slots"
            )
        return placed

    def unpin(self, adapter_id: str, revision: str) -> dict[str, Any]:
        """Let a pinned revision be evicted again; ConflictError if it is not pinned."""
        with self._changed:
            pinned = [slot for slot in self._slots.of(adapter_id, revision) if slot.pinned]
            if not pinned:
                names = ", ".join(s.manifest.name for s in self._slots.held() if s.pinned and s.manifest) or "none"
                raise ConflictError(f"{adapter_id}@{revision} is not pinned: pinned are {names}")
            for slot in pinned:
                self._slots.pin(slot, False)
            self._record()
            self._changed.notify()
        return self.place(adapter_id, revision)

    def unload(self, adapter_id: str, revision: str) -> dict[str, Any]:
        """Drop a revision from slot and host memory; ConflictError while it is pinned, leased or being loaded."""
        name = f"{adapter_id}@{revision}"
        with self._changed:
            slots = self._slots.of(adapter_id, revision)
            if any(slot.pinned for slot in slots):
                raise ConflictError(f"{name} is pinned: unpin it first")
            if any(slot.leases for slot in slots):
                raise ConflictError(f"{name} is in use: unload it when its images are done")
            if any(key[:2] == (adapter_id, revision) and flight.wanted for key, flight in self._flights.items()):
                raise ConflictError(f"{name} is being loaded: unload it when that is done")
            for slot in slots:
                self._slots.empty(slot)
            for key in self._host.held():
                if key[:2] == (adapter_id, revision):
                    self._host.drop(key)
            self._record()
            self._changed.notify()
        return self.place(adapter_id, revision)

    def place(self, adapter_id: str, revision: str) -> dict[str, Any]:
        """Say where a revision is: `tier` slot, host or None, and whether it is pinned."""
        with self._changed:
            slots = self._slots.of(adapter_id, revision)
            in_host = any(key[:2] == (adapter_id, revision) for key in self._host.held())
            tier = "slot" if slots else "host" if in_host else None
            pinned = any(slot.pinned for slot in slots)
        return {"model": f"{adapter_id}@{revision}", "tier": tier, "pinned": pinned}

    def resident(self) -> list[Manifest]:
        """Return the revisions in slots, in the order of the slots."""
        with self._changed:
            held = sorted(self._slots.held(), key=lambda slot: slot.index)
            return [slot.manifest for slot in held if slot.manifest is not None]

    def status(self) -> dict[str, Any]:
        """Return slots, host memory, loads and queue as JSON."""
        with self._changed:
            held = sorted(self._slots.held(), key=lambda slot: slot.index)
            flights = [flight for flight in self._flights.values() if flight.wanted]
            return {
                "slots": len(self._slots),
                "held": [
                    {"slot": slot.index, "model": slot.manifest.name, "leases": slot.leases, "pinned": slot.pinned}
                    for slot in held
                    if slot.manifest is not None
                ],
                "host": [f"{adapter_id}@{revision}" for adapter_id, revision, _ in self._host.held()],
                "host_bytes": self._host.bytes,
                "loading": [flight.manifest.name for flight in flights if flight.vector is None],
                "waiting": [flight.manifest.name for flight in flights if flight.vector is not None],
            }

    def close(self) -> None:
        """Fail whatever waits with EngineStoppedError and stop the threads; the pool and its leases stay."""
        with self._changed:
            self._closed = True
            waiting = [future for flight in self._flights.values() for future in flight.claim("slot", "host")]
            for table in (self._flights, self._queue, self._deadlines):
                table.clear()
            self._changed.notify()
        self._workers.shutdown(wait=False, cancel_futures=True)
        for future in waiting:
            fail(future, _stopping())
        if threading.current_thread() is not self._keeper:
            self._keeper.join()

    # --- callers' threads

    def _ask(self, manifest: Manifest, wants: Wants) -> Future[Any]:
        key = key_of(manifest)
        try:
            self._loader.check(manifest)
        except AdapterMismatchError as error:
            return failed(error)
        with self._changed:
            refusal = self._refusal(key)
            if refusal is not None:
                return failed(refusal)
            slot, vector, flight = self._slots.find(key), self._host.get(key), self._flights.get(key)
            if slot is not None:
                return finished(self._granted(slot, "slot") if wants == "slot" else None)
            if wants == "host" and (vector is not None or (flight is not None and flight.vector is not None)):
                return finished(None)
            if flight is None:
                flight = self._start(key, manifest, vector)
            waiter = Waiter(Future(), wants, self._clock() + self._settings.load_timeout_s)
            flight.waiters.append(waiter)
            self._deadlines.append((flight, waiter))
            self._changed.notify()
        waiter.future.add_done_callback(lambda future: self._leave(flight, waiter) if future.cancelled() else None)
        return waiter.future

    def _refusal(self, key: Key) -> Exception | None:
        if self._closed:
            return _stopping()
        error, until = self._failures.get(key, (None, 0.0))
        return error if self._clock() < until else None

    def _start(self, key: Key, manifest: Manifest, vector: Tensor | None) -> Flight:
        flight = self._flights[key] = Flight(key, manifest, vector=vector)
        if vector is None:
            flight.job = self._workers.submit(self._load, flight)
        else:
            self._queue.append(flight)
        return flight

    def _leave(self, flight: Flight, waiter: Waiter) -> None:
        with self._changed:
            self._forget(flight, waiter)

    def _forget(self, flight: Flight, waiter: Waiter) -> None:
        """Forget a waiter, and a flight that nobody waits for; a load or copy under way comes to its end by itself."""
        if waiter in flight.waiters:
            flight.waiters.remove(waiter)
        if flight.waiters or self._flights.get(flight.key) is not flight:
            return
        if flight in self._queue:
            self._queue.remove(flight)
        elif flight.job is None or not flight.job.cancel():
            return
        self._end(flight)

    def _end(self, flight: Flight) -> None:
        """Take a flight off the tables; its vector goes with it, though a deadline may still name the flight."""
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]
        flight.vector = None

    def _granted(self, slot: Slot, tier: Tier) -> Lease:
        assert slot.manifest is not None
        self._slots.lease(slot)
        self._metrics.inc(ADAPTER_REQUESTS, tier=tier)
        self._metrics.set(SLOTS_LEASED, self._slots.leased)
        return Lease(slot.manifest, self._slots.row(slot), slot, self._release)

    def _release(self, lease: Lease) -> None:
        with self._changed:
            if lease.released:
                return
            lease.released = True
            self._slots.give_back(lease.slot)
            self._metrics.set(SLOTS_LEASED, self._slots.leased)
            self._changed.notify()

    def _record(self) -> None:
        self._metrics.set(SLOTS_USED, len(self._slots.held()))
        self._metrics.set(ADAPTERS_PINNED, self._slots.pinned)
        self._metrics.set(HOST_BYTES, self._host.bytes)

    # --- workers

    def _load(self, flight: Flight) -> None:
        started = time.perf_counter()
        try:
            loaded = self._loader.load(flight.manifest)
        except Exception as error:
            self._not_loaded(flight, error)
            return
        self._metrics.observe(ADAPTER_LOADS, time.perf_counter() - started)
        self._loaded(flight, loaded)
        evicted = self._loader.keep(flight.manifest, loaded)
        self._metrics.inc(ADAPTER_EVICTIONS, evicted, tier="disk")

    def _loaded(self, flight: Flight, loaded: Loaded) -> None:
        with self._changed:
            if self._flights.get(flight.key) is not flight:
                return  # closed meanwhile
            ready: list[Future[Any]] = []
            if flight.wanted:  # nothing is evicted for what nobody waits for any more
                evicted = self._host.put(flight.key, loaded.vector)
                self._metrics.inc(ADAPTER_EVICTIONS, evicted, tier="host")
                self._record()
                flight.vector, flight.tier = loaded.vector, loaded.tier
                ready = flight.claim("host")
            if flight.wanted:
                self._queue.append(flight)
                self._changed.notify()
            else:
                self._end(flight)
        for future in ready:
            future.set_result(None)

    def _not_loaded(self, flight: Flight, error: Exception) -> None:
        self._metrics.inc(ADAPTER_FAILURES)
        unexpected = None if isinstance(error, CatClusterError) else error
        _log.warning("%s could not be loaded: %s", flight.manifest.name, error, exc_info=unexpected)
        with self._changed:
            if self._flights.get(flight.key) is not flight:
                return  # closed meanwhile
            self._end(flight)
            if isinstance(error, _LASTING):
                self._failures[flight.key] = bare(error), self._clock() + self._settings.missing_ttl_s
                self._failures.move_to_end(flight.key)
                if len(self._failures) > _MOST_FAILURES:
                    self._failures.popitem(last=False)
            waiting = flight.claim("slot", "host")
        for future in waiting:
            fail(future, error)

    # --- the keeper

    def _keep(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                overdue, swap = self._overdue(), self._next_swap()
                if not overdue and swap is None:
                    self._changed.wait(self._until_due())
                    continue
            for future, error in overdue:
                fail(future, error)
            if swap is not None:
                self._swap(*swap)

    def _overdue(self) -> list[tuple[Future[Any], OverloadedError]]:
        """Take out the waiters whose time is up, and forget those that have what they waited for."""
        overdue = []
        now = self._clock()
        while self._deadlines and (self._deadlines[0][1].future.done() or self._deadlines[0][1].deadline <= now):
            flight, waiter = self._deadlines.popleft()
            if waiter in flight.waiters and claim(waiter.future):
                overdue.append((waiter.future, self._too_late(flight)))
            self._forget(flight, waiter)
        return overdue

    def _too_late(self, flight: Flight) -> OverloadedError:
        reason = "the store is slow" if flight.vector is None else f"all {len(self._slots)} slots are in use"
        waited = f"{flight.manifest.name} was not ready within {self._settings.load_timeout_s:g} s"
        return OverloadedError(f"{waited}: {reason}; ask again")

    def _until_due(self) -> float | None:
        return max(0.0, self._deadlines[0][1].deadline - self._clock()) if self._deadlines else None

    def _next_swap(self) -> tuple[Flight, Slot] | None:
        """Match the first adapter that waits with a slot; None when nothing waits or every slot is leased or pinned."""
        while self._queue and not self._queue[0].wanted:
            self._end(self._queue.popleft())
        taken = self._slots.take() if self._queue else None
        if taken is None:
            return None
        slot, evicts = taken
        self._metrics.inc(ADAPTER_EVICTIONS, float(evicts), tier="slot")
        return self._queue.popleft(), slot

    def _swap(self, flight: Flight, slot: Slot) -> None:
        assert flight.vector is not None
        started = time.perf_counter()
        problem: Exception | None = None
        try:
            self._slots.write(slot, flight.vector)
            self._metrics.observe(ADAPTER_SWAPS, time.perf_counter() - started)
        except Exception as error:  # a device that fails; it is for the engine to stop
            problem = error
        with self._changed:
            self._end(flight)
            waiting = flight.claim("slot", "host")
            if problem is None:
                self._slots.fill(slot, flight.manifest)
                leases = [self._granted(slot, flight.tier) for _ in waiting]
            else:
                self._slots.empty(slot)
            self._record()
        if problem is not None:
            for future in waiting:
                fail(future, problem)
            return
        for future, lease in zip(waiting, leases, strict=True):
            future.set_result(lease)


def _stopping() -> EngineStoppedError:
    return EngineStoppedError("the engine is stopping: ask another replica")
