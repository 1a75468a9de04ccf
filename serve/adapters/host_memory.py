"""Adapters in host memory: each loaded once for all callers, and kept while there is room."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from cat_cluster.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    CatClusterError,
    ObjectNotFoundError,
    RegistryError,
)
from cat_cluster.registry import Manifest
from cat_cluster.telemetry import ADAPTER_EVICTIONS, ADAPTER_FAILURES, ADAPTER_LOADS, HOST_BYTES, Metrics
from serve.adapters.failures import Failures
from serve.adapters.loader import MIB, Key, Loaded, Loader, Tier, key_of
from serve.adapters.shared_tasks import SharedTask, SharedTasks
from serve.settings import ServeSettings

_LOADERS = 4
_LASTING = (AdapterFormatError, AdapterMismatchError, RegistryError, ObjectNotFoundError)  # asking again does not help

_log = logging.getLogger(__name__)


class Vectors:
    """Packed adapters, at most `budget` bytes, the least recently used go first."""

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
        """Keep a vector, unless it is larger than the whole budget; return how many others were evicted for it."""
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


class HostMemory:
    """The vectors of adapters, loaded by a few threads; every method runs on one event loop."""

    def __init__(self, loader: Loader, settings: ServeSettings, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._loader, self._settings, self._metrics = loader, settings, metrics
        self._vectors = Vectors(settings.host_mib * MIB)
        self._loads = SharedTasks[Key, tuple[Tensor, Tier]]()
        self._failures = Failures[Key](clock)
        self._threads = ThreadPoolExecutor(_LOADERS, "adapter-load")
        self._turns = asyncio.Semaphore(_LOADERS)

    def check(self, manifest: Manifest) -> None:
        """Raise AdapterMismatchError for an adapter too large for a slot, or the error its last load ended with."""
        self._loader.check(manifest)
        self._failures.check(key_of(manifest))

    async def get(self, manifest: Manifest) -> tuple[Tensor, Tier]:
        """Return an adapter's vector [F], and the tier it came from; see Loader.load for the errors."""
        key = key_of(manifest)
        vector = self._vectors.get(key)
        if vector is not None:
            return vector, "host"
        return await self._loads.wait(key, lambda shared: self._load(shared, manifest))

    def drop(self, adapter_id: str, revision: str) -> None:
        """Forget a revision, if it is there."""
        for key in self._vectors.held():
            if key[:2] == (adapter_id, revision):
                self._vectors.drop(key)
        self._metrics.set(HOST_BYTES, self._vectors.bytes)

    def held(self) -> list[Key]:
        """Return what is kept, the least recently used first."""
        return self._vectors.held()

    def loading(self) -> list[Key]:
        """Return what is being loaded while callers wait for it."""
        return self._loads.wanted()

    @property
    def bytes(self) -> int:
        """Bytes of what is kept."""
        return self._vectors.bytes

    def close(self) -> None:
        """Cancel the loads, whose callers get EngineStoppedError, and stop the threads."""
        self._loads.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _load(self, shared: SharedTask[tuple[Tensor, Tier]], manifest: Manifest) -> tuple[Tensor, Tier]:
        await self._turns.acquire()
        try:
            loaded = await shared.in_thread(self._threads, self._fetch, manifest)
        except BaseException as error:
            self._turns.release()
            if isinstance(error, Exception):
                self._count_failure(manifest, error)
            raise
        # Callers do not wait for the disk, but the next load does: few files wait in memory to be written.
        loop = asyncio.get_running_loop()
        loop.run_in_executor(self._threads, self._loader.keep, manifest, loaded).add_done_callback(self._written)
        if shared.waiting:  # nothing is evicted for an adapter that no caller waits for any more
            evicted = self._vectors.put(key_of(manifest), loaded.vector)
            self._metrics.inc(ADAPTER_EVICTIONS, evicted, tier="host")
            self._metrics.set(HOST_BYTES, self._vectors.bytes)
        return loaded.vector, loaded.tier

    def _fetch(self, manifest: Manifest) -> Loaded:
        started = time.perf_counter()
        loaded = self._loader.load(manifest)
        self._metrics.observe(ADAPTER_LOADS, time.perf_counter() - started)
        return loaded

    def _written(self, evicted: asyncio.Future[int]) -> None:
        self._turns.release()
        if not evicted.cancelled():
            self._metrics.inc(ADAPTER_EVICTIONS, evicted.result(), tier="disk")

    def _count_failure(self, manifest: Manifest, error: Exception) -> None:
        self._metrics.inc(ADAPTER_FAILURES)
        unexpected = None if isinstance(error, CatClusterError) else error
        _log.warning("%s could not be loaded: %s", manifest.name, error, exc_info=unexpected)
        if isinstance(error, _LASTING):
            self._failures.add(key_of(manifest), error, self._settings.missing_ttl_s)
