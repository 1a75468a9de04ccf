"""The frozen base model: U-Net, VAE, text encoder, tokenizer and noise schedule of a Stable Diffusion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
import torch._dynamo
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.utils import is_accelerate_available
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from cat_cluster.errors import BaseModelError
from cat_cluster.models.base_files import (
    check_family,
    family_of,
    landscape,
    read_config,
    size_unit,
    text_components,
    tokenizer_components,
    weight_files,
    zeros_without_text,
)
from cat_cluster.models.base_names import base_folder
from cat_cluster.models.fingerprint import fingerprints
from cat_cluster.models.network import Network
from cat_cluster.models.out_of_memory import memory_explained
from cat_cluster.models.schedule import NoiseSchedule
from cat_cluster.models.text_encoders import TextEncoders, TextModel
from cat_cluster.models.text_limit import TextLimit

MOST_SHAPES = 4096  # of the inputs of one kind of compiled block

GENERAL_PROMPTS_FILE = "general_prompts.txt"


@dataclass(frozen=True, eq=False)
class BaseModel:
    """The frozen parts of a Stable Diffusion 1.x, 2.x or XL, in eval mode, without gradients, on one device."""

    name: str
    folder: Path
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: TextEncoders
    schedule: NoiseSchedule
    fingerprint: str
    earlier_fingerprint: str
    device: torch.device
    dtype: torch.dtype

    @property
    def fingerprints(self) -> tuple[str, str]:
        """What adapters of this base may know it by: its digest, and that of versions before 0.2."""
        return self.fingerprint, self.earlier_fingerprint

    @property
    def network(self) -> Network:
        """U-Net and text encoders as one module, whose layers adapters change."""
        return Network(self.unet, self.text_encoders.models)

    @property
    def latent_channels(self) -> int:
        """C, the channels of a latent."""
        return int(self.vae.config.latent_channels)

    @property
    def latent_size(self) -> int:
        """H = W of the latents the base was trained on."""
        size = self.unet.config.sample_size
        return int(size if isinstance(size, int) else size[0])

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels in each direction a place of a latent stands for."""
        return 1 << (len(self.vae.config.block_out_channels) - 1)

    @property
    def resolution(self) -> int:
        """The side of the base's own images, in pixels."""
        return self.latent_size * self.pixels_per_latent

    @property
    def size_unit(self) -> int:
        """What the sides of an image must be multiples of, in pixels, for every level of the U-Net to halve them."""
        return size_unit(self.unet.config, self.vae.config)

    @property
    def landscape(self) -> tuple[int, int]:
        """Width and height of landscape images that the base draws well, in pixels."""
        is_sdxl = len(self.text_encoders.models) > 1
        return landscape(self.resolution, self.size_unit, of_equal_area=is_sdxl)

    @property
    def tokenizer(self) -> CLIPTokenizer:
        """What spells for all text encoders, but for the padding of the second."""
        return self.text_encoders.tokenizers[0]

    @cached_property
    def text_limit(self) -> TextLimit:
        """What the text encoder reads of a prompt; only for one thread at a time."""
        return TextLimit(self.tokenizer)

    def spell(self, text: str) -> list[int]:
        """Return the ids of the pieces that the tokenizer makes of a text, without the marks of start and end."""
        return cast(list[int], self.tokenizer(text, add_special_tokens=False).input_ids)

    @torch.no_grad()
    def encode_moments(self, pixels: Tensor) -> Tensor:
        """Return the VAE posterior's mean and log-variance [N, 2C, H, W] of pixels [N, 3, 8H, 8W] in [-1, 1]."""
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        return cast(Tensor, posterior.parameters)

    def sample_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Return z0 = scaling_factor * (mean + exp(logvar / 2) * noise) [N, C, H, W] of moments [N, 2C, H, W]."""
        mean, logvar = moments.chunk(2, dim=1)
        deviation = torch.exp(0.5 * logvar.clamp(-30.0, 20.0))
        return cast(Tensor, self.vae.config.scaling_factor * (mean + deviation * noise))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents [N, C, H, W] to images [N, 3, 8H, 8W] in [0, 1], float32."""
        scaled = latents.to(self.device, self.vae.dtype) / self.vae.config.scaling_factor
        images = self.vae.decode(scaled, return_dict=False)[0]
        return cast(Tensor, (images.float() * 0.5 + 0.5).clamp(0.0, 1.0))

    def general_prompts(self) -> tuple[str, ...]:
        """Return the prompts that stand for the base's general knowledge: its own file's, else the shipped ones."""
        own = self.folder / GENERAL_PROMPTS_FILE
        source = own if own.is_file() else files("cat_cluster.models") / GENERAL_PROMPTS_FILE
        lines = source.read_text(encoding="utf-8").splitlines()
        return tuple(line.strip() for line in lines if line.strip())


def load_base_model(name: str, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> BaseModel:
    """Load a base by a name that `base_folder` takes; weights of any dtype are cast to `dtype`.

    A VAE whose config says that float16 is too small for it (SDXL's) is kept in float32 there. Raises BaseModelError,
    naming the file and the remedy, for other families (SD3, Flux, refiners, inpainting), a missing part, pickled
    weights, and truncated or not finite weights.
    """
    folder = base_folder(name)
    check_family(folder)
    digests = fingerprints(folder)
    place = torch.device(device)
    vae_dtype = torch.float32 if dtype == torch.float16 and read_config(folder, "vae").get("force_upcast") else dtype
    base = BaseModel(
        name=name,
        folder=folder,
        # Channels last: convolutions are faster so, and the way into attention blocks needs no copy.
        unet=_freeze(_load_diffusers(UNet2DConditionModel, folder, "unet", dtype), place, dtype).to(
            memory_format=torch.channels_last
        ),
        vae=_freeze(_load_diffusers(AutoencoderKL, folder, "vae", vae_dtype), place, vae_dtype),
        text_encoders=_load_text_encoders(folder, place, dtype),
        schedule=NoiseSchedule.from_config(_scheduler_config(folder)),
        fingerprint=digests.content,
        earlier_fingerprint=digests.earlier,
        device=place,
        dtype=dtype,
    )
    size = base.unet.config.sample_size
    if not isinstance(size, int) and len(set(size)) != 1:
        raise BaseModelError(
            f"{folder}/unet/config.json: sample_size is {size!r}; use a base trained on square images."
        )
    return base


@contextmanager
def compiled_blocks(unet: UNet2DConditionModel) -> Iterator[None]:
    """Run the U-Net's residual and transformer blocks through torch.compile inside; outside it is as before.

    Regional: blocks of one kind and shape share their code, so it is ready in a fraction of the time that the whole
    U-Net takes. A LoRA bank in the blocks hands its factors over as inputs: another adapter compiles nothing.
    """
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock | ResnetBlock2D)]
    for block in blocks:
        block.compile(dynamic=False)
    try:
        # Beyond torch's limits blocks run uncompiled: each size of image and number of rows is a shape.
        with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES, accumulated_recompile_limit=MOST_SHAPES):
            yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


@contextmanager
def checkpointed_activations(unet: UNet2DConditionModel) -> Iterator[None]:
    """Keep only what enters the U-Net's blocks inside, and compute the rest again in the backward."""
    unet.train()  # diffusers checkpoints only in training mode; an SD U-Net has no dropout to wake up
    unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        unet.disable_gradient_checkpointing()
        unet.eval()


def _scheduler_config(folder: Path) -> Mapping[str, Any]:
    config = read_config(folder, "scheduler")
    return as_stock_pipeline_reads(config) if family_of(folder) == "sd" else config


def as_stock_pipeline_reads(scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with the two corrections a stock StableDiffusionPipeline makes when it loads a folder.

    A written steps_offset other than 1 becomes 1, and clip_sample becomes false.
    """
    config = {**scheduler_config, "clip_sample": False}
    if "steps_offset" in config:
        config["steps_offset"] = 1
    return config


def _load_diffusers(kind: Any, folder: Path, component: str, dtype: torch.dtype) -> Any:
    with _naming_damage(folder / component):
        module, info = kind.from_pretrained(
            folder / component,
            torch_dtype=dtype,
            use_safetensors=True,
            variant=weight_files(folder, component).variant,
            low_cpu_mem_usage=is_accelerate_available(),
            local_files_only=True,
            output_loading_info=True,
        )
    _check_complete(folder / component, info)
    return module


def _load_text_encoders(folder: Path, place: torch.device, dtype: torch.dtype) -> TextEncoders:
    parts = [_load_text_encoder(folder, number) for number in range(len(text_components(folder)))]
    tokenizers, models = zip(*parts, strict=True)
    first, *others = tokenizers
    if any(other.get_vocab() != first.get_vocab() for other in others):
        raise BaseModelError(f"{folder}: tokenizer/ and tokenizer_2/ spell differently; download the base again.")
    if any(other.model_max_length != first.model_max_length for other in others):
        raise BaseModelError(
            f"{folder}: model_max_length in tokenizer/ and tokenizer_2/ differ; set both to the smaller one."
        )
    return TextEncoders(
        tokenizers,
        tuple(_freeze(model, place, dtype) for model in models),
        zeros_without_text=zeros_without_text(folder),
    )


def _load_text_encoder(folder: Path, number: int) -> tuple[CLIPTokenizer, TextModel]:
    component, spelling = text_components(folder)[number], tokenizer_components(folder)[number]
    kind = CLIPTextModel if number == 0 else CLIPTextModelWithProjection
    with _naming_damage(folder / spelling):
        tokenizer = CLIPTokenizer.from_pretrained(folder / spelling, local_files_only=True)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with _naming_damage(folder / component):
            model, info = kind.from_pretrained(
                folder / component,
                use_safetensors=True,
                variant=weight_files(folder, component).variant,
                local_files_only=True,
                output_loading_info=True,
            )
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    _check_complete(folder / component, info)
    longest = model.config.max_position_embeddings
    if tokenizer.model_max_length > longest:
        raise BaseModelError(
            f"{folder}/{spelling}/tokenizer_config.json: model_max_length must be set, and at most {longest}, the "
            "text encoder's max_position_embeddings."
        )
    return tokenizer, model


@contextmanager
def _naming_damage(part: Path) -> Iterator[None]:
    """Turn the libraries' own loading errors into one that names the part and the remedy."""
    try:
        with memory_explained():
            yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise BaseModelError(
            f"{part} cannot be loaded ({str(error).strip()}); its config and weights must belong together: "
            "download the base again."
        ) from error


def _check_complete(part: Path, info: Mapping[str, Any]) -> None:
    # Libraries fill what a file lacks with random values and go on; position_ids are no weights.
    missing = sorted(str(key) for key in info["missing_keys"] if "position_ids" not in str(key))
    mismatched = sorted(str(key) for key in info["mismatched_keys"])
    if missing or mismatched:
        raise BaseModelError(
            f"{part}: {len(missing)} tensors are missing and {len(mismatched)} have other shapes, the first "
            f"{(missing + mismatched)[0]}; download the base again."
        )


def _freeze(module: Any, device: torch.device, dtype: torch.dtype) -> Any:
    moved = module.to(device) if module.dtype == dtype else module.to(device, dtype)
    return moved.eval().requires_grad_(False)
