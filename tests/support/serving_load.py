"""Load for the service: clients that ask at random, leave at random, and check every picture and every refusal."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx2
import numpy as np
import psutil

from cat_cluster.registry import Manifest, Registry
from tests.support.motifs import Motif
from tests.support.serving import Gallery, Served

SECONDS = 90  # no request takes longer
MIB = 2**20


@dataclass
class Tally:
    """How requests ended; `problems`: those that must not be; blamed: the fields that refusals named.

    images: pictures that were checked, by the kind of motif; of_stacks: of several adapters.
    """

    ends: Counter[str] = field(default_factory=Counter)
    blamed: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    slowest: float = 0.0
    images: Counter[str] = field(default_factory=Counter)
    of_stacks: int = 0

    def count(self, end: End, seconds: float) -> None:
        """Count a request that took so long."""
        self.ends[end.how] += 1
        if end.images:
            self.images[end.kind] += end.images
        self.of_stacks += end.images * end.stack
        self.slowest = max(self.slowest, seconds)
        if end.blamed is not None:
            self.blamed[end.blamed] += 1
        if end.problem is not None:
            self.problems.append(end.problem)


@dataclass(frozen=True)
class End:
    """How a request ended: what is wrong with that, the pictures of a kind of motif that were checked, the field a
    refusal blamed.
    """

    how: str
    problem: str | None = None
    images: int = 0
    kind: str = ""
    stack: bool = False
    blamed: str | None = None


@dataclass(frozen=True)
class Wish:
    """Adapters as a request names them: its fields, what stands behind its prompt; each reference with its field."""

    fields: Mapping[str, Any]
    members: tuple[tuple[str, str], ...]
    tags: str = ""

    def names(self, model: str) -> bool:
        """Whether an answer's model is of revisions of these adapters, in their order, and of those that were named."""
        parts, wanted = model.split("+"), [reference for reference, _ in self.members]
        return len(parts) == len(wanted) and all(
            part == one if "@r-" in one else part.startswith(f"{id_of(one)}@r-")
            for part, one in zip(parts, wanted, strict=True)
        )


def alone(model: str) -> Wish:
    """One adapter, named by `model`."""
    return Wish({"model": model}, ((model, "model"),))


def ways_to_name(stack: Sequence[tuple[str, float]]) -> Iterator[Wish]:
    """Every way to ask for a stack of (reference, strength): in all of them the picture is the same."""
    references, strengths = zip(*stack, strict=True)
    members = [{"model": reference, "strength": strength} for reference, strength in stack]
    fields = [f"adapters.{number}.model" for number in range(len(stack))]
    yield Wish({"adapters": members}, tuple(zip(references, fields, strict=True)))
    tags = [f" <lora:{reference}:{strength}>" for reference, strength in stack]
    yield Wish({}, tuple((reference, "prompt") for reference in references), "".join(tags))
    if len(set(strengths)) == 1:  # that of the request multiplies those of all
        strength, (first, *others) = {"strength": strengths[0]}, references
        named = tuple((reference, "model") for reference in references)
        yield Wish({"model": "+".join(references), **strength}, named)
        tags = [f" <lora:{reference}>" for reference in others]
        named = ((first, "model"), *((reference, "prompt") for reference in others))
        yield Wish({"model": first, **strength}, named, "".join(tags))


def id_of(reference: str) -> str:
    """The adapter's id in a reference."""
    return reference.partition("@")[0]


class Answering(Protocol):
    """A service that listens."""

    def http(self, **options: Any) -> AbstractContextManager[httpx2.Client]:
        """A client of the service."""


@dataclass(frozen=True)
class Order:
    """What the clients ask for: motifs and seeds whose pictures the gallery knows; ids that may be refused."""

    wishes: Sequence[Wish]
    motifs: Sequence[Motif]
    seeds: range
    steps: int
    may_be_missing: frozenset[str] = frozenset()
    may_be_quarantined: frozenset[str] = frozenset()
    leave: float = 0.0  # share of clients that go before their answer
    stream: float = 0.25  # share of calls that stream
    may_be_refused: bool = False  # with 503 and Retry-After

    def judge(self, wish: Wish, motif: Motif, count: int, answer: Answer, gallery: Gallery) -> End:
        """How a request for `count` images ended, and what is wrong with that."""
        told = f"{wish} {motif}"
        error = answer.content.get("error")
        if answer.status == 503 and self.may_be_refused and answer.retries:
            return End("503")
        if error is not None:
            how = self._allowed(wish, error)
            if how is not None and answer.status in (int(how), 200):  # 200: of a stream that had begun
                return End(how, blamed=error["param"])
            return End(f"refused {answer.status}", f"{told}: {answer.status} {error}")
        if answer.status != 200:
            return End(str(answer.status), f"{told}: {answer.status} {answer.content}")
        images, model = answer.content["data"], answer.content["model"]
        if len(images) != count:
            return End("short", f"{told}: {len(images)} images, not {count}")
        if not wish.names(model) or answer.model != model:
            return End("other revision", f"{told}: {model}, x-cat-model {answer.model}")
        wrong = gallery.wrong(answer.content, motif)
        if wrong:
            return End("wrong", f"{told}: seeds {wrong} of {model}")
        return End("200", images=count, kind=motif.kind, stack=len(wish.members) > 1)

    def _allowed(self, wish: Wish, error: Mapping[str, Any]) -> str | None:
        """The status of a refusal that may be: the field that it blames must name an adapter of which it can be so."""
        kinds = {"model_not_found": ("404", self.may_be_missing), "model_quarantined": ("409", self.may_be_quarantined)}
        how, ids = kinds.get(error["code"], (None, frozenset()))
        fields = {field for reference, field in wish.members if id_of(reference) in ids}
        return how if error["param"] in fields else None


@dataclass(frozen=True)
class Answer:
    """An answer's status, its content (of a stream, as a plain answer has it), x-cat-model, whether to ask again."""

    status: int
    content: Mapping[str, Any]
    model: str | None = None
    retries: bool = False

    @classmethod
    def of(cls, response: httpx2.Response) -> Answer:
        """Read a response whole."""
        streams = response.headers.get("content-type", "").startswith("text/event-stream")
        try:
            content = _of_events(response.text) if streams else response.json()
        except ValueError:
            content = {"text": response.text[:500]}
        headers = response.headers
        return cls(response.status_code, content, headers.get("x-cat-model"), "retry-after" in headers)


class Load:
    """Clients that ask again and again until the end of the block."""

    def __init__(self, service: Answering, gallery: Gallery, order: Order, clients: int, seed: int) -> None:
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
                end = self._ask(http, rng)
                with self._lock:
                    self.tally.count(end, time.monotonic() - began)

    def _ask(self, http: httpx2.Client, rng: random.Random) -> End:
        """Ask once; how it ended."""
        order = self._order
        motif = rng.choice(order.motifs)
        wish = rng.choice([wish for wish in order.wishes if motif.allows(wish.fields)])
        count, streams, leaves = rng.choice((1, 1, 2)), rng.random() < order.stream, rng.random() < order.leave
        body = {
            **wish.fields,
            "prompt": motif.prompt + wish.tags,
            "seed": rng.choice(order.seeds[: len(order.seeds) - count + 1]),
            "n": count,
            "num_inference_steps": order.steps,
            "stream": streams,
        }
        path, sent = motif.request(body)
        patience = httpx2.Timeout(SECONDS, read=rng.uniform(0.01, 0.4) if leaves else SECONDS)
        try:
            with http.stream("POST", path, **sent, timeout=patience) as response:
                if leaves and streams:
                    return End("left")
                response.read()
        except httpx2.TimeoutException as error:
            return End("left") if leaves else End("no end", f"{path} {body}: {error!r}")
        except httpx2.TransportError as error:
            return End("broken", f"{path} {body}: {error!r}")
        return order.judge(wish, motif, count, Answer.of(response), self._gallery)


def _of_events(text: str) -> dict[str, Any]:
    """A stream's last words, as a plain answer says them."""
    blocks = [block.split("\n") for block in text.split("\n\n") if block]
    events = [(block[0].removeprefix("event: "), json.loads(block[1].removeprefix("data: "))) for block in blocks]
    for name, data in events:
        if name == "error":
            return dict(data)
    done = [data for name, data in events if name in ("image_generation.completed", "image_edit.completed")]
    return {"data": done, "model": done[0]["model"] if done else None}


class Mover:
    """Moves aliases, deletes and publishes revisions again, quarantines and releases, until the end of the block."""

    def __init__(
        self,
        registry: Registry,
        moving: Sequence[tuple[Manifest, Manifest]],
        going: Sequence[Any],
        troubled: Sequence[Manifest],
        seed: int,
    ) -> None:
        """moving: two revisions each, of which `live` names one; going: functions that publish a revision again.

        troubled: those that are quarantined and released.
        """
        self._registry, self._moving, self._going, self._troubled = registry, moving, going, troubled
        self._rng, self._stop = random.Random(seed), threading.Event()
        self.moves = self.deletions = self.quarantines = 0

    def __enter__(self) -> Mover:
        self._pool = ThreadPoolExecutor(1)
        self._running = self._pool.submit(self._run)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        self._running.result()

    def _run(self) -> None:
        works = (self._move, self._delete, self._quarantine)
        while not self._stop.wait(0.1):
            (work,) = self._rng.choices(works, (6, 3, 2))
            work()

    def _move(self) -> None:
        manifest = self._rng.choice(self._rng.choice(self._moving))
        self._registry.set_alias(manifest.adapter_id, "live", manifest.revision)
        self.moves += 1

    def _delete(self) -> None:
        publish = self._rng.choice(self._going)
        manifest = publish()  # what is there is no error
        for alias in self._registry.aliases(manifest.adapter_id):
            self._registry.remove_alias(manifest.adapter_id, alias)
        self._registry.delete(manifest.adapter_id, manifest.revision)
        self._stop.wait(self._rng.uniform(0.0, 1.0))
        publish()
        self._registry.set_alias(manifest.adapter_id, "live", manifest.revision)
        self.deletions += 1

    def _quarantine(self) -> None:
        manifest = self._rng.choice(self._troubled)
        self._registry.quarantine(manifest.adapter_id, manifest.revision, "a test")
        self._stop.wait(self._rng.uniform(0.0, 1.0))
        self._registry.release(manifest.adapter_id, manifest.revision)
        self.quarantines += 1


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
