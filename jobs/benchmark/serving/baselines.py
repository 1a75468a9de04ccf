"""What one would do without this project: stock pipelines one image at a time, and a PEFT loop over mixed batches.

Written kindly: adapters lie in memory, U-Nets are channels-last as the engine's is, nothing is made into a PNG.
"""

from __future__ import annotations

import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoPipelineForText2Image, DDIMScheduler
from diffusers.utils import logging as diffusers_logging
from peft import PeftModel
from torch import Tensor

from cat_cluster.data.latents import TextCache
from cat_cluster.lora.formats import AdapterWeights, write_adapter
from cat_cluster.models.base_model import compiled_blocks
from cat_cluster.models.base_names import base_folder
from cat_cluster.models.conditioning import Conditioning, Sizes
from cat_cluster.models.generate import image_array
from cat_cluster.models.image_start import start_from_noise
from cat_cluster.models.samplers import SamplerTable, advance_rows, gather_coefficients, sampler_table
from jobs.benchmark.serving.workbench import GUIDANCE, Pixels, Request, Workbench
from jobs.benchmark.timing import RANK, synchronise


def state(weights: AdapterWeights) -> Iterator[tuple[str, Tensor]]:
    """Yield an adapter's factors under the names that diffusers reads."""
    for layer, factors in weights.layers.items():
        yield f"{layer}.lora_A.weight", factors.down
        yield f"{layer}.lora_B.weight", factors.up


class Pipeline(ABC):
    """A stock pipeline of the base's family that draws one request after the other, each with its adapter or stack."""

    def __init__(self, bench: Workbench) -> None:
        diffusers_logging.set_verbosity_error()
        self._device, self._dtype = bench.device, bench.dtype
        self._pipeline = AutoPipelineForText2Image.from_pretrained(
            base_folder(bench.base), torch_dtype=bench.dtype, local_files_only=True
        ).to(bench.device)
        self._pipeline.safety_checker = None
        self._pipeline.scheduler = DDIMScheduler.from_config(self._pipeline.scheduler.config)
        self._pipeline.unet.to(memory_format=torch.channels_last)
        self._pipeline.set_progress_bar_config(disable=True)
        self._states = {
            # Copies: a hot swap writes into the tensors that were loaded first.
            name: {f"unet.{key}": value.to(bench.device, bench.dtype, copy=True) for key, value in state(weights)}
            for name, weights in bench.adapters.items()
        }
        self._cleanup = ExitStack()
        self._changes: list[float] = []

    def __enter__(self) -> Pipeline:
        self._pipeline.unet.to(self._dtype)  # adapters are loaded in single precision, which would slow every layer
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def changes(self) -> list[float]:
        """Return the seconds that putting each request's adapter in (and taking it out) took; and forget them."""
        taken, self._changes = self._changes, []
        return taken

    def draw(self, requests: Sequence[Request]) -> list[Pixels]:
        """Draw the images one by one."""
        return [image_array(self._one(request))[0] for request in requests]

    def _one(self, request: Request) -> Tensor:
        self._changes.append(self._timed(lambda: self._put_in(request.adapter)))
        images: Tensor = self._pipeline(
            request.prompt,
            num_inference_steps=request.steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type="pt",
        ).images
        self._changes[-1] += self._timed(self._take_out)
        return images

    def _timed(self, work: Callable[[], None]) -> float:
        started = time.perf_counter()
        work()
        if self._device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - started

    @abstractmethod
    def _put_in(self, adapter: str) -> None:
        """Make the pipeline draw with an adapter."""

    def _take_out(self) -> None:  # noqa: B027 - the next request simply replaces the adapter, where nothing is done
        """Leave the pipeline as it was before the request."""


class HotSwap(Pipeline):
    """One adapter in the U-Net, replaced in place by `load_lora_weights(hotswap=True)`."""

    def __init__(self, bench: Workbench) -> None:
        super().__init__(bench)
        if bench.compile:  # what hot-swapping is for
            self._pipeline.enable_lora_hotswap(target_rank=RANK)
        self._pipeline.load_lora_weights(next(iter(self._states.values())), adapter_name="current")
        if bench.compile:
            self._cleanup.enter_context(compiled_blocks(self._pipeline.unet))

    def _put_in(self, adapter: str) -> None:
        self._pipeline.load_lora_weights(self._states[adapter], adapter_name="current", hotswap=True)


class _AllLoaded(Pipeline):
    """Every adapter is in the U-Net beforehand."""

    def __init__(self, bench: Workbench) -> None:
        super().__init__(bench)
        for name, state in self._states.items():
            self._pipeline.load_lora_weights(state, adapter_name=name)


class SetAdapters(_AllLoaded):
    """All adapters loaded, those of the request made active by `set_adapters`."""

    def _put_in(self, adapter: str) -> None:
        self._pipeline.set_adapters(adapter.split("+"))


class Fuse(_AllLoaded):
    """All adapters loaded, those of the request fused into the weights and taken out again."""

    def _put_in(self, adapter: str) -> None:
        names = adapter.split("+")
        self._pipeline.set_adapters(names)
        self._pipeline.fuse_lora(adapter_names=names)

    def _take_out(self) -> None:
        self._pipeline.unfuse_lora()


PIPELINES: dict[str, type[Pipeline]] = {
    "hot swap": HotSwap,
    "set_adapters": SetAdapters,
    "fuse and unfuse": Fuse,
}


class PeftLoop:
    """Mixed batches by PEFT's `adapter_names`, one name a row, in a loop that samples all rows at once.

    The loop around it is this project's own and as fast as the engine's: vectorised samplers, cached schedules.
    """

    def __init__(self, bench: Workbench, adapters: int) -> None:
        self._base = bench.load()
        names, given = bench.ids[:adapters], {"autocast_adapter_dtype": False}
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                write_adapter(bench.adapters[name], Path(folder, name), "peft", adapter_id=name, metadata={})
            first = Path(folder, names[0])
            unet = PeftModel.from_pretrained(self._base.unet, first, adapter_name=names[0], **given)
            for name in names[1:]:
                unet.load_adapter(Path(folder, name), adapter_name=name, **given)
        self._unet = unet.to(self._base.device, self._base.dtype).eval()

    def __enter__(self) -> PeftLoop:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held open."""

    def call(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, names: Sequence[str]) -> Tensor:
        """One U-Net call [B, C, H, W], row b with adapter names[b]."""
        output: Tensor = self._unet(
            latents, timesteps, **conditioning.arguments(), return_dict=False, adapter_names=list(names)
        )[0]
        return output

    def in_parts(self, requests: Sequence[Request], at_a_time: int) -> list[Pixels]:
        """Draw images, so many together."""
        parts = [requests[at : at + at_a_time] for at in range(0, len(requests), at_a_time)]
        return [image for part in parts for image in self.draw(part)]

    def arrive(self, requests: Sequence[Request], times: Sequence[float], most: int, shrink: bool) -> list[float]:
        """Draw static batches of what has arrived by its time; return when each is done, seconds from now."""
        return static_batches(lambda batch: self.draw(batch, shrink=shrink), requests, times, most)

    @torch.inference_mode()
    def draw(self, requests: Sequence[Request], *, shrink: bool = False) -> list[Pixels]:
        """Draw images together until the longest is done; shrink: those that are done leave the calls before."""
        base, device = self._base, self._base.device
        texts = TextCache(base)([*(request.prompt for request in requests), ""])
        sizes = [Sizes.drawn(base.resolution, base.resolution)] * len(texts)
        conditioning = Conditioning.of(texts, sizes)
        tables = [sampler_table("ddim", base.schedule, request.steps) for request in requests]
        starts = [start_from_noise(base, a.seed, table) for a, table in zip(requests, tables, strict=True)]
        latents = torch.stack([start.latents for start in starts])
        previous, rows = torch.zeros_like(latents), _Rows.of(requests, conditioning, range(len(requests)))
        for step in range(max(len(table) for table in tables)):
            going = [n for n, table in enumerate(tables) if step < len(table)]
            if shrink and len(going) < len(rows.chosen):
                rows = _Rows.of(requests, conditioning, going)
            chosen = rows.chosen
            coefficients = gather_coefficients(
                [tables[n] for n in chosen], [_at(tables[n], step) for n in chosen], device
            )
            scaled = (coefficients.input_scale.view(-1, 1, 1, 1) * latents[chosen]).to(base.dtype)
            times = torch.cat([coefficients.timesteps] * 2)
            output = self.call(torch.cat([scaled, scaled]), times, rows.conditioning, rows.names).float()
            conditional, plain = output.chunk(2)
            predicted = plain + GUIDANCE * (conditional - plain)
            following, denoised = advance_rows(coefficients, latents[chosen], predicted, previous[chosen])
            where = [place for place, n in enumerate(chosen) if n in set(going)]
            latents[going], previous[going] = following[where], denoised[where]
        images = list(image_array(base.decode(latents)))
        synchronise(base)
        return images


class _Rows:
    """The rows of a call: each chosen image's prompt, then each one's empty prompt."""

    def __init__(self, chosen: list[int], conditioning: Conditioning, names: list[str]) -> None:
        self.chosen, self.conditioning, self.names = chosen, conditioning, names

    @classmethod
    def of(cls, requests: Sequence[Request], conditioning: Conditioning, chosen: Sequence[int]) -> _Rows:
        picked, empty = list(chosen), len(conditioning) - 1
        return cls(picked, conditioning[picked + [empty] * len(picked)], [requests[n].adapter for n in picked] * 2)


def _at(table: SamplerTable, step: int) -> int:
    return min(step, len(table) - 1)


def static_batches(
    draw: Callable[[Sequence[Request]], object], requests: Sequence[Request], times: Sequence[float], most: int
) -> list[float]:
    """Draw what has arrived, up to `most` images, until all of it is done, and so on; return when each was done."""
    start, done = time.monotonic(), list[float]()
    while len(done) < len(requests):
        now = time.monotonic() - start
        arrived = sum(at <= now for at in times)
        if arrived == len(done):
            time.sleep(max(0.0, times[arrived] - now))
            continue
        batch = requests[len(done) : min(arrived, len(done) + most)]
        draw(batch)
        done += [time.monotonic() - start] * len(batch)
    return done


def difference(ours: Sequence[Pixels], theirs: Sequence[Pixels]) -> dict[str, float]:
    """Return the largest and the mean difference of pixels, in levels of 255, over pairs of images."""
    gaps = np.abs(np.stack(ours).astype(np.int16) - np.stack(theirs).astype(np.int16))
    return {"max": float(gaps.max()), "mean": float(gaps.mean())}
