"""A real registry in a folder, whose store can be watched, slowed and cut off, and a cache on it.

The cache runs on an event loop of its own in a thread, as in a service, and tests ask it from any thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from cat_cluster.errors import StoreError
from cat_cluster.lora.formats import AdapterWeights, LoraLayer
from cat_cluster.lora.row_bank import AdapterLayout
from cat_cluster.registry import AdapterDraft, Manifest, Registry
from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.spec.job import ResolvedAdapter
from cat_cluster.spec.sections import EvaluationSpec, TrainingSpec
from cat_cluster.store import LocalStore
from cat_cluster.store.protocol import Entry
from cat_cluster.telemetry import SERVING_METRICS, Metrics, PrometheusBackend
from serve.adapters.cache import AdapterCache, Lease, Resolved
from serve.settings import ServeSettings

BASE = "b" * 64
RANK = 2
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0")
ROW = 87040  # floats of a slot: three are all that 1 MiB of host memory holds
SOON = 20.0  # seconds that nothing here takes unless it hangs

T = TypeVar("T")


class WatchedStore(LocalStore):
    """A folder that counts what it is asked, may be cut off, and holds back the keys of `gates` until they open."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked: Counter[str] = Counter()
        self.gates: dict[str, threading.Event] = {}
        self.down = False

    def get(self, key: str) -> bytes:
        self._ask("get", key)
        return super().get(key)

    def exists(self, key: str) -> bool:
        self._ask("exists", key)
        return super().exists(key)

    def entries(self, prefix: str, *, after: str = "") -> Iterator[Entry]:
        self._ask("list", prefix)
        return super().entries(prefix, after=after)

    def _ask(self, operation: str, key: str) -> None:
        self.asked[operation] += 1
        self.asked[key] += 1
        if self.down:
            raise StoreError("the store cannot be reached")
        gate = self.gates.get(key)
        if gate is not None:
            assert gate.wait(SOON), f"{key} was held back for too long"


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def names_of_layers(unet: UNet2DConditionModel) -> list[str]:
    return [name for name, _ in unet.named_modules() if name.endswith(ADAPTED)]


def random_weights(unet: UNet2DConditionModel, *, rank: int = RANK, seed: int = 0) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in names_of_layers(unet):
        linear = unet.get_submodule(name)
        down = torch.randn(rank, linear.in_features, generator=generator)
        layers[name] = LoraLayer(down=down, up=torch.randn(linear.out_features, rank, generator=generator))
    return AdapterWeights(layers)


class Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], T]) -> T:
        """What a function returns on the loop."""

        async def called() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(called(), self.loop).result(SOON)

    def begin(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """A future of a coroutine that runs on the loop; cancelling it cancels the coroutine."""
        future: Future[T] = Future()

        async def run() -> None:
            task = asyncio.current_task()
            assert task is not None
            future.add_done_callback(
                lambda done: self.loop.call_soon_threadsafe(task.cancel) if done.cancelled() else None
            )
            try:
                result = await coroutine
            except Exception as error:
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
            else:
                if future.set_running_or_notify_cancel():
                    future.set_result(result)
                else:  # cancelled between its grant and this
                    for granted in result if isinstance(result, tuple) else [result]:
                        if isinstance(granted, Lease):
                            granted.release()

        asyncio.run_coroutine_threadsafe(run(), self.loop)
        return future

    def close(self) -> None:
        """Stop the loop once nothing is left that runs on it."""

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            if others:
                await asyncio.wait(others, timeout=SOON)

        asyncio.run_coroutine_threadsafe(end(), self.loop).result(2 * SOON)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(SOON)
        self.loop.close()


class CacheOnLoop:
    """A cache as threads ask it: the methods of `cache`, each a future of what it returns."""

    def __init__(self, cache: AdapterCache, loop: Loop) -> None:
        self.cache, self._loop = cache, loop
        self._loop.call(cache.start)

    def lease(self, manifest: Manifest) -> Future[Lease]:
        async def only() -> Lease:
            (granted,) = await self.cache.lease([manifest])
            return granted

        return self._loop.begin(only())

    def lease_all(self, manifests: Sequence[Manifest]) -> Future[tuple[Lease, ...]]:
        return self._loop.begin(self.cache.lease(manifests))

    def resolve(self, reference: str) -> Future[Resolved]:
        return self._loop.begin(self.cache.resolve(reference))

    def load(self, reference: str) -> Future[dict[str, Any]]:
        return self._loop.begin(self.cache.load(reference))

    def prefetch(self, reference: str) -> Future[dict[str, Any]]:
        return self._loop.begin(self.cache.prefetch(reference))

    def pin(self, reference: str) -> Future[dict[str, Any]]:
        return self._loop.begin(self.cache.pin(reference))

    def unpin(self, reference: str) -> Future[dict[str, Any]]:
        return self._loop.begin(self.cache.unpin(reference))

    def unload(self, reference: str) -> Future[dict[str, Any]]:
        return self._loop.begin(self.cache.unload(reference))

    def pinning(self) -> list[Future[dict[str, Any]]]:
        async def wait(task: asyncio.Task[dict[str, Any]]) -> dict[str, Any]:
            return await task

        return [self._loop.begin(wait(task)) for task in self.cache.pinning]

    def status(self) -> dict[str, Any]:
        return self._loop.call(self.cache.status)

    def is_idle(self) -> bool:
        """Whether nothing is on its way, wanted or not."""
        return self._loop.call(lambda: not self.cache._copies._tasks and not self.cache._host._loads._tasks)

    def close(self) -> None:
        self._loop.call(self.cache.close)


@dataclass
class World:
    """A registry, and a cache of a few slots on it."""

    unet: UNet2DConditionModel
    folder: Path
    store: WatchedStore = field(init=False)
    registry: Registry = field(init=False)
    layout: AdapterLayout = field(init=False)
    backend: PrometheusBackend = field(init=False)
    caches: list[CacheOnLoop] = field(default_factory=list)
    loop: Loop = field(default_factory=Loop)

    def __post_init__(self) -> None:
        self.store = WatchedStore(self.folder / "storage")
        self.registry = Registry(self.store)
        self.layout = AdapterLayout(self.unet, names_of_layers(self.unet), RANK)

    def publish(self, adapter_id: str, *, seed: int = 0, rank: int = RANK, **changes: Any) -> Manifest:
        """Publish random weights; each seed makes another revision."""
        resolved = ResolvedAdapter(
            id=adapter_id,
            base="pocket",
            method="cat",
            concepts=(ConceptSpec(token="sks", class_noun="cup", images="photos", alpha=2.0),),
            training=TrainingSpec(rank=rank, seed=seed),
            evaluation=EvaluationSpec(),
        )
        fields: dict[str, Any] = {
            "adapter_id": adapter_id,
            "resolved": resolved,
            "base_name": "pocket",
            "base_fingerprint": BASE,
            "image_digests": ["1" * 64],
            "weights": random_weights(self.unet, rank=rank, seed=seed),
            "training": {},
        }
        return self.registry.publish(AdapterDraft(**{**fields, **changes}))

    def cache(self, *, clock: Callable[[], float] = time.monotonic, **settings: Any) -> CacheOnLoop:
        """A new cache of 3 slots, if not said otherwise, and fresh counts of what the store is asked."""
        chosen = ServeSettings(**{"slots": 3, "max_rank": RANK, "load_timeout_s": SOON, **settings})
        self.backend = PrometheusBackend()
        cache = AdapterCache(
            self.registry,
            chosen,
            torch.zeros(chosen.slots, ROW),
            self.pack,
            base_fingerprints=[BASE],
            network=self.unet,
            metrics=Metrics(self.backend, SERVING_METRICS),
            clock=clock,
        )
        self.store.asked.clear()
        self.caches.append(CacheOnLoop(cache, self.loop))
        return self.caches[-1]

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric of the last cache, after what has been asked of it so far."""
        self.loop.call(lambda: None)
        return self.backend.registry.get_sample_value(name, labels) or 0.0

    def pack(self, weights: AdapterWeights) -> Tensor:
        """The flat vector of the weights, with zeros up to the length of a row."""
        flat = self.layout.pack(weights)
        return torch.nn.functional.pad(flat, (0, ROW - len(flat)))

    def vector(self, manifest: Manifest) -> Tensor:
        """What a slot must hold for a revision."""
        return self.pack(self.registry.load_weights(manifest))

    def close(self) -> None:
        """Open every gate and close every cache."""
        for gate in self.store.gates.values():
            gate.set()
        for cache in self.caches:
            cache.close()
        self.loop.close()


def weights_key(manifest: Manifest) -> str:
    return manifest.objects["weights"].key


def lease(cache: CacheOnLoop, manifest: Manifest) -> Lease:
    return cache.lease(manifest).result(SOON)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.002)


def held(cache: CacheOnLoop) -> set[str]:
    """The revisions in slots."""
    return {slot["model"] for slot in cache.status()["held"]}
