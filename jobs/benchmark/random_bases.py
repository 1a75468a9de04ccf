"""Bases of chance in the sizes of the releases: what benchmarks measure where no weights can be fetched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig

from cat_cluster.errors import SpecError
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.single_file import FAMILIES, write_family
from cat_cluster.models.text_encoders import TextEncoders

SIZES = {"sd15": "sd1", "sdxl": "sdxl"}  # name -> the family whose configs have that size
TITLES = {"sd15": "Stable Diffusion 1.5", "sdxl": "Stable Diffusion XL"}
_TEXT_PARTS = ("text_encoder", "text_encoder_2")


def write_random_base(folder: Path, size: str = "sd15", changes: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """Write a base with random half-precision weights in diffusers' layout, and return its folder.

    size: a key of SIZES. changes: part -> values of its config that differ from the family's.
    """
    write_family(folder, SIZES[size])
    torch.manual_seed(0)
    for part, name in _classes(folder).items():
        config = {**_config(folder / part), **(changes or {}).get(part, {})}
        _of_chance(name, config).half().save_pretrained(folder / part)
    return str(folder)


def random_base(size: str = "sd15", *, on: str = "cuda", latent_size: int | None = None) -> BaseModel:
    """Return a base whose U-Net has the size of a release and random weights, for measuring steps alone.

    Text encoders and VAE are small stand-ins of the right shapes: a step asks neither, once texts are cached.
    latent_size: the family's own unless given. Raises SpecError for a GPU that is not there.
    """
    if on == "cuda" and not torch.cuda.is_available():
        raise SpecError(f"the size {size} is measured on a GPU, and this torch sees none: use the size pocket")
    family, pocket, device = FAMILIES / SIZES[size], load_base_model("pocket"), torch.device(on)
    classes = _classes(family)
    unet_config = _config(family / "unet")
    torch.manual_seed(0)
    with device:  # on the CPU the weights of an SDXL take minutes
        unet = _of_chance(classes["unet"], {**unet_config, "sample_size": latent_size or unet_config["sample_size"]})
        vae = AutoencoderKL(
            block_out_channels=(32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        few = {"vocab_size": len(pocket.tokenizer), "num_hidden_layers": 1}
        texts = [
            _of_chance(classes[part], {**_config(family / part), **few}) for part in _TEXT_PARTS if part in classes
        ]
    tokenizer = copy(pocket.tokenizer)
    tokenizer.model_max_length = 77
    for part in (unet, vae, *texts):
        part.eval().requires_grad_(False)
    encoders = TextEncoders((tokenizer,) * len(texts), tuple(texts))
    return replace(pocket, name=f"{size}-sized", unet=unet, vae=vae, text_encoders=encoders, device=device)


def _classes(folder: Path) -> dict[str, str]:
    """Return part -> name of its class, of the parts of a diffusers folder that have weights."""
    index = json.loads((folder / "model_index.json").read_text())
    return {part: index[part][1] for part in ("unet", "vae", *_TEXT_PARTS) if part in index}


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def _of_chance(name: str, config: Mapping[str, Any]) -> Any:
    """Return a model of a class of diffusers or transformers with the weights it begins training with."""
    if hasattr(transformers, name):
        return getattr(transformers, name)(CLIPTextConfig(**config))
    return getattr(diffusers, name).from_config(dict(config))
