"""A running call: its images from text and adapters to the engine's rows, and from latents to files."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cat_cluster import telemetry
from cat_cluster.errors import (
    CancelledRequestError,
    CatClusterError,
    DeadlineError,
    EngineStoppedError,
    ServingError,
    SpecError,
)
from cat_cluster.lora.row_bank import RowAdapter
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.generate import image_array, initial_latents
from cat_cluster.models.samplers import SamplerTable, sampler_table
from cat_cluster.registry import Manifest
from cat_cluster.registry.manifest import WEIGHTS
from cat_cluster.registry.stacks import stack_name
from cat_cluster.telemetry import Metrics
from serve.adapters.cache import AdapterCache, Lease, Resolved
from serve.calls import Event, Failed, Finished, ImageCall, Preview, Progress, Refused, Verdict
from serve.denoise.codec import Codec
from serve.denoise.engine import DenoisingEngine
from serve.denoise.image import EngineImage, ImageFacts, Size
from serve.denoise.image_file import fitting_prompts, image_metadata
from serve.denoise.rows import ImageRows
from serve.denoise.safety import SafetyChecker, refusal, safety_metadata
from serve.denoise.sizes import Pixels, pixels_per_latent

logger = logging.getLogger("cat_cluster.serve")


@dataclass(frozen=True, eq=False)
class EngineParts:
    """What generating images takes: base model, engine, adapter cache, codec, the sizes served, metrics, checker."""

    base: BaseModel
    engine: DenoisingEngine
    cache: AdapterCache
    codec: Codec
    sizes: tuple[Pixels, ...]
    metrics: Metrics
    checker: SafetyChecker | None = None


@dataclass(frozen=True, eq=False)
class ImagePlan:
    """A call with all that it names found: a manifest for each adapter, sampler table, latent size (H, W), deadline.

    told: the call as its files tell of it.
    """

    call: ImageCall
    told: ImageCall
    manifests: tuple[Manifest, ...]
    note: str | None
    table: SamplerTable
    size: Size
    deadline: float | None
    drift: str
    base_name: str

    @classmethod
    def of(
        cls,
        call: ImageCall,
        parts: EngineParts,
        found: Sequence[Resolved] = (),
        deadline: float | None = None,
        drift: str = "unknown",
        notes: Sequence[str] = (),
    ) -> ImagePlan:
        """Check a call against what is served; SpecError names the field.

        found: what its adapters' references name, in their order. notes: of how its prompts are read.
        """
        width, height = call.size or parts.sizes[0]
        if (width, height) not in parts.sizes:
            offered = ", ".join(f"{w}x{h}" for w, h in parts.sizes)
            raise SpecError(f"size: {width}x{height} is not served; choose one of {offered}")
        unit = pixels_per_latent(parts.base)
        manifests = tuple(one.manifest for one in found)
        told, shortened = fitting_prompts(call, _names(manifests, parts.base.name), _digests(manifests))
        said = [*(one.note for one in found), *notes, shortened]
        return cls(
            call=call,
            told=told,
            manifests=manifests,
            note="; ".join(note for note in said if note) or None,
            table=sampler_table(call.sampler, parts.base.schedule, call.steps),
            size=(height // unit, width // unit),
            deadline=deadline,
            drift=drift,
            base_name=parts.base.name,
        )

    @property
    def guided(self) -> bool:
        """Whether each image takes a second row for classifier-free guidance."""
        return self.call.guidance > 1.0

    @property
    def model(self) -> str:
        """What serves the call: the base's name, a revision, or the revisions of a stack."""
        return stack_name(_names(self.manifests, self.base_name))

    def metadata(self, seed: int) -> dict[str, str]:
        """What an image's file says of it."""
        return image_metadata(self.told, seed, _names(self.manifests, self.base_name), _digests(self.manifests))


def _names(manifests: Sequence[Manifest], base_name: str) -> list[str]:
    return [manifest.name for manifest in manifests] or [base_name]


def _digests(manifests: Sequence[Manifest]) -> list[str]:
    return [manifest.objects[WEIGHTS].sha256 for manifest in manifests]


class RunningCall:
    """The images of one call; `pixels[i]` is image i [3, H, W] once it is Finished."""

    def __init__(self, parts: EngineParts, plan: ImagePlan) -> None:
        self._parts, self._plan = parts, plan
        self._queue = asyncio.Queue[Event | CatClusterError]()
        self._images: list[EngineImage] = []
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

    async def _start(self, index: int) -> None:
        """Bring one image to the engine's queue."""
        try:
            image = await prepare_image(self._parts, self._plan, index, _Forwarder(self, index))
            self._images.append(image)
            self._parts.engine.submit(image)
        except Exception as error:
            self.fail(_expected(error, "started"))

    def stepped(self, index: int, step: int, steps: int, denoised: Tensor | None) -> None:
        """On the event loop: the engine has made a step."""
        if self._plan.call.progress:
            self._queue.put_nowait(Progress(index, step, steps))
        if denoised is not None:
            self._tasks.append(asyncio.ensure_future(self._preview(index, step, steps, denoised)))

    def finish(self, index: int, latents: Tensor, facts: ImageFacts) -> None:
        """On the event loop: the image is denoised."""
        self._tasks.append(asyncio.ensure_future(self._finish(index, latents, facts)))

    def fail(self, error: CatClusterError) -> None:
        """On the event loop: the call ends."""
        self._count(error)
        self._queue.put_nowait(error)

    async def _preview(self, index: int, step: int, steps: int, denoised: Tensor) -> None:
        try:
            image = await asyncio.wrap_future(self._parts.codec.preview(denoised, self._plan.call.file))
        except Exception:  # the image itself may yet be done
            logger.exception("a preview could not be made")
            return
        number = sorted(preview_steps(self._plan.call.previews, steps)).index(step)
        self._queue.put_nowait(Preview(index, number, step, steps, image))

    async def _finish(self, index: int, latents: Tensor, facts: ImageFacts) -> None:
        codec, metrics, seed = self._parts.codec, self._parts.metrics, self._plan.call.seed + index
        started = time.monotonic()
        try:
            image = await asyncio.wrap_future(codec.decode(latents))
            verdict = await self._checked(image)
            if verdict is not None and self._refuses(index, seed, verdict):
                return
            metadata = self._plan.metadata(seed) | safety_metadata(verdict)
            file = await asyncio.wrap_future(codec.file(image, metadata, self._plan.call.file))
        except Exception as error:
            self.fail(_expected(error, "decoded"))
            return
        after = time.monotonic() - started
        metrics.inc(telemetry.IMAGES, outcome="done")
        for manifest in self._plan.manifests:
            metrics.inc(telemetry.ADAPTER_IMAGES, adapter=manifest.adapter_id)
        metrics.observe(telemetry.IMAGE_SECONDS, facts.wait_s + facts.denoise_s + after)
        self.pixels[index] = image
        rounded = {key: round(value, 4) for key, value in asdict(facts).items()}
        self._queue.put_nowait(Finished(index, seed, file, {**rounded, "decode_s": round(after, 4)}, verdict))

    async def _checked(self, image: Tensor) -> Verdict | None:
        """Return what the safety checker says of an image; None where there is none."""
        checker, metrics = self._parts.checker, self._parts.metrics
        if checker is None:
            return None
        started = time.monotonic()
        try:
            verdict = checker.verdict(await asyncio.wrap_future(self._parts.codec.check(image)))
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
        self._call_soon(self._call.finish, self._index, latents, facts)

    def failed(self, error: CatClusterError) -> None:
        self._call_soon(self._call.fail, error)

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
    parts: EngineParts, plan: ImagePlan, index: int, listener: Any, *, probe: bool = False
) -> EngineImage:
    """Encode the texts and lease the adapters' slots at once, and return the image ready for the engine."""
    call, deadline = plan.call, plan.deadline
    prompts = [call.prompt, call.negative_prompt] if plan.guided else [call.prompt]
    texts = [
        asyncio.wrap_future(parts.codec.encode(prompt)) for prompt in prompts
    ]  # begun, while the leases are awaited
    leases: tuple[Lease, ...] = ()
    try:
        async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
            leases = await parts.cache.lease(plan.manifests)
            encoded = torch.stack(await asyncio.gather(*texts))
        rows = ImageRows(
            texts=encoded,
            table=plan.table,
            guidance=call.guidance if plan.guided else 1.0,
            latents=initial_latents(parts.base, call.seed + index, plan.table, plan.size),
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
            raise DeadlineError("the deadline passed before the adapter was loaded: try again in a moment") from None
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


def preview_steps(previews: int, steps: int) -> frozenset[int]:
    """Return the steps after which a preview is sent: `previews` of them, evenly spread before the last one."""
    count = min(previews, steps - 1)
    return frozenset(round((n + 1) * steps / (count + 1)) for n in range(count))
