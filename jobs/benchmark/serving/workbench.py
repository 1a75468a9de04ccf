"""What the serving benchmarks share: a base, made-up adapters in a real registry, a service in this process, load."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
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
from cat_cluster.registry.stacks import StackMember, parse_stack
from cat_cluster.store import open_store
from cat_cluster.telemetry import SERVING_METRICS, Metrics, MetricSpec
from jobs.benchmark.serving.backends import Backend, InOwnProcess, InThisProcess
from jobs.benchmark.serving.random_models import NOUN, TOKEN, publish, random_adapter
from jobs.benchmark.timing import Timed
from serve.calls import Failed, Finished, ImageCall
from serve.service import Service
from serve.settings import ProbeSettings, ServeSettings

GUIDANCE = 4.0
LEAST_TURNS = 3
Pixels = NDArray[np.uint8]
Event = tuple[float, str, float]


@dataclass(frozen=True)
class Request:
    """One guided image: an adapter's id (of a stack: ids with + between them), prompt, seed, number of DDIM steps."""

    adapter: str
    prompt: str
    seed: int
    steps: int


@dataclass(frozen=True, eq=False)
class Response:
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
    stack_rows: tuple[int, ...] = (2, 8, 16)  # of calls with stacks
    images: int = 16  # of a turn of the part adapters
    serial_images: int = 8  # of a turn of a pipeline, which draws one at a time
    arrivals: int = 32  # images of a turn at one rate
    step_range: tuple[int, int] = (10, 30)


@dataclass(frozen=True, eq=False)
class Workbench:
    """A base (a name or folder), its device, the registry that adapters are published in, and how much is measured.

    own_processes: whether each backend runs in a process of its own.
    """

    base: str
    device: str
    storage: Path
    scale: Scale
    seconds: float
    compile: bool = False
    own_processes: bool = True

    @property
    def ids(self) -> list[str]:
        """The adapters' ids."""
        return [f"adapter-{n:03d}" for n in range(self.scale.adapters)]

    @cached_property
    def adapters(self) -> Mapping[str, AdapterWeights]:
        """The adapters by id, as the registry has them."""
        registry = Registry(open_store(str(self.storage)))
        return {name: registry.load_weights(registry.resolve(name)) for name in self.ids}

    def backend(self, make: Callable[..., AbstractContextManager[Any]], *arguments: Any) -> Backend:
        """Return what `make` opens as a backend."""
        return (InOwnProcess if self.own_processes else InThisProcess)(make, *arguments)

    def service(self, *recorded: MetricSpec, **changes: Any) -> Backend:
        """Return a service as a backend; see LocalService and settings."""
        return self.backend(LocalService, self.settings(**changes), *recorded)

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

    def requests(
        self, count: int, *, adapters: int, first: int = 0, steps: Sequence[int] | None = None
    ) -> list[Request]:
        """`count` images over the first `adapters` ones in turn; other prompts and seeds for another `first`."""
        places = [f"{colour} {NOUN} {place}" for colour in world.COLOURS for place in world.PLACES]
        return [
            Request(
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

    def forget(self, spec: MetricSpec, labels: Mapping[str, str]) -> None:
        """Keep what was recorded."""

    def take(self) -> list[Event]:
        """Return the events, (time, metric, value), and forget them."""
        taken, self.events = self.events, []
        return taken


class LocalService:
    """A service in this process, on an event loop of its own that runs during its methods."""

    def __init__(self, settings: ServeSettings, *recorded: MetricSpec) -> None:
        self._recorder = Recorder(*recorded)
        self._runner = asyncio.Runner()
        self._service = Service.open(settings, Metrics(self._recorder, SERVING_METRICS))

    def __enter__(self) -> LocalService:
        self._runner.run(self._service.__aenter__())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._runner.run(self._service.__aexit__())
        self._runner.close()

    def events(self) -> list[Event]:
        """Return what was recorded since the last time."""
        return self._recorder.take()

    def draw(self, requests: Sequence[Request], concurrency: int) -> list[Response]:
        """Draw images, `concurrency` of them in flight at any time; the responses in the order of the requests."""
        return self._runner.run(self._closed(requests, concurrency))

    def arrive(self, requests: Sequence[Request], times: Sequence[float]) -> list[float]:
        """Request for each image at its own time (seconds from now); return when each is done, seconds from now."""
        return self._runner.run(self._open(requests, times))

    def join(self, busy: Sequence[Request], late: Sequence[Request], pauses: Sequence[float]) -> list[Response]:
        """Send late requests while `busy` images are drawn, two at a time, each after its pause; return theirs."""
        return self._runner.run(self._joined(busy, late, pauses))

    def admin(self, action: Any, reference: str) -> None:
        """Act on an adapter, as POST /v1/adapters/... does."""
        self._runner.run(self._service.admin(action, reference))

    async def _closed(self, requests: Sequence[Request], concurrency: int) -> list[Response]:
        left, responses = iter(enumerate(requests)), dict[int, Response]()

        async def client() -> None:
            for index, request in left:
                responses[index] = await self._one(request)

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(client())
        return [responses[index] for index in range(len(requests))]

    async def _open(self, requests: Sequence[Request], times: Sequence[float]) -> list[float]:
        start = time.monotonic()

        async def client(request: Request, at: float) -> float:
            await asyncio.sleep(start + at - time.monotonic())
            return (await self._one(request)).done - start

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(client(request, at)) for request, at in zip(requests, times, strict=True)]
        return [task.result() for task in tasks]

    async def _joined(
        self, busy: Sequence[Request], late: Sequence[Request], pauses: Sequence[float]
    ) -> list[Response]:
        left, responses = iter(list(zip(late, pauses, strict=True))), list[Response]()

        async def client() -> None:
            for request, pause in left:
                await asyncio.sleep(pause)
                responses.append(await self._one(request))

        running = [asyncio.ensure_future(self._one(request)) for request in busy]
        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(client())
        for task in running:
            task.cancel()  # they were company only
        await asyncio.gather(*running, return_exceptions=True)
        return responses

    async def _one(self, request: Request) -> Response:
        adapters = tuple(StackMember(reference) for reference in parse_stack(request.adapter))
        call = ImageCall("bench", request.prompt, adapters, seed=request.seed, steps=request.steps, guidance=GUIDANCE)
        async for event in self._service.generate(call):
            if isinstance(event, Failed):
                raise CatClusterError(f"{request.adapter}: {event.kind}: {event.message}")
            if isinstance(event, Finished):
                return Response(event.image, event.facts, time.monotonic())
        raise CatClusterError(f"{request.adapter}: the service gave no image")


@dataclass
class Numbering:
    """Numbers of prompts and seeds that go on from turn to turn, so that no turn repeats the requests of another."""

    at: int = 0

    def take(self, count: int) -> int:
        """Return where the next `count` numbers begin."""
        self.at += count
        return self.at - count


def take_turns_for(variants: Mapping[str, Callable[[], float]], seconds: float) -> dict[str, Timed]:
    """Let every variant measure itself once per turn, at least 3 turns and for `seconds`; the first is not counted.

    Every other turn goes backwards, so that no variant always follows the same one.
    """
    found: dict[str, list[float]] = {name: [] for name in variants}
    for measure in variants.values():
        measure()
    started, turn = time.monotonic(), 0
    while turn < LEAST_TURNS or time.monotonic() - started < seconds:
        for name in variants if turn % 2 == 0 else reversed(list(variants)):
            found[name].append(variants[name]())
        turn += 1
    return {name: Timed(tuple(values)) for name, values in found.items()}


def open_workbench(
    folder: Path,
    base: str,
    device: str,
    scale: Scale,
    seconds: float,
    *,
    compile: bool = False,
    own_processes: bool = True,
) -> Workbench:
    """Publish the adapters of a scale for a base into `folder`."""
    loaded, bench = (
        load_base_model(base),
        Workbench(base, device, folder / "registry", scale, seconds, compile, own_processes),
    )
    for n, adapter_id in enumerate(bench.ids):
        publish(bench.storage, loaded, adapter_id, random_adapter(loaded.unet, n))
    return bench
