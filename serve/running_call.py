"""A running call: its images from text and adapters to the engine's rows, and from latents to files."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cat_cluster import telemetry
from cat_cluster.errors import (
    CancelledRequestError,
    CatClusterError,
    DeadlineError,
    EngineStoppedError,
    NotFiniteError,
    ServingError,
)
from cat_cluster.lora.row_bank import RowAdapter
from cat_cluster.models.conditioning import Text
from cat_cluster.models.generate import image_array
from cat_cluster.models.image_start import start_from_image, start_from_noise
from serve.adapters.cache import AdapterCache, Lease
from serve.adapters.loader import key_of
from serve.calls import Event, Failed, Finished, Preview, Progress, Refused, Verdict
from serve.denoise.codec import Codec, TextChange
from serve.denoise.image import EngineImage, ImageFacts
from serve.denoise.rows import ImageRows
from serve.denoise.safety import refusal, safety_metadata
from serve.image_plan import EngineParts, ImagePlan
from serve.tracing import NO_SPAN, Span

logger = logging.getLogger("cat_cluster.serve")


class RunningCall:
    """The images of one call; `pixels[i]` is image i [3, H, W] once it is Finished."""

    def __init__(self, parts: EngineParts, plan: ImagePlan, span: Span = NO_SPAN) -> None:
        self._parts, self._plan, self._span = parts, plan, span
        self._spans: dict[int, Span] = {}
        self._queue = asyncio.Queue[Event | CatClusterError]()
        self._images: list[EngineImage] = []
        self._encoded: asyncio.Future[Tensor] | None = None
        self._tasks = [asyncio.ensure_future(self._start(index)) for index in range(plan.call.count)]
        self.pixels: dict[int, Tensor] = {}

    async def events(self) -> AsyncIterator[Event | CatClusterError]:
        """Yield events until every image is Finished or Refused; an error is the last one."""
        left = self._plan.call.count
        while left:
            event = await self._queue.get()
            yield event
            if isinstance(event, CatClusterError):
                return
            left -= isinstance(event, Finished | Refused)

    def cancel(self) -> None:
        """Let whatever is not done leave at the engine's next turn. The call ends here."""
        for task in self._tasks:
            task.cancel()
        for image in self._images:
            image.cancel()
        # An image holds its listener, a cancelled task its frames, and both hold this call: cycles, with the latents.
        self._images.clear()
        self._tasks.clear()
        if self._encoded is not None:
            self._encoded.cancel()
        for span in self._spans.values():
            span.end()

    async def _start(self, index: int) -> None:
        """Bring one image to the engine's queue."""
        seed = str(self._plan.call.seed + index)  # as text: the last ones have more than the 63 bits of an attribute
        span = self._spans[index] = self._span.child("image", {"cat.index": index, "cat.seed": seed})
        try:
            forwarder = _Forwarder(self, index)
            image = await prepare_image(self._parts, self._plan, index, forwarder, moments=self._moments(), span=span)
            self._images.append(image)
            self._parts.engine.submit(image)
        except Exception as error:
            self.fail(index, _expected(error, "started"))

    def _moments(self) -> asyncio.Future[Tensor] | None:
        """Return those of the image that the call edits, on their way: encoded once for all of its own images."""
        if self._encoded is None and self._plan.source is not None:
            moments = asyncio.wrap_future(self._parts.codec.moments(self._plan.source.pixels))
            self._encoded = self._span.until("encode_image", moments)
        return self._encoded

    def stepped(self, index: int, step: int, steps: int, denoised: Tensor | None) -> None:
        """On the event loop: the engine has made a step."""
        if self._plan.call.progress:
            self._queue.put_nowait(Progress(index, step, steps))
        if denoised is not None:
            self._tasks.append(asyncio.ensure_future(self._preview(index, step, steps, denoised)))

    def finish(self, index: int, latents: Tensor, facts: ImageFacts, at: float) -> None:
        """On the event loop: the image was denoised `at` a time of `time.monotonic`."""
        self._trace(self._spans[index], facts, at)
        self._tasks.append(asyncio.ensure_future(self._finish(index, latents, facts)))

    def fail(self, index: int, error: CatClusterError) -> None:
        """On the event loop: the call ends with the error of one image."""
        if type(error) in (ServingError, NotFiniteError):  # faults: of most of them clients are told an id alone
            logger.error("%s: an image of %s: %s", self._plan.call.request_id, self._plan.model, error)
        self._spans[index].fail(type(error).__name__)
        self._count(error)
        self._queue.put_nowait(error)

    async def _preview(self, index: int, step: int, steps: int, denoised: Tensor) -> None:
        try:
            call = self._plan.call
            preview = self._parts.codec.preview(denoised, call.file, edited=call.edit is not None)
            image = await asyncio.wrap_future(preview)
        except Exception:  # the image itself may yet be done
            logger.exception("a preview could not be made")
            return
        number = sorted(preview_steps(self._plan.call.previews, steps)).index(step)
        self._queue.put_nowait(Preview(index, number, step, steps, image))

    async def _finish(self, index: int, latents: Tensor, facts: ImageFacts) -> None:
        codec, metrics, call = self._parts.codec, self._parts.metrics, self._plan.call
        seed = call.seed + index
        started, span = time.monotonic(), self._spans[index]
        try:
            image = await span.until("decode", asyncio.wrap_future(codec.decode(latents)))
            verdict = await self._checked(image, span)
            if verdict is not None and self._refuses(index, seed, verdict):
                return
            metadata = self._plan.metadata(seed) | safety_metadata(verdict)
            file = await span.until(
                "write_file",
                asyncio.wrap_future(codec.file(image, metadata, call.file, edited=call.edit is not None)),
                {"cat.format": call.file.kind, "cat.signed": codec.signs},
            )
        except Exception as error:
            self.fail(index, _expected(error, "decoded"))
            return
        after = time.monotonic() - started
        metrics.inc(telemetry.IMAGES, outcome="done")
        for manifest in self._plan.manifests:
            metrics.inc(telemetry.ADAPTER_IMAGES, adapter=manifest.adapter_id)
        metrics.observe(telemetry.IMAGE_SECONDS, facts.wait_s + facts.denoise_s + after)
        self.pixels[index] = image
        rounded = {key: round(value, 4) for key, value in asdict(facts).items()}
        self._queue.put_nowait(Finished(index, seed, file, {**rounded, "decode_s": round(after, 4)}, verdict))
        span.end()

    def _trace(self, span: Span, facts: ImageFacts, at: float) -> None:
        """Record how long the image waited for rows and was denoised.

        It has no span of each step: a step is a U-Net call that the images of others share.
        """
        began, plan = at - facts.denoise_s, self._plan
        span.past("queue", began - facts.wait_s, began)
        attributes: dict[str, str | int] = {
            "cat.model": plan.model,
            "cat.steps": len(plan.table),  # of an edit those that are made
            "cat.sampler": plan.call.sampler,
            "cat.latent_size": f"{plan.size[1]}x{plan.size[0]}",
            "cat.rows.most": facts.most_rows,
            "cat.adapters.most": facts.most_adapters,
        }
        span.past("denoise", began, at, attributes)

    async def _checked(self, image: Tensor, span: Span) -> Verdict | None:
        """Return what the safety checker says of an image; None where there is none."""
        checker, metrics = self._parts.checker, self._parts.metrics
        if checker is None:
            return None
        started = time.monotonic()
        try:
            verdict = checker.verdict(await span.until("check", asyncio.wrap_future(self._parts.codec.check(image))))
        except EngineStoppedError:
            raise
        except Exception:
            logger.exception("the safety checker failed")
            verdict = Verdict(None)
        found = {True: "flagged", False: "passed", None: "unchecked"}[verdict.flagged]
        metrics.inc(telemetry.SAFETY_IMAGES, flag=found, action="refuse" if checker.refuses else "mark")
        metrics.observe(telemetry.SAFETY_SECONDS, time.monotonic() - started)
        return verdict

    def _refuses(self, index: int, seed: int, verdict: Verdict) -> bool:
        """Say whether an image is kept back for its verdict; if so, that is its last event."""
        checker = self._parts.checker
        error = refusal(verdict) if checker is not None and checker.refuses else None
        if error is None:
            return False
        self._parts.metrics.inc(telemetry.IMAGES, outcome="refused")
        self._queue.put_nowait(Refused(index, seed, Failed.of(error)))
        self._spans[index].fail(type(error).__name__)
        return True

    def _count(self, error: CatClusterError) -> None:
        outcomes: dict[type[CatClusterError], str] = {CancelledRequestError: "cancelled", DeadlineError: "expired"}
        self._parts.metrics.inc(telemetry.IMAGES, outcome=outcomes.get(type(error), "failed"))


class _Forwarder:
    """The engine's listener: carries what happens from its thread to the event loop of the call."""

    def __init__(self, call: RunningCall, index: int) -> None:
        self._call, self._index = call, index
        self._loop = asyncio.get_running_loop()

    def stepped(self, step: int, steps: int, denoised: Tensor | None) -> None:
        self._call_soon(self._call.stepped, self._index, step, steps, denoised)

    def denoised(self, latents: Tensor, facts: ImageFacts) -> None:
        self._call_soon(self._call.finish, self._index, latents, facts, time.monotonic())

    def failed(self, error: CatClusterError) -> None:
        self._call_soon(self._call.fail, self._index, error)

    def _call_soon(self, what: Callable[..., None], *values: Any) -> None:
        _call_soon(self._loop, what, *values)


class _Awaited:
    """A listener for one image of the service's own: a future of its latents."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.latents: asyncio.Future[Tensor] = self._loop.create_future()

    def stepped(self, step: int, steps: int, denoised: Tensor | None) -> None:
        """Steps are not reported."""

    def denoised(self, latents: Tensor, facts: ImageFacts) -> None:
        _call_soon(self._loop, self._settle, latents, None)

    def failed(self, error: CatClusterError) -> None:
        _call_soon(self._loop, self._settle, None, error)

    def _settle(self, latents: Tensor | None, error: CatClusterError | None) -> None:
        if self.latents.done():
            return
        if error is not None:
            self.latents.set_exception(error)
        elif latents is not None:
            self.latents.set_result(latents)


def _call_soon(loop: asyncio.AbstractEventLoop, what: Callable[..., None], *values: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed, and with it the call
        loop.call_soon_threadsafe(what, *values)


def _expected(error: Exception, what: str) -> CatClusterError:
    """Return an error as one of ours; what is not ours is a fault, and is logged whole.

    Ours is returned as a copy, without the frames of its traceback: they hold the call, whose queue is to hold it.
    """
    if isinstance(error, CatClusterError):
        return copy.copy(error)
    logger.error("an image could not be %s", what, exc_info=error)
    return ServingError(f"the image could not be {what} ({type(error).__name__}): {error}")


async def generate_in_spare_rows(parts: EngineParts, plan: ImagePlan) -> NDArray[np.uint8]:
    """Generate the first image of a plan in rows that no user needs; uint8 [H, W, 3]."""
    listener = _Awaited()
    image = await prepare_image(parts, plan, 0, listener, probe=True)
    try:
        parts.engine.submit(image)
        latents = await listener.latents
    finally:
        image.cancel()
    return image_array(await asyncio.wrap_future(parts.codec.decode(latents)))


async def prepare_image(
    parts: EngineParts,
    plan: ImagePlan,
    index: int,
    listener: Any,
    *,
    probe: bool = False,
    moments: asyncio.Future[Tensor] | None = None,
    span: Span = NO_SPAN,
) -> EngineImage:
    """Encode the texts and lease the adapters' slots at once, and return the image ready for the engine.

    moments: those of the plan's source, on their way.
    """
    call, deadline = plan.call, plan.deadline
    # Begun while the leases are awaited, unless an adapter that comes with them changes texts.
    texts = [] if any(manifest.text_layers for manifest in plan.manifests) else _begin_texts(parts.codec, plan, span)
    leases: tuple[Lease, ...] = ()
    try:
        async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
            leases = await _leased(parts.cache, plan, span)
            texts = texts or _begin_texts(parts.codec, plan, span, leases)
            encoded = await asyncio.gather(*texts)
            # Shielded: other images of the call wait for them too, and one that is cancelled leaves them to these.
            encoded_source = None if moments is None else await asyncio.shield(moments)
        seed, source = call.seed + index, plan.source
        if source is None or encoded_source is None:
            start = start_from_noise(parts.base, seed, plan.table, plan.size)
        else:
            start = start_from_image(parts.base, encoded_source, source.mask, source.strength, seed, plan.table)
        rows = ImageRows(
            texts=encoded,
            table=plan.table,
            guidance=call.guidance if plan.guided else 1.0,
            latents=start.latents,
            noise=start.noise,
            kept=start.kept,
            adapters=tuple(
                RowAdapter(lease.flat, manifest.rank, member.strength)
                for lease, manifest, member in zip(leases, plan.manifests, call.adapters, strict=True)
            ),
        )
    except BaseException as error:
        for text in texts:
            text.cancel()
        for lease in leases:
            lease.release()
        if isinstance(error, TimeoutError):
            raise DeadlineError("the deadline passed before the image could begin: try again in a moment") from None
        raise
    return EngineImage(
        rows=rows,
        size=plan.size,
        listener=listener,
        leases=leases,
        adapters=tuple(manifest.name for manifest in plan.manifests),
        deadline=deadline,
        probe=probe,
        notify_steps=preview_steps(call.previews, len(plan.table)),
        notify_all=call.progress,
    )


def _begin_texts(codec: Codec, plan: ImagePlan, span: Span, leases: Sequence[Lease] = ()) -> list[asyncio.Future[Text]]:
    """Begin to encode a plan's prompts, through the leased adapters that change text encoders."""
    prompts = plan.call.prompts if plan.guided else plan.call.prompts[:1]
    changes = [
        TextChange(key_of(lease.manifest), RowAdapter(lease.text, lease.manifest.rank, member.strength))
        for lease, member in zip(leases, plan.call.adapters if leases else (), strict=True)
        if lease.text is not None
    ]
    return [span.until("encode_text", asyncio.wrap_future(codec.encode(prompt, changes))) for prompt in prompts]


async def _leased(cache: AdapterCache, plan: ImagePlan, span: Span) -> tuple[Lease, ...]:
    if not plan.manifests:
        return ()
    with span.child("load_adapter", {"cat.model": plan.model}) as loading:
        leases = await cache.lease(plan.manifests)
        loading.set({"cat.tiers": [lease.tier for lease in leases]})
        return leases


def preview_steps(previews: int, steps: int) -> frozenset[int]:
    """Return the steps after which a preview is sent: `previews` of them, evenly spread before the last one."""
    count = min(previews, steps - 1)
    return frozenset(round((n + 1) * steps / (count + 1)) for n in range(count))
