"""The codec: prompts to texts, images to latents and back, files, and cheap previews, off the device thread.

One thread processes what waits in batches: all prompts, each through its own adapters, in one call of the text encoder,
all finished latents, or images to edit, of one size in one call of the VAE, all images in one call of the safety
checker. Files are made by a few more threads, since compression holds no lock; one looks at prompts.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from cat_cluster.data.prompt_syntax import syntax_notes
from cat_cluster.data.text_length import cut_notes
from cat_cluster.errors import EngineStoppedError, NotFiniteError, ServingError
from cat_cluster.lora.row_bank import RowAdapter
from cat_cluster.lora.text_bank import TextBank
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.conditioning import Text
from cat_cluster.models.prompt_weights import Prompt
from cat_cluster.models.prompts import encode_prompts
from cat_cluster.models.text_limit import TextLimit, first_words
from serve.calls import FileFormat, ImageCall
from serve.denoise.image_file import image_file
from serve.denoise.safety import SafetyChecker
from serve.denoise.signing import ImageSigner

CHUNKS_KEPT = 1024  # of prompts, in all, whose embeddings are remembered
LONGEST_KEPT = 4096  # characters of one that is
AT_ONCE = 8  # prompts, latents or images in one call
# Of the metadata, in a signed manifest: no prompt, which may be private.
TOLD_OF_MODEL = ("model", "adapter_sha256", "denoising_strength", "masked")
PREVIEW_SIDE = 192  # pixels; a preview is scaled up for eyes, not for detail

A = TypeVar("A")
R = TypeVar("R", Tensor, Text)  # both say whether their numbers are finite
_ChangeKey: TypeAlias = tuple[tuple[str, ...], float]
_TextKey: TypeAlias = tuple[Prompt, tuple[_ChangeKey, ...]]


@dataclass(frozen=True, eq=False)
class TextChange:
    """What an adapter does to text encoders, and a name that no other weights have."""

    name: tuple[str, ...]
    adapter: RowAdapter

    @property
    def key(self) -> _ChangeKey:
        """What texts are remembered by, without the vector."""
        return self.name, self.adapter.strength


@dataclass(frozen=True, eq=False)
class _Reading:
    """A prompt, and the changes with which it is encoded."""

    prompt: Prompt
    changes: tuple[TextChange, ...] = ()

    @property
    def of_stack(self) -> tuple[_ChangeKey, ...]:
        """What names its changes."""
        return tuple(change.key for change in self.changes)


@dataclass(frozen=True, eq=False)
class _Job(Generic[A, R]):
    value: A
    future: Future[R]


class Codec:
    """Encoding, decoding and files off the device thread; close it after use, and it raises EngineStoppedError."""

    def __init__(
        self,
        base: BaseModel,
        threads: int = 1,
        signer: ImageSigner | None = None,
        checker: SafetyChecker | None = None,
        text_bank: TextBank | None = None,
    ) -> None:
        """text_bank: through which adapters change texts; None where none does."""
        self._text_bank = text_bank
        self._base, self._threads, self._signer, self._checker = base, threads, signer, checker
        self._texts: OrderedDict[_TextKey, Text] = OrderedDict()  # those used last at its end
        self._tokens_kept = 0
        self._prompts: list[_Job[_Reading, Text]] = []
        self._limit = TextLimit(base.tokenizer)  # of the thread that encodes; that of the notes has the base's own
        self._latents: list[_Job[Tensor, Tensor]] = []
        self._sources: list[_Job[Tensor, Tensor]] = []
        self._unchecked: list[_Job[Tensor, Tensor]] = []
        self._lock = threading.Lock()
        self._closed = False
        self._stream: torch.cuda.Stream | None = None
        self._torch = ThreadPoolExecutor(1, "cat-codec", initializer=self._start)
        self._files = ThreadPoolExecutor(2, "cat-files")
        self._notes = ThreadPoolExecutor(1, "cat-notes")  # one: a TextLimit is for one thread at a time
        self._to_rgb: Tensor | None = None

    @property
    def signs(self) -> bool:
        """Whether files are signed."""
        return self._signer is not None

    def close(self) -> None:
        """Finish what has started; what waits fails with EngineStoppedError."""
        with self._lock:
            self._closed = True
            waits: tuple[list[_Job[Any, Any]], ...] = (self._prompts, self._latents, self._sources, self._unchecked)
            jobs = [job for waiting in waits for job in waiting]
            for waiting in waits:
                waiting.clear()
        for job in jobs:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(_stopping())
        self._torch.shutdown()
        self._files.shutdown()
        self._notes.shutdown()

    def encode(self, prompt: Prompt, changes: Sequence[TextChange] = ()) -> Future[Text]:
        """Return the text of a prompt, as the text encoders with these changes make it, on the base's device."""
        if prompt.weighting == "none":  # the rest only costs time; behind a weight its bracket may close
            prompt = replace(prompt, text=first_words(prompt.text, prompt.chunks * self._limit.tokens))
        reading = _Reading(prompt, tuple(changes))
        with self._lock:
            known = self._texts.get(key := (prompt, reading.of_stack))
            if known is None:
                return self._put(self._prompts, reading, self._encode_waiting)
            self._texts.move_to_end(key)
        future = Future[Text]()
        future.set_result(known)
        return future

    def decode(self, latents: Tensor) -> Future[Tensor]:
        """Return the image [3, H, W] in [0, 1] of latents [C, h, w], on the CPU; NotFiniteError when it is not finite.

        The latents must have been computed, not only enqueued on a GPU's stream.
        """
        with self._lock:
            return self._put(self._latents, latents, self._decode_waiting)

    def moments(self, pixels: Tensor) -> Future[Tensor]:
        """Return the VAE's moments [2C, h, w] of pixels [3, H, W] in [-1, 1], on the base's device."""
        with self._lock:
            return self._put(self._sources, pixels, self._encode_sources)

    def check(self, image: Tensor) -> Future[Tensor]:
        """Return the safety checker's scores [labels] of an image [3, H, W] in [0, 1]; there must be a checker."""
        with self._lock:
            return self._put(self._unchecked, image, self._check_waiting)

    def notes(self, call: ImageCall, tokens: Sequence[str]) -> Future[list[str]]:
        """Return what people should know of how a call's prompts are read; tokens: those of the adapter that draws.

        Fails with SpecError, which names the field, for a weight that cannot be.
        """
        with self._lock:
            self._check_open()
            return self._notes.submit(self._read, call, tokens)

    def file(
        self, image: Tensor, metadata: Mapping[str, str], file: FileFormat, *, edited: bool = False
    ) -> Future[bytes]:
        """Return an image [3, H, W] in [0, 1] as a file that carries its metadata, signed where there is a signer.

        edited: it was made from another image, and says so.
        """
        with self._lock:
            self._check_open()
            return self._files.submit(self._file, image, metadata, file, edited)

    def preview(self, denoised: Tensor, file: FileFormat, *, edited: bool = False) -> Future[bytes]:
        """Return a small picture, a file, of latents [C, h, w] by a linear map of their channels to colours.

        It is not signed: it is no image of the model yet, and one call may have many.
        """
        with self._lock:
            self._check_open()
            return self._torch.submit(self._preview, denoised, file, edited)

    def _put(self, jobs: list[_Job[A, R]], value: A, compute: Callable[[], None]) -> Future[R]:
        self._check_open()
        future = Future[R]()
        jobs.append(_Job(value, future))
        self._torch.submit(compute)
        return future

    def _check_open(self) -> None:
        if self._closed:
            raise _stopping()

    def _start(self) -> None:
        own_threads(self._threads)

    def _encode_waiting(self) -> None:
        _finish(self._take(self._prompts), self._encode)

    def _encode(self, jobs: list[_Job[_Reading, Text]]) -> list[Text]:
        readings = {(job.value.prompt, job.value.of_stack): job.value for job in jobs}
        stacks = {reading.of_stack: [change.adapter for change in reading.changes] for reading in readings.values()}
        places = [list(stacks).index(stack) for _, stack in readings]

        def bind(owners: Sequence[int]) -> AbstractContextManager[None]:
            bank = self._text_bank
            return nullcontext() if bank is None else bank.rows(list(stacks.values()), [places[n] for n in owners])

        with torch.no_grad(), self._own_stream():
            encoded = encode_prompts(self._base, self._limit, [prompt for prompt, _ in readings], bind)
        texts = dict(zip(readings, encoded, strict=True))
        with self._lock:
            for key, text in texts.items():
                if len(key[0].text) <= LONGEST_KEPT and key not in self._texts:
                    self._texts[key] = text
                    self._tokens_kept += len(text)
            while self._tokens_kept > CHUNKS_KEPT * self._limit.tokens:
                self._tokens_kept -= len(self._texts.popitem(last=False)[1])
        return [texts[job.value.prompt, job.value.of_stack] for job in jobs]

    def _decode_waiting(self) -> None:
        _finish(self._take(self._latents, _shape), self._decode)

    def _decode(self, jobs: list[_Job[Tensor, Tensor]]) -> list[Tensor]:
        with self._own_stream():
            return list(self._base.decode(torch.stack([job.value for job in jobs])).cpu())

    def _encode_sources(self) -> None:
        _finish(self._take(self._sources, _shape), self._encode_images)

    def _encode_images(self, jobs: list[_Job[Tensor, Tensor]]) -> list[Tensor]:
        with self._own_stream():
            # Copies, as of texts.
            return [one.clone() for one in self._base.encode_moments(torch.stack([job.value for job in jobs]))]

    def _take(self, waiting: list[_Job[A, R]], kind: Callable[[A], object] = lambda _: None) -> list[_Job[A, R]]:
        """Take the first jobs of one kind from those that wait."""
        with self._lock:
            wanted = kind(waiting[0].value) if waiting else None
            jobs = [job for job in waiting if kind(job.value) == wanted][:AT_ONCE]
            waiting[:] = [job for job in waiting if job not in jobs]
        return jobs

    def _check_waiting(self) -> None:
        _finish(self._take(self._unchecked), self._scores)

    def _scores(self, jobs: list[_Job[Tensor, Tensor]]) -> list[Tensor]:
        assert self._checker is not None  # whoever asks has seen it
        with self._own_stream():
            scores = self._checker.scores([job.value for job in jobs])
        if not bool(scores.isfinite().all()):
            raise ServingError("the safety checker's scores are not finite")
        return list(scores)

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """Use a stream beside the engine's on a GPU, and wait for it at the end."""
        if self._base.device.type != "cuda":
            yield
            return
        if self._stream is None:  # one for all calls: the allocator keeps memory for each stream
            self._stream = torch.cuda.Stream(self._base.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def _file(self, image: Tensor, metadata: Mapping[str, str], file: FileFormat, edited: bool) -> bytes:
        data = image_file(image, metadata, file, edited=edited)
        if self._signer is None:
            return data
        model = {key: metadata[key] for key in TOLD_OF_MODEL if key in metadata}
        model |= {"base": self._base.name, "base_fingerprint": self._base.fingerprint}
        return self._signer.sign(data, file.media_type, model, edited=edited)

    def _read(self, call: ImageCall, tokens: Sequence[str]) -> list[str]:
        prompt, negative = call.prompts
        cuts = cut_notes(self._base.text_limit, tokens, prompt=prompt, negative_prompt=negative)
        return [*cuts, *syntax_notes(call.prompt, call.negative_prompt, call.weighting)]

    @torch.inference_mode()
    def _preview(self, denoised: Tensor, file: FileFormat, edited: bool) -> bytes:
        if self._to_rgb is None:
            self._to_rgb = colour_map(self._base)
        channels = torch.cat([denoised.float(), torch.ones_like(denoised[:1], dtype=torch.float32)])
        picture = torch.einsum("chw,cr->rhw", channels.cpu(), self._to_rgb).clamp(0.0, 1.0)
        scale = max(1, PREVIEW_SIDE // max(picture.shape[1:]))
        larger = functional.interpolate(picture[None], scale_factor=float(scale), mode="bicubic").clamp(0.0, 1.0)
        return image_file(larger[0], {}, file, edited=edited)


def _shape(tensor: Tensor) -> torch.Size:
    return tensor.shape


def _finish(jobs: list[_Job[A, R]], compute: Callable[[list[_Job[A, R]]], list[R]]) -> None:
    """Give each job that is still wanted its result or its error."""
    _settle([job for job in jobs if job.future.set_running_or_notify_cancel()], compute)


def _settle(jobs: list[_Job[A, R]], compute: Callable[[list[_Job[A, R]]], list[R]]) -> None:
    if not jobs:
        return
    try:
        results = compute(jobs)
    except Exception as error:
        if len(jobs) == 1:
            jobs[0].future.set_exception(error)
        else:  # the error of one, or the memory that all take together, must not end the others
            for job in jobs:
                _settle([job], compute)
        return
    for job, result in zip(jobs, results, strict=True):
        if bool(result.isfinite().all()):
            job.future.set_result(result)
        else:
            job.future.set_exception(
                NotFiniteError("the image is not finite: lower the strength or the guidance, or use another adapter")
            )


def own_threads(count: int) -> None:
    """Let torch use `count` CPU threads for what the calling thread does."""
    # A thread's first question makes it take over what any thread has set last: that must be behind it.
    torch.get_num_threads()
    torch.set_num_threads(count)


def _stopping() -> EngineStoppedError:
    return EngineStoppedError("the engine is stopping: try again, another replica will take the request")


@torch.inference_mode()
def colour_map(base: BaseModel, images: int = 24) -> Tensor:
    """Return the linear map [C + 1, 3] from latent channels (and 1) to colours in [0, 1] that fits the base's VAE best.

    Least squares over the latents of smooth random pictures: what a VAE keeps of a coarse colour is nearly linear.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    side = min(base.resolution, 128)
    coarse = torch.rand((images, 3, 4, 4), generator=generator)
    pictures = functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0.0, 1.0)
    latents = base.encode_moments(pictures * 2.0 - 1.0).chunk(2, dim=1)[0].float().cpu()
    latents = latents * float(base.vae.config.scaling_factor)
    colours = functional.interpolate(pictures, size=latents.shape[-2:], mode="area")
    inputs = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1).movedim(1, -1).flatten(0, -2)
    found: Tensor = torch.linalg.lstsq(inputs, colours.movedim(1, -1).flatten(0, -2)).solution
    return found
