"""The HTTP service on loopback for tests: before the real engine, or before one that does what a test tells it."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image

from cat_cluster.lora.formats import AdapterWeights, LoraLayer
from cat_cluster.models.base_model import load_base_model
from cat_cluster.registry import AdapterDraft, Manifest, Registry
from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.spec.job import ResolvedAdapter
from cat_cluster.spec.sections import EvaluationSpec, TrainingSpec
from cat_cluster.store import LocalStore
from cat_cluster.telemetry import HTTP_REQUESTS, HTTP_SECONDS, SERVING_METRICS, Metrics, PrometheusBackend
from serve.calls import Accepted, AdminAction, EngineClient, Event, Finished, ImageCall, Preview, Progress
from serve.http.access import Access
from serve.http.ingress import build_app
from serve.service import Service
from serve.settings import ProbeSettings, ServeSettings
from serve.tracing import NO_TRACER, Tracer

PATH = "/v1/images/generations"
# Scores of ten pairs.
DECOY = {"word": "wjq", "pairs": [0, 4], "drift": [0.01, 0.03]}
REFERENCE = {"kps": [0.22, 0.26] * 5, "identity": [0.6, 0.7] * 5, "base_drift": [0.05, 0.07] * 5}

Script = Callable[[ImageCall], AsyncIterator[Event]]


def picture(side: int = 16, shade: int = 90, kind: str = "png") -> bytes:
    """A plain image file."""
    kept = io.BytesIO()
    Image.new("RGB", (side, side), (shade, shade, shade)).save(kept, kind)
    return kept.getvalue()


async def draw(call: ImageCall) -> AsyncIterator[Event]:
    """What an engine that never fails says."""
    names = [f"{member.reference.adapter_id}@r-0123456789ab" for member in call.adapters] or ["base"]
    yield Accepted("+".join(names), drift="ok")
    for index in range(call.count):
        for number in range(call.previews):
            yield Preview(index, number, step=number + 1, steps=call.steps, image=picture(8, kind=call.file.kind))
        if call.progress:
            yield Progress(index, step=call.steps, steps=call.steps)
    for index in reversed(range(call.count)):
        yield Finished(index, call.seed + index, picture(shade=index, kind=call.file.kind), {"rows": 2})


@dataclass
class ScriptedEngine:
    """An EngineClient that follows a script, and remembers what it was asked."""

    script: Script = draw
    calls: list[ImageCall] = field(default_factory=list)
    actions: list[tuple[str, str]] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    refusal: Exception | None = None
    state: dict[str, Any] = field(default_factory=dict)

    async def generate(self, call: ImageCall) -> AsyncIterator[Event]:
        self.calls.append(call)
        try:
            async for event in self.script(call):
                yield event
        finally:
            self.closed.append(call.request_id)

    async def admin(self, action: AdminAction, reference: str) -> dict[str, Any]:
        if self.refusal is not None:
            raise self.refusal
        self.actions.append((action, reference))
        return {"engines": 1}

    async def status(self) -> dict[str, Any]:
        if self.refusal is not None:
            raise self.refusal
        return self.state

    async def sizes(self, wait_s: float) -> list[str]:
        if self.refusal is not None:
            raise self.refusal
        return list(self.state["sizes"])

    async def metrics(self) -> bytes:
        if self.refusal is not None:
            raise self.refusal
        return b"# an engine's metrics\n"


@dataclass
class Live:
    """A service that listens."""

    url: str
    app: FastAPI
    loop: asyncio.AbstractEventLoop
    engine: EngineClient

    @contextmanager
    def http(self, **options: Any) -> Iterator[httpx2.Client]:
        with httpx2.Client(base_url=self.url, timeout=60, verify=False, **options) as client:  # plain HTTP
            yield client

    def call(self, coroutine: Any) -> Any:
        """Run a coroutine in the service's own loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def await_idle(self) -> None:
        """Wait until no image is in flight and no row in use; fails after 10 s."""
        deadline = time.monotonic() + 10
        busy: tuple[int, int] = (1, 1)
        while busy != (0, 0) and time.monotonic() < deadline:
            status = self.call(self.engine.status())
            busy = status["images"]["in_flight"], status["rows"]["in_use"]
        assert busy == (0, 0)


@asynccontextmanager
async def only(engine: ScriptedEngine) -> AsyncIterator[EngineClient]:
    yield engine


@contextmanager
def listening(
    opened: AbstractAsyncContextManager[EngineClient],
    registry: Registry,
    settings: ServeSettings,
    access: Access,
    tracer: Tracer = NO_TRACER,
) -> Iterator[Live]:
    """Open the engine in a loop of its own, serve it on a free port of loopback, and stop both at the end."""
    ready: list[Live] = []
    failures: list[BaseException] = []
    stop, changed = asyncio.Event(), threading.Event()

    async def run() -> None:
        async with opened as engine:
            backend = PrometheusBackend()
            metrics = Metrics(backend, [HTTP_REQUESTS, HTTP_SECONDS])
            app = build_app(engine, registry, settings, access, metrics, backend.exposition, tracer=tracer)
            config = uvicorn.Config(app, port=0, log_level="warning", lifespan="off")
            config.load()
            server = uvicorn.Server(config)
            server.lifespan = config.lifespan_class(config)
            # Not serve(), whose shutdown waits a tenth of a second: there are hundreds of tests.
            await server.startup()
            port = server.servers[0].sockets[0].getsockname()[1]
            ready.append(Live(f"http://127.0.0.1:{port}", app, asyncio.get_running_loop(), engine))
            changed.set()
            await stop.wait()
            for listener in server.servers:
                listener.close()

    def guarded() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            failures.append(error)
        finally:
            changed.set()

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    try:
        assert changed.wait(120)
        if failures:
            raise failures[0]
        yield ready[0]
    finally:
        if ready and thread.is_alive():
            ready[0].loop.call_soon_threadsafe(stop.set)
        thread.join(60)
    if failures:
        raise failures[0]


def publish(
    registry: Registry,
    unet: Any,
    fingerprint: str,
    base: str,
    *,
    adapter_id: str = "cup",
    seed: int = 0,
    concept: tuple[str, str] = ("sks", "cup"),
    measured: bool = True,
) -> Manifest:
    """Publish an adapter of random weights for this U-Net; another seed makes another revision.

    concept: its token and class noun. measured: with scores, and a reference for probes.
    """
    token, noun = concept
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: LoraLayer(
            down=torch.randn(2, linear.in_features, generator=generator),
            up=torch.randn(linear.out_features, 2, generator=generator),
        )
        for name, linear in unet.named_modules()
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    }
    resolved = ResolvedAdapter(
        id=adapter_id,
        base=base,
        method="cat",
        concepts=(ConceptSpec(token=token, class_noun=noun, images="photos", alpha=2.0),),
        training=TrainingSpec(rank=2, seed=seed),
        evaluation=EvaluationSpec(),
    )
    return registry.publish(
        AdapterDraft(
            adapter_id=adapter_id,
            resolved=resolved,
            base_name=base,
            base_fingerprint=fingerprint,
            image_digests=["1" * 64],
            weights=AdapterWeights(layers),
            training={"steps": 2},
            metrics={"kps": 0.2, "intervals": {"kps": [0.1, 0.3]}, "leak_matrix": {"tokens": [token]}}
            if measured
            else None,
            judge={"name": "pocket", "digest": "d" * 64} if measured else None,
            reference={"concepts": {token: {"photos": [[0.5] * 4], **REFERENCE, "decoy": DECOY}}} if measured else None,
            samples={
                "sample-0-with-0.png": picture(),
                "sample-0-without-0.png": picture(shade=seed),
                "photo-0-000.png": picture(shade=7),
            },
        )
    )


@dataclass(frozen=True)
class Shop:
    """A registry with two revisions of `cup` and one `mug`, all fit for one base, and the settings to serve it."""

    settings: ServeSettings
    registry: Registry
    cups: tuple[Manifest, Manifest]
    mug: Manifest


def furnish(base_folder: Path, storage: Path, **options: Any) -> Shop:
    """Publish adapters of random weights for the base in this folder."""
    base, registry = load_base_model(str(base_folder)), Registry(LocalStore(storage))
    names = [("cup", 1), ("cup", 2), ("mug", 3)]
    first, second, mug = (
        publish(registry, base.unet, base.fingerprint, base.name, adapter_id=name, seed=seed) for name, seed in names
    )
    registry.set_alias("cup", "stable", first.revision)
    settings = ServeSettings(
        base=str(base_folder),
        storage=str(storage),
        device="cpu",
        threads=1,
        probes=ProbeSettings(enabled=False),
        **options,
    )
    return Shop(settings, registry, (first, second), mug)


@contextmanager
def serving(shop: Shop, access: Access | None = None) -> Iterator[Live]:
    """The real engine behind the service."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[EngineClient]:
        metrics = Metrics(PrometheusBackend(), SERVING_METRICS)
        async with Service.open(shop.settings, metrics) as service:
            yield service

    with listening(opened(), shop.registry, shop.settings, access or Access(shop.settings)) as live:
        yield live


def ask(http: httpx2.Client, **fields: Any) -> httpx2.Response:
    """Ask for an image."""
    return http.post(PATH, json={"prompt": "a cup", **fields})


def events_of(response: httpx2.Response) -> list[tuple[str, dict[str, Any]]]:
    """The events of a stream: their names and their data."""
    blocks = [block.split("\n") for block in response.text.split("\n\n") if block]
    return [(block[0].removeprefix("event: "), json.loads(block[1].removeprefix("data: "))) for block in blocks]


def assert_refused(response: httpx2.Response, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """Hold an answer against OpenAI's error shape, and return its error."""
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert response.headers["x-request-id"]
    return error


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def scope(method: str, path: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """An ASGI scope, for what no client would send."""
    sent = {"content-type": "application/json", **(headers or {})}
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
