"""Images for the engine and its rows, and what `generate` makes of each of them alone: the oracle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor

from cat_cluster.lora.bank import LoraBank, adapted_layers
from cat_cluster.lora.formats import AdapterWeights, LoraLayer
from cat_cluster.lora.row_bank import AdapterLayout, RowAdapter
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.conditioning import Text
from cat_cluster.models.edit import edit_table
from cat_cluster.models.generate import ImageRow, generate
from cat_cluster.models.image_start import start_from_image, start_from_noise
from cat_cluster.models.prompt_weights import Prompt
from cat_cluster.models.prompts import encode_prompts
from cat_cluster.models.samplers import sampler_table
from cat_cluster.spec.choices import SamplerName
from serve.denoise.rows import ImageRows

# Of stock diffusers, by the name of the sampler that is to do the same, and what its user sets.
_STOCK: Mapping[SamplerName, tuple[Any, Mapping[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {}),
    "euler_karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2m_sde_karras": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "lcm": (LCMScheduler, {}),
}

TARGETS = "attention_ff"
RANK = 3
TOLERANCE = 3e-5  # of images in [0, 1]: the number of rows in a call changes the last bits


def stock_scheduler(name: SamplerName, config: Mapping[str, Any]) -> Any:
    """The scheduler of stock diffusers that a user swaps in for a base's own, made of that one's config."""
    kind, options = _STOCK[name]
    return kind.from_config(config, **options)


def stock_pipeline(folder: Path) -> StableDiffusionPipeline:
    """A stock pipeline of a base's folder that draws with DDIM, as this package does when nothing else is asked."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = stock_scheduler("ddim", pipeline.scheduler.config)
    return pipeline


def stock_image(pipeline: Any, row: ImageRow) -> Tensor:
    """What a stock user gets of a pipeline, with the adapter that it has loaded and another scheduler [3, H, W]."""
    loaded = pipeline.scheduler
    pipeline.scheduler = stock_scheduler(row.sampler, loaded.config)
    try:
        images: Tensor = pipeline(
            row.prompt,
            negative_prompt=row.negative_prompt or None,
            num_inference_steps=row.steps,
            guidance_scale=row.guidance,
            generator=torch.Generator("cpu").manual_seed(row.seed),
            output_type="pt",
        ).images
    finally:
        pipeline.scheduler = loaded  # options of one sampler must not reach the next
    return images[0]


def random_adapter(base: BaseModel, seed: int, rank: int = RANK) -> AdapterWeights:
    """An adapter strong enough to be seen in the image."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in adapted_layers(base.unet, TARGETS):
        linear = base.unet.get_submodule(name)
        down = torch.randn(rank, linear.in_features, generator=generator) * linear.in_features**-0.5
        layers[name] = LoraLayer(down, 0.3 * torch.randn(linear.out_features, rank, generator=generator))
    return AdapterWeights(layers)


@dataclass(frozen=True)
class OracleImage:
    """An image: adapter, by its key in the oracle, and all that `generate` and the engine are told.

    others: further adapters of the same image, each with its strength.
    """

    row: ImageRow
    adapter: int | None = None
    strength: float = 1.0
    others: tuple[tuple[int, float], ...] = ()

    @property
    def stack(self) -> tuple[tuple[int, float], ...]:
        """Every adapter of the image with its strength."""
        return () if self.adapter is None else ((self.adapter, self.strength), *self.others)


@dataclass
class ImageOracle:
    """A bare base model with adapters, which draws images one at a time, and remembers them."""

    base: BaseModel
    adapters: Mapping[int, AdapterWeights]
    layout: AdapterLayout = field(init=False)
    flats: dict[int, Tensor] = field(init=False)
    _images: dict[OracleImage, Tensor] = field(default_factory=dict)
    _texts: dict[Prompt, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layout = AdapterLayout(self.base.unet, adapted_layers(self.base.unet, TARGETS), RANK)
        self.flats = {key: self.layout.pack(weights) for key, weights in self.adapters.items()}

    def image(self, wanted: OracleImage) -> Tensor:
        """The image [3, H, W] by `generate`; nothing may be attached to the base.

        Of several adapters their changes are added to the base's own weights, one by one.
        """
        if wanted not in self._images and wanted.others:
            with added(self.base, [(self.adapters[key], strength) for key, strength in wanted.stack]):
                self._images[wanted] = generate(self.base, None, [wanted.row])[0]
        elif wanted not in self._images:
            bank = LoraBank.attach(self.base.unet, layers=adapted_layers(self.base.unet, TARGETS))
            row = wanted.row
            if wanted.adapter is not None:
                bank.load(1, self.adapters[wanted.adapter], strength=wanted.strength)
                row = ImageRow(**{**vars(row), "slot": 1})
            try:
                self._images[wanted] = generate(self.base, bank, [row])[0]
            finally:
                bank.detach()
        return self._images[wanted]

    def rows(
        self, wanted: OracleImage, size: tuple[int, int] | None = None, flats: Sequence[Tensor] | None = None
    ) -> ImageRows:
        """The same image as rows that can join; flats: where its adapters are read, else the oracle's own vectors."""
        flats = [self.flats[key] for key, _ in wanted.stack] if flats is None else flats
        row = wanted.row
        table = sampler_table(row.sampler, self.base.schedule, row.steps)
        if row.source is None:
            start = start_from_noise(self.base, row.seed, table, size)
        else:
            source = row.source
            table = edit_table(table, row.steps, source.strength)
            moments = self.base.encode_moments(source.pixels.unsqueeze(0))[0]
            start = start_from_image(self.base, moments, source.mask, source.strength, row.seed, table)
        return ImageRows(
            texts=tuple(self._text(prompt) for prompt in row.prompts),
            table=table,
            guidance=row.guidance if row.guided else 1.0,
            latents=start.latents,
            noise=start.noise,
            kept=start.kept,
            adapters=tuple(
                RowAdapter(flat, self.adapters[key].rank, strength)
                for flat, (key, strength) in zip(flats, wanted.stack, strict=True)
            ),
        )

    def decode(self, latents: Tensor) -> Tensor:
        """The image [3, H, W] of final latents."""
        return self.base.decode(latents.unsqueeze(0))[0].cpu()

    def _text(self, prompt: Prompt) -> Text:
        if prompt not in self._texts:
            (self._texts[prompt],) = encode_prompts(self.base, self.base.text_limit, [prompt])
        return self._texts[prompt]


@contextmanager
def added(base: BaseModel, adapters: Sequence[tuple[AdapterWeights, float]]) -> Iterator[None]:
    """The base with W + strength * B A in place of W, adapter by adapter and layer by layer; W again at the end."""
    before = {}
    for weights, strength in adapters:
        for name, layer in weights.layers.items():
            weight = base.unet.get_submodule(name).weight
            before.setdefault(name, weight.detach().clone())
            with torch.no_grad():
                weight += (strength * layer.up @ layer.down).view_as(weight)
    try:
        yield
    finally:
        for name, weight in before.items():
            with torch.no_grad():
                base.unet.get_submodule(name).weight.copy_(weight)


def assert_same_image(ours: Tensor, theirs: Tensor, why: object = None) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE, msg=lambda text: f"{why}: {text}")
