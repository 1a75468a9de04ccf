"""What the serving benchmarks share: a base, made-up adapters in a real registry, a service in this process, load."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cat_cluster.errors import CatClusterError
from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.pocket import world
from cat_cluster.registry import Registry
from cat_cluster.store import open_store
from cat_cluster.telemetry import SERVING_METRICS, Metrics, MetricSpec
from jobs.benchmark.serving.contenders import Apart, Contender, Here
from jobs.benchmark.serving.materials import NOUN, TOKEN, publish, random_adapter
from jobs.benchmark.timing import Timed
from serve.calls import Failed, Finished, ImageCall
from serve.service import Service
from serve.settings import ProbeSettings, ServeSettings

GUIDANCE = 4.0
LEAST_TURNS = 3
Pixels = NDArray[np.uint8]
Event = tuple[float, str, float]


@dataclass(frozen=True)
class Ask:
    """One guided image: an adapter's id, prompt, seed and number of DDIM steps."""

    adapter: str
    prompt: str
    seed: int
    steps: int


@dataclass(frozen=True, eq=False)
class Answer:
    """An image (PNG bytes), the engine's facts of it, and the seconds on time.monotonic when it was done."""

    png: bytes
    facts: Mapping[str, Any]
    done: float

    def pixels(self) -> Pixels:
        """The image, uint8 [H, W, 3]."""
        return np.asarray(Image.open(io.BytesIO(self.png)).convert("RGB"))


@dataclass(frozen=True)
class Scale:
    """How much is measured. rows: most U-Net rows of a call; call_rows: row counts of the curve of single calls."""

    rows: int = 16
    concurrency: int = 16
    steps: int = 25
    adapters: int = 32
    mixes: tuple[int, ...] = (1, 32)
    slots: tuple[int, ...] = (32, 8)
    threads: tuple[int, ...] = (1, 2)
    call_rows: tuple[int, ...] = (2, 4, 8, 16, 32)
    images: int = 16  # of a turn of the part adapters
    serial_images: int = 8  # of a turn of a way that draws one at a time
    arrivals: int = 32  # images of a turn at one rate
    step_range: tuple[int, int] = (10, 30)


@dataclass(frozen=True, eq=False)
class Bench:
    """A base (a name or folder), its device, the registry that adapters are published in, and how much is measured.

    apart: contenders are in processes of their own.
    """

    base: str
    device: str
    storage: Path
    scale: Scale
    seconds: float
    compile: bool = False
    apart: bool = True

    @property
    def ids(self) -> list[str]:
        """The adapters' ids."""
        return [f"adapter-{n:03d}" for n in range(self.scale.adapters)]

    @cached_property
    def adapters(self) -> Mapping[str, AdapterWeights]:
        """The adapters by id, as the registry has them."""
        registry = Registry(open_store(str(self.storage)))
        return {name: registry.load_weights(registry.resolve(name)) for name in self.ids}

    def contender(self, make: Callable[..., AbstractContextManager[Any]], *arguments: Any) -> Contender:
        """Return what `make` opens as a contender."""
        return (Apart if self.apart else Here)(make, *arguments)

    def service(self, *recorded: MetricSpec, **changes: Any) -> Contender:
        """Return a service as a contender; see Served and settings."""
        return self.contender(Served, self.settings(**changes), *recorded)

    @property
    def dtype(self) -> torch.dtype:
        """What the base computes in, as a service of these settings does."""
        return torch.bfloat16 if self.device.startswith("cuda") else torch.float32

    def load(self) -> BaseModel:
        """The base model with nothing attached."""
        return load_base_model(self.base, device=self.device, dtype=self.dtype)

    def settings(self, **changes: Any) -> ServeSettings:
        """Those of a service here: the defaults, but for rows and compilation, and without probes if not asked for."""
        given = {
            "base": self.base,
            "storage": str(self.storage),
            "device": self.device,
            "precision": "bf16" if self.dtype == torch.bfloat16 else "fp32",
            "sizes": (),
            "max_rows": self.scale.rows,
            "compile": self.compile,
            "slots": self.scale.adapters + 1,
            "alias_ttl_s": 3600.0,
            "max_waiting": 1024,
            "deadline_s": 3600.0,
            "probes": ProbeSettings(enabled=False),
        }
        return ServeSettings(**{**given, **changes})

    def asks(self, count: int, *, adapters: int, first: int = 0, steps: Sequence[int] | None = None) -> list[Ask]:
        """`count` images over the first `adapters` ones in turn; other prompts and seeds for another `first`."""
        places = [f"{colour} {NOUN} {place}" for colour in world.COLOURS for place in world.PLACES]
        return [
            Ask(
                adapter=self.ids[n % adapters],
                # The number makes each prompt a new one, as users' are: no text is found encoded already.
                prompt=f"a photo of a {TOKEN} {places[n % len(places)]} {n}",
                seed=n,
                steps=self.scale.steps if steps is None else steps[n - first],
            )
            for n in range(first, first + count)
        ]


class Recorder:
    """A metric backend that keeps every value of chosen metrics with its time, in the order they came."""

    def __init__(self, *specs: MetricSpec) -> None:
        self._names = {spec.name for spec in specs}
        self.events: list[Event] = []

    def open(self, spec: MetricSpec) -> Callable[[float, Mapping[str, str]], None]:
        """Keep the values of a metric, if it was chosen."""
        if spec.name not in self._names:
            return lambda value, labels: None
        return lambda value, labels: self.events.append((time.monotonic(), spec.name, value))

    def take(self) -> list[Event]:
        """Return the events, (time, metric, value), and forget them."""
        taken, self.events = self.events, []
        return taken


class Served:
    """A service in this process, on an event loop of its own that runs while it is asked for something."""

    def __init__(self, settings: ServeSettings, *recorded: MetricSpec) -> None:
        self._recorder = Recorder(*recorded)
        self._runner = asyncio.Runner()
        self._service = Service.open(settings, Metrics(self._recorder, SERVING_METRICS))

    def __enter__(self) -> Served:
        self._runner.run(self._service.__aenter__())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._runner.run(self._service.__aexit__())
        self._runner.close()

    def events(self) -> list[Event]:
        """Return what was recorded since the last time."""
        return self._recorder.take()

    def draw(self, asks: Sequence[Ask], concurrency: int) -> list[Answer]:
        """Draw images, `concurrency` of them asked for at any time; the answers in the order of the asks."""
        return self._runner.run(self._closed(asks, concurrency))

    def arrive(self, asks: Sequence[Ask], times: Sequence[float]) -> list[float]:
        """Ask for each image at its own time (seconds from now); return when each is done, seconds from now."""
        return self._runner.run(self._open(asks, times))

    def join(self, busy: Sequence[Ask], late: Sequence[Ask], pauses: Sequence[float]) -> list[Answer]:
        """While `busy` images are drawn, ask for each late one, two at a time, after its pause; the late answers."""
        return self._runner.run(self._joined(busy, late, pauses))

    def admin(self, action: Any, reference: str) -> None:
        """Act on an adapter, as POST /v1/adapters/... does."""
        self._runner.run(self._service.admin(action, reference))

    async def _closed(self, asks: Sequence[Ask], concurrency: int) -> list[Answer]:
        left, answers = iter(enumerate(asks)), dict[int, Answer]()

        async def client() -> None:
            for index, ask in left:
                answers[index] = await self._one(ask)

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(client())
        return [answers[index] for index in range(len(asks))]

    async def _open(self, asks: Sequence[Ask], times: Sequence[float]) -> list[float]:
        start = time.monotonic()

        async def client(ask: Ask, at: float) -> float:
            await asyncio.sleep(start + at - time.monotonic())
            return (await self._one(ask)).done - start

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(client(ask, at)) for ask, at in zip(asks, times, strict=True)]
        return [task.result() for task in tasks]

    async def _joined(self, busy: Sequence[Ask], late: Sequence[Ask], pauses: Sequence[float]) -> list[Answer]:
        left, answers = iter(list(zip(late, pauses, strict=True))), list[Answer]()

        async def client() -> None:
            for ask, pause in left:
                await asyncio.sleep(pause)
                answers.append(await self._one(ask))

        running = [asyncio.ensure_future(self._one(ask)) for ask in busy]
        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(client())
        for task in running:
            task.cancel()  # they were company only
        await asyncio.gather(*running, return_exceptions=True)
        return answers

    async def _one(self, ask: Ask) -> Answer:
        call = ImageCall("bench", ask.prompt, ask.adapter, seed=ask.seed, steps=ask.steps, guidance=GUIDANCE)
        async for event in self._service.generate(call):
            if isinstance(event, Failed):
                raise CatClusterError(f"{ask.adapter}: {event.kind}: {event.message}")
            if isinstance(event, Finished):
                return Answer(event.png, event.facts, time.monotonic())
        raise CatClusterError(f"{ask.adapter}: the service gave no image")


@dataclass
class Counter:
    """Numbers that go on from turn to turn, so that no turn repeats what another asked."""

    at: int = 0

    def take(self, count: int) -> int:
        """Return where the next `count` numbers begin."""
        self.at += count
        return self.at - count


@dataclass
class Turns:
    """What variants found in each turn, until the time of a part is over."""

    found: dict[str, list[float]] = field(default_factory=dict)

    def timed(self) -> dict[str, Timed]:
        """The turns of each variant."""
        return {name: Timed(tuple(values)) for name, values in self.found.items()}


def take_turns_for(variants: Mapping[str, Callable[[], float]], seconds: float) -> dict[str, Timed]:
    """Let every variant measure itself once per turn, at least 3 turns and for `seconds`; the first is not counted.

    Every other turn goes backwards, so that no variant always follows the same one.
    """
    turns = Turns({name: [] for name in variants})
    for measure in variants.values():
        measure()
    started = time.monotonic()
    while len(turns.found[next(iter(variants))]) < LEAST_TURNS or time.monotonic() - started < seconds:
        forward = len(turns.found[next(iter(variants))]) % 2 == 0
        for name in variants if forward else reversed(list(variants)):
            turns.found[name].append(variants[name]())
    return turns.timed()


def bench_in(
    folder: Path, base: str, device: str, scale: Scale, seconds: float, *, compile: bool = False, apart: bool = True
) -> Bench:
    """Publish the adapters of a scale for a base into `folder`."""
    loaded, bench = load_base_model(base), Bench(base, device, folder / "registry", scale, seconds, compile, apart)
    for n, adapter_id in enumerate(bench.ids):
        publish(bench.storage, loaded, adapter_id, random_adapter(loaded.unet, n))
    return bench
