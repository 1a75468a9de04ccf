"""Load for the service: clients that ask at random, leave at random, and check every picture they are given."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx2
import numpy as np
import psutil

from cat_cluster.registry import Manifest, Registry
from tests.support.serving import PATH, Gallery, Served

SECONDS = 90  # no request takes longer
MIB = 2**20


@dataclass
class Tally:
    """How requests ended; `problems`: those that must not be."""

    ends: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    slowest: float = 0.0
    images: int = 0


@dataclass(frozen=True)
class Order:
    """What the clients ask for: prompts and seeds whose pictures the gallery knows."""

    models: Sequence[str]
    prompts: tuple[str, ...]
    seeds: range
    steps: int
    may_be_missing: frozenset[str] = frozenset()
    leave: float = 0.0  # share of clients that go before their answer
    stream: float = 0.25  # share of calls that stream
    may_be_refused: bool = False  # with 503 and Retry-After


class Load:
    """Clients that ask again and again until the end of the block."""

    def __init__(self, service: Served, gallery: Gallery, order: Order, clients: int, seed: int) -> None:
        self._service, self._gallery, self._order = service, gallery, order
        self._clients, self._seed = clients, seed
        self._stop, self._lock = threading.Event(), threading.Lock()
        self.tally = Tally()

    def __enter__(self) -> Load:
        self._pool = ThreadPoolExecutor(self._clients)
        self._running = [self._pool.submit(self._client, n) for n in range(self._clients)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        for one in self._running:
            one.result()

    def _client(self, number: int) -> None:
        rng = random.Random(1000 * self._seed + number)
        with self._service.http(limits=httpx2.Limits(max_connections=1)) as http:
            while not self._stop.is_set():
                began = time.monotonic()
                end, problem, images = self._ask(http, rng)
                with self._lock:
                    self.tally.ends[end] += 1
                    self.tally.images += images
                    self.tally.slowest = max(self.tally.slowest, time.monotonic() - began)
                    if problem is not None:
                        self.tally.problems.append(problem)

    def _ask(self, http: httpx2.Client, rng: random.Random) -> tuple[str, str | None, int]:
        """Ask once; how it ended, what is wrong with that, and how many pictures were checked."""
        order, model = self._order, rng.choice(self._order.models)
        count, streams, leaves = rng.choice((1, 1, 2)), rng.random() < order.stream, rng.random() < order.leave
        body = {
            "model": model,
            "prompt": rng.choice(order.prompts),
            "seed": rng.choice(order.seeds[: len(order.seeds) - count + 1]),
            "n": count,
            "num_inference_steps": order.steps,
            "stream": streams,
        }
        patience = httpx2.Timeout(SECONDS, read=rng.uniform(0.01, 0.4) if leaves else SECONDS)
        try:
            with http.stream("POST", PATH, json=body, timeout=patience) as answer:
                if leaves and streams:
                    return "left", None, 0
                answer.read()
        except httpx2.TimeoutException as error:
            return ("left", None, 0) if leaves else ("no end", f"{body}: {error!r}", 0)
        except httpx2.TransportError as error:
            return "broken", f"{body}: {error!r}", 0
        may_be_missing = model.partition("@")[0] in order.may_be_missing
        if answer.status_code == 404 and may_be_missing:
            return "404", None, 0
        if answer.status_code == 503 and order.may_be_refused and "retry-after" in answer.headers:
            return "503", None, 0
        if answer.status_code != 200:
            return str(answer.status_code), f"{body}: {answer.status_code} {answer.text}", 0
        found = _of_events(answer.text) if streams else answer.json()
        if "error" in found and found["error"]["code"] == "model_not_found" and may_be_missing:
            return "404", None, 0  # deleted after the stream had begun
        if "error" in found:
            return "broken stream", f"{body}: {found['error']}", 0
        if len(found["data"]) != count:
            return "short", f"{body}: {len(found['data'])} images", 0
        if "@r-" in model and found["model"] != model:
            return "other revision", f"{body}: {found['model']}", 0
        wrong = self._gallery.wrong(found, body["prompt"])
        return ("wrong", f"{body}: seeds {wrong} of {found['model']}", 0) if wrong else ("200", None, count)


def _of_events(text: str) -> dict[str, Any]:
    """A stream's last words, as a plain answer says them."""
    blocks = [block.split("\n") for block in text.split("\n\n") if block]
    events = [(block[0].removeprefix("event: "), json.loads(block[1].removeprefix("data: "))) for block in blocks]
    for name, data in events:
        if name == "error":
            return dict(data)
    done = [data for name, data in events if name == "image_generation.completed"]
    return {"data": done, "model": done[0]["model"] if done else None}


class Mover:
    """Moves aliases, and deletes and publishes revisions again, until the end of the block."""

    def __init__(
        self, registry: Registry, moving: Sequence[tuple[Manifest, Manifest]], going: Sequence[Any], seed: int
    ) -> None:
        """moving: two revisions each, of which `live` names one; going: functions that publish a revision again."""
        self._registry, self._moving, self._going = registry, moving, going
        self._rng, self._stop = random.Random(seed), threading.Event()
        self.moves = self.deletions = 0

    def __enter__(self) -> Mover:
        self._pool = ThreadPoolExecutor(1)
        self._running = self._pool.submit(self._run)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        self._running.result()

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            if self._rng.random() < 0.7:
                manifest = self._rng.choice(self._rng.choice(self._moving))
                self._registry.set_alias(manifest.adapter_id, "live", manifest.revision)
                self.moves += 1
                continue
            publish = self._rng.choice(self._going)
            manifest = publish()  # what is there is no error
            for alias in self._registry.aliases(manifest.adapter_id):
                self._registry.remove_alias(manifest.adapter_id, alias)
            self._registry.delete(manifest.adapter_id, manifest.revision)
            self._stop.wait(self._rng.uniform(0.0, 1.0))
            publish()
            self._registry.set_alias(manifest.adapter_id, "live", manifest.revision)
            self.deletions += 1


class Memory:
    """Resident memory of the service's replicas over time, by process."""

    def __init__(self, service: Served) -> None:
        self._driver = psutil.Process(service.process.pid)
        self.samples: dict[str, list[tuple[float, float]]] = {}

    def look(self) -> None:
        """Take a sample of each replica."""
        for process in self._driver.children(recursive=True):
            name = process.name() if process.is_running() else ""
            title = " ".join(process.cmdline()) if "ray::" in name else ""
            if "ServeReplica" in title:
                kind = "engine" if "Engine" in title else "ingress"
                mib = process.memory_info().rss / MIB
                self.samples.setdefault(f"{kind} {process.pid}", []).append((time.monotonic(), mib))

    def growth(self) -> dict[str, tuple[float, float, float]]:
        """Of each replica: MiB at first, at last, and the slope of a straight line in MiB per minute."""
        found = {}
        for name, samples in self.samples.items():
            times, sizes = np.array(samples).T
            slope = float(np.polyfit(times - times[0], sizes, 1)[0]) * 60 if len(samples) > 2 else 0.0
            found[name] = (round(float(sizes[0]), 1), round(float(sizes[-1]), 1), round(slope, 2))
        return found
