"""One engine with all it needs, as an ingress sees it: it leases adapters, generates images and runs probes."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import replace
from functools import partial
from itertools import compress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cat_cluster import telemetry
from cat_cluster.errors import (
    CatClusterError,
    DeadlineError,
    EngineStoppedError,
    OverloadedError,
    SpecError,
)
from cat_cluster.lora.bank import served_layers, served_text_layers
from cat_cluster.lora.row_bank import AdapterLayout, RowBank
from cat_cluster.lora.text_bank import TextBank, pack_whole
from cat_cluster.models.base_model import BaseModel, compiled_blocks, load_base_model
from cat_cluster.models.device import choose_device
from cat_cluster.models.generate import image_array
from cat_cluster.models.image_start import start_from_noise
from cat_cluster.models.prompt_weights import plain_text
from cat_cluster.registry import Manifest, Reference, Registry
from cat_cluster.registry.gate import gate_note, opens_gate
from cat_cluster.registry.stacks import StackMember, stack_name
from cat_cluster.store import open_store
from cat_cluster.telemetry import Metrics
from serve.adapters.cache import AdapterCache, Resolved
from serve.calls import Accepted, AdminAction, Event, Failed, Finished, ImageCall
from serve.denoise.codec import Codec
from serve.denoise.engine import DenoisingEngine
from serve.denoise.safety import open_checker
from serve.denoise.signing import ImageSigner, open_signer
from serve.denoise.sizes import parse_sizes
from serve.image_plan import EngineParts, ImagePlan
from serve.probes.prober import Prober
from serve.probes.revision_monitor import ProbeCall, worst_state
from serve.running_call import RunningCall, generate_in_spare_rows
from serve.settings import ServeSettings
from serve.tracing import NO_TRACER, Span, Tracer

logger = logging.getLogger("cat_cluster.serve")
_OPERATION = "generate_content"
FAST_BUCKETS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # on a GPU few shapes are compiled or captured


class Service:
    """Implements EngineClient in this process; open it with `async with Service.open(settings, metrics) as service`."""

    def __init__(
        self,
        parts: EngineParts,
        registry: Registry,
        settings: ServeSettings,
        metrics: Metrics,
        signer: ImageSigner | None = None,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self._parts, self._registry, self._settings, self._metrics = parts, registry, settings, metrics
        self._signer, self._tracer = signer, tracer
        self._cleanup = ExitStack()
        self._in_flight = 0
        self._background = set[asyncio.Task[Any]]()
        self._started = time.time()
        self._replica = f"{socket.gethostname()}-{os.getpid()}"
        self.exposition: Callable[[], bytes] = lambda: b""
        self.prober: Prober | None = None

    @classmethod
    def open(cls, settings: ServeSettings, metrics: Metrics, tracer: Tracer = NO_TRACER) -> Service:
        """Load the base model, attach the bank and start the engine. Raises CatClusterError."""
        signer = open_signer(settings.signing)
        device = choose_device(settings.device)
        checker = open_checker(settings.safety, device)
        half = settings.precision == "bf16" or (settings.precision == "auto" and device.startswith("cuda"))
        base = load_base_model(settings.base, device=device, dtype=torch.bfloat16 if half else torch.float32)
        sizes, unit = parse_sizes(settings.sizes, base), base.pixels_per_latent
        registry = Registry(
            open_store(
                settings.storage, on_retry=lambda operation: metrics.inc(telemetry.STORE_RETRIES, operation=operation)
            )
        )
        layout = AdapterLayout(base.unet, served_layers(base.unet, settings.targets), settings.max_rank)
        with ExitStack() as cleanup:
            bank = RowBank(base.unet, layout)
            text_layout = AdapterLayout(base.network, served_text_layers(base.network), settings.max_rank)
            text_bank = TextBank(base.network, text_layout)
            for attached in (bank, text_bank):
                cleanup.callback(attached.detach)
            if settings.compile:
                cleanup.enter_context(compiled_blocks(base.unet))
            engine = DenoisingEngine(
                base,
                bank,
                metrics,
                max_rows=settings.max_rows,
                buckets=row_buckets(settings, device),
                max_waiting=settings.max_waiting,
                sizes=[(height // unit, width // unit) for width, height in sizes],
                probe_share=settings.probes.share,
                threads=settings.threads,
            )
            cleanup.callback(engine.close)
            cache = AdapterCache(
                registry,
                settings,
                base.unet.conv_in.weight.new_zeros((settings.slots, layout.size)),
                partial(pack_whole, layout, text_layout),
                base_fingerprints=base.fingerprints,
                network=base.network,
                text_size=text_layout.size,
                metrics=metrics,
            )
            codec = Codec(base, signer=signer, checker=checker, text_bank=text_bank)
            cleanup.callback(codec.close)
            parts = EngineParts(base, engine, cache, codec, sizes, metrics, checker)
            service = cls(parts, registry, settings, metrics, signer, tracer)
            service._cleanup = cleanup.pop_all()
        return service

    async def __aenter__(self) -> Service:
        """Begin to pin adapters, warm up, and start probing."""
        self._parts.cache.start()
        try:
            await self._warm_up()
        except BaseException:
            await self.__aexit__()
            raise
        if self._settings.probes.enabled:
            self.prober = Prober(
                self._registry,
                self._parts.base,
                self._generate_probes,
                self._settings.probes,
                self._metrics,
                replica=self._replica,
                on_alarm=self._on_alarm,
            )
            self._spawn(self.prober.run(self._parts.cache.resident))
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop probing and the engine; what runs fails with EngineStoppedError."""
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        self._parts.cache.close()
        await asyncio.to_thread(self._cleanup.close)

    @property
    def base(self) -> BaseModel:
        """The base model served."""
        return self._parts.base

    async def generate(self, call: ImageCall) -> AsyncIterator[Event]:
        """Yield Accepted, then the images' events; see EngineClient."""
        model = stack_name(str(member.reference) for member in call.adapters) or self._parts.base.name
        with self._tracer.call(f"{_OPERATION} {model}", call.trace, _asked(call, model)) as span:
            async with aclosing(self._generate(call, span)) as events:
                async for event in events:
                    if isinstance(event, Accepted):
                        span.set({"gen_ai.response.model": event.model})
                    if isinstance(event, Failed):
                        span.fail(event.kind)
                    yield event

    async def _generate(self, call: ImageCall, span: Span) -> AsyncGenerator[Event, None]:
        try:
            self._check_room(call)
        except OverloadedError as error:
            yield Failed.of(error)
            return
        self._in_flight += call.count  # from here on: later calls must see it while its adapters are looked up
        running: RunningCall | None = None
        try:
            try:
                with span.child("plan"):
                    plan = await self._plan(call)
            except CatClusterError as error:
                yield self._failed(error)
                return
            running = RunningCall(self._parts, plan, span)
            yield Accepted(plan.model, plan.drift, plan.note)
            async for event in running.events():
                if isinstance(event, CatClusterError):
                    yield self._failed(event)
                    return
                if isinstance(event, Finished):
                    self._probe_live(plan, event, running.pixels.pop(event.index))
                yield event
        finally:
            if running is not None:
                running.cancel()
            self._in_flight -= call.count

    async def admin(self, action: AdminAction, reference: str) -> dict[str, Any]:
        """Act on an adapter; raises CatClusterError."""
        cache = self._parts.cache
        if action in ("load", "unload", "pin", "unpin", "prefetch"):
            placed: dict[str, Any] = await getattr(cache, action)(reference)
            return placed
        if action == "release":
            manifest = await asyncio.to_thread(self._registry.resolve, reference)
            await asyncio.to_thread(self._registry.release, manifest.adapter_id, manifest.revision)
            if self.prober is not None:
                self.prober.reset(manifest)
            return {"released": manifest.name}
        if self.prober is None:
            raise SpecError("probes are disabled: start the service with probes.enabled true")
        resolved = await cache.resolve(reference)
        record = await self.prober.canonical(resolved.manifest, raises=True)
        return record.model_dump(mode="json")

    async def status(self) -> dict[str, Any]:
        """Return base, rows, adapters, drift per revision, and how long the engine has been without a turn."""
        engine, base = self._parts.engine, self._parts.base
        drift = {} if self.prober is None else self.prober.states(self._parts.cache.resident())
        return {
            "base": {"name": base.name, "fingerprint": base.fingerprint, "resolution": base.resolution},
            "device": str(base.device),
            "sizes": await self.sizes(),
            "rows": {"in_use": engine.rows_in_use, "most": self._settings.max_rows},
            "stack": {"most": min(self._settings.max_stack, self._settings.slots)},
            "images": {"waiting": engine.waiting, "active": engine.active, "in_flight": self._in_flight},
            "adapters": self._parts.cache.status(),
            "drift": {name: found.to_json() for name, found in drift.items()},
            "policy": self._settings.probes.policy,
            "signing": None
            if self._signer is None
            else {"subject": self._signer.subject, "expires": self._signer.expires.isoformat()},
            "safety": None if self._parts.checker is None else self._parts.checker.status(),
            "stuck_for_s": round(engine.stuck_for(), 3),
            "uptime_s": round(time.time() - self._started, 1),
            "pid": os.getpid(),
        }

    async def sizes(self, wait_s: float = 0.0) -> list[str]:
        """Return the sizes of images, as WxH, the base's own first; this is an engine, so there is no waiting."""
        return [f"{width}x{height}" for width, height in self._parts.sizes]

    async def metrics(self) -> bytes:
        """Return this engine's metrics in Prometheus' text format."""
        return self.exposition()

    def check_health(self) -> None:
        """Raise EngineStoppedError when the engine's thread has ended or makes no step while there are images.

        Called every few seconds, it also tells when the certificate that signs images expires.
        """
        if self._signer is not None:
            self._metrics.set(telemetry.SIGNING_EXPIRY, self._signer.expires.timestamp())
            self._signer.tell_expiry()
        engine = self._parts.engine
        if not engine.alive:
            raise EngineStoppedError("the engine's thread has ended: the replica must be replaced")
        if engine.stuck_for() > self._settings.stuck_s:
            raise EngineStoppedError(f"the engine has made no step for {engine.stuck_for():.0f} s")

    def _check_room(self, call: ImageCall) -> None:
        room = self._settings.max_waiting + self._settings.max_rows // 2
        if self._in_flight + call.count > room:
            raise OverloadedError(
                f"{self._in_flight} images are in flight and the service takes {room}: try again in a moment",
                self._parts.engine.expected_wait(),
            )

    def _failed(self, error: CatClusterError) -> Failed:
        """Return an error as an event; that of a deadline says how long the queue takes, as of a full service."""
        failed = Failed.of(error)
        if isinstance(error, DeadlineError):
            failed = replace(failed, retry_after=self._parts.engine.expected_wait())
        return failed

    async def _plan(self, call: ImageCall) -> ImagePlan:
        """Look the adapters up and check the call; raises CatClusterError before anything is started."""
        if self._signer is not None:
            self._signer.check_valid()
        if not 1 <= call.steps <= self._settings.max_steps:
            raise SpecError(
                f"num_inference_steps: {call.steps} is out of range; ask for 1 to {self._settings.max_steps}"
            )
        deadline_s = min(call.deadline_s or self._settings.deadline_s, self._settings.deadline_s)
        deadline = time.monotonic() + deadline_s
        cache = self._parts.cache
        try:
            async with asyncio.timeout(deadline_s):
                found = await asyncio.gather(*(cache.resolve(member.reference) for member in call.adapters))
                call, found, left_out = _gated(call, found)
                manifests = [one.manifest for one in found]
                cache.check(manifests)
                tokens = list(dict.fromkeys(concept.token for one in manifests for concept in one.concepts))
                notes = await asyncio.wrap_future(self._parts.codec.notes(call, tokens))
        except TimeoutError:
            raise DeadlineError("the deadline passed while the adapter was looked up: try again") from None
        if call.previews and self._parts.checker is not None and self._parts.checker.refuses:
            # A preview is a blur of colours, of which no classifier can say what the image will be.
            call = replace(call, previews=0)
            notes = [*notes, "partial_images: no previews are sent, since this service may refuse the image"]
        drift = "unknown"
        if self.prober is not None:
            drift = worst_state([self.prober.state(manifest).state for manifest in manifests])
        return ImagePlan.of(call, self._parts, found, deadline, drift, [*left_out, *notes])

    def _probe_live(self, plan: ImagePlan, event: Finished, image: torch.Tensor) -> None:
        """Start a live probe with a user's image, for a share of them; the response does not wait for it.

        An image of several adapters, or one that is made from another, says nothing about one of them: no score of it
        compares with theirs.
        """
        if self.prober is None or len(plan.manifests) != 1 or plan.call.edit is not None:
            return
        (manifest,) = plan.manifests
        if self.prober.wants_live(manifest, plan.call):
            self._spawn(self.prober.live(manifest, plan.call, event.seed, image_array(image)))

    async def _generate_probes(self, calls: Sequence[ProbeCall]) -> list[NDArray[np.uint8]]:
        """Generate the images of probes in spare rows."""
        plans = [
            ImagePlan.of(call, self._parts)
            if manifest is None
            else ImagePlan.of(replace(call, adapters=(_whole(manifest),)), self._parts, [Resolved(manifest)])
            for call, manifest in calls
        ]
        return await asyncio.gather(*(generate_in_spare_rows(self._parts, plan) for plan in plans))

    async def _on_alarm(self, manifest: Manifest, reason: str) -> None:
        """Take a revision out of service; every replica reads it from the registry, where aliases fall back."""
        await asyncio.to_thread(self._registry.quarantine, manifest.adapter_id, manifest.revision, reason)

    async def _warm_up(self) -> None:
        """Generate once: the first user does not wait for allocations, compilation and the preview's colours."""
        call = ImageCall("warm-up", "", steps=2)
        plan = ImagePlan.of(call, self._parts)
        await generate_in_spare_rows(self._parts, plan)
        start = start_from_noise(self._parts.base, call.seed, plan.table, plan.size)
        await asyncio.wrap_future(self._parts.codec.preview(start.latents, call.file))

    def _spawn(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a probe failed", exc_info=task.exception())


def _asked(call: ImageCall, model: str) -> dict[str, str | int]:
    """Return what a call asks for, by OpenTelemetry's conventions for generative models."""
    return {
        "gen_ai.operation.name": _OPERATION,
        "gen_ai.provider.name": "cat_cluster",
        "gen_ai.output.type": "image",
        "gen_ai.request.model": model,
        "gen_ai.request.choice.count": call.count,
        "cat.request_id": call.request_id,
    }


def _gated(call: ImageCall, found: list[Resolved]) -> tuple[ImageCall, list[Resolved], list[str]]:
    """Return the call with the adapters that it carries, what these resolved to, and a note on each other one."""
    if not call.gate:
        return call, found, []
    words = plain_text(call.prompt, call.weighting)
    opened = [opens_gate(one.manifest, words) for one in found]
    call = replace(call, adapters=tuple(compress(call.adapters, opened)))
    left_out = [gate_note(one.manifest) for one, carried in zip(found, opened, strict=True) if not carried]
    return call, list(compress(found, opened)), left_out


def _whole(manifest: Manifest) -> StackMember:
    return StackMember(Reference(manifest.adapter_id, manifest.revision))


def row_buckets(settings: ServeSettings, device: str) -> tuple[int, ...]:
    """Return the row counts that calls are padded to, the last one `max_rows`.

    On a CPU padding costs as much as rows of users and shapes cost nothing; on a GPU few shapes are worth padding.
    """
    if settings.row_buckets is not None:
        return settings.row_buckets
    sizes = FAST_BUCKETS if device.startswith("cuda") else range(2, settings.max_rows, 2)
    return (*(size for size in sizes if size < settings.max_rows), settings.max_rows)
