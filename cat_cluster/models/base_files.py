"""The diffusers folder of a base model: which files it has, and which family of Stable Diffusion it is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from cat_cluster.errors import BaseModelError

Family = Literal["sd", "sdxl"]  # Stable Diffusion 1.x and 2.x, or XL
MODEL_INDEX = "model_index.json"
_STEMS: Mapping[str, str] = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
_CONFIGS: Mapping[str, str] = {
    "scheduler": "scheduler_config.json",
    "text_encoder": "config.json",
    "text_encoder_2": "config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "unet": "config.json",
    "vae": "config.json",
}
_WEIGHT_ENDS = (".safetensors", "-?????-of-?????.safetensors")
VARIANTS = ("", ".fp16")  # infixes in the names of weight files; the first that is complete is read
CONFIG_PATTERNS = (MODEL_INDEX, "*/*.json", "tokenizer*/*.txt", "general_prompts.txt")
# U-Net options that need inputs the pipelines here do not have, and what uses them.
_OTHER_FAMILIES: Mapping[str, str] = {
    "class_embed_type": "Stable unCLIP",
    "encoder_hid_dim_type": "a U-Net with another text or image conditioning",
    "time_cond_proj_dim": "a latent consistency model",
}
_SUPPORTED = "use a Stable Diffusion 1.x, 2.x or XL text-to-image base"
_SIZES = 6  # numbers of SDXL's micro-conditioning; a refiner has five


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of one component, and the variant ("fp16") in their names, if any."""

    variant: str | None
    paths: tuple[Path, ...]


def family_of(folder: Path) -> Family:
    """Return the family of a diffusers folder, whether it is complete or not."""
    return "sdxl" if (folder / "text_encoder_2").is_dir() else "sd"


def text_components(folder: Path) -> tuple[str, ...]:
    """Return the names of a base's text encoders, in their order."""
    return ("text_encoder", "text_encoder_2") if family_of(folder) == "sdxl" else ("text_encoder",)


def tokenizer_components(folder: Path) -> tuple[str, ...]:
    """Return the names of a base's tokenizers, in the order of its text encoders."""
    return tuple(name.replace("text_encoder", "tokenizer") for name in text_components(folder))


def weight_components(folder: Path) -> tuple[str, ...]:
    """Return the names of the parts of a base that have weights, in alphabetical order."""
    return (*text_components(folder), "unet", "vae")


def parameter_count(folder: Path) -> int:
    """Return how many numbers the weights of a base are, as the heads of its files say; raises BaseModelError."""
    count = 0
    for component in weight_components(folder):
        for path in weight_files(folder, component).paths:
            try:
                with safe_open(path, framework="numpy") as file:
                    count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise BaseModelError(f"{path} cannot be read ({error}); download the base again.") from error
    return count


def read_config(folder: Path, component: str) -> dict[str, Any]:
    """Return the JSON config of a component of a diffusers folder; BaseModelError when missing or unreadable."""
    path = folder / component / _CONFIGS[component]
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseModelError(
            f"{folder}: {component}/{path.name} is missing; a base is a complete diffusers folder with "
            f"{', '.join(_config_components(folder))}: download it again, or save it with pipeline.save_pretrained()."
        ) from None
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{path} cannot be read ({error}); download the base again.") from error
    if not isinstance(config, dict):
        raise BaseModelError(f"{path} is not a JSON object; download the base again.")
    return config


def size_unit(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
    """Return what the sides of an image must be multiples of, in pixels, for every level of the U-Net to halve them.

    unet, vae: their configs; what these leave out is as diffusers has it.
    """
    halvings = len(vae.get("block_out_channels", (64,))) - 1 + len(unet.get("down_block_types", range(4))) - 1
    return 1 << halvings


def landscape(side: int, unit: int, *, of_equal_area: bool) -> tuple[int, int]:
    """Return width and height, about 3:2, of the landscape images of a base whose own are squares of `side` pixels.

    unit: its size_unit. of_equal_area: whether it was trained on shapes of as many pixels as that square, as SDXL was
    (arXiv 2307.01952, section 2.3); else the square is made wider.
    """
    if not of_equal_area:
        return side * 3 // 2 // unit * unit, side
    height = max(unit, int(side * (2 / 3) ** 0.5) // unit * unit)
    return side * side // height // unit * unit, height


def zeros_without_text(folder: Path) -> bool:
    """Return whether guidance starts from zeros where there is no negative prompt, which SDXL alone may do.

    As for the stock pipeline it does, unless model_index.json says otherwise. Raises BaseModelError for one that cannot
    be read: it is not known then.
    """
    if family_of(folder) != "sdxl":
        return False
    path = folder / MODEL_INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return True
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{path} cannot be read ({error}); download the base again.") from error
    said = index.get("force_zeros_for_empty_prompt", True) if isinstance(index, dict) else None
    if not isinstance(said, bool):
        raise BaseModelError(
            f"{path}: is no JSON object with force_zeros_for_empty_prompt true or false; download the base again."
        )
    return said


def check_family(folder: Path) -> None:
    """Refuse, by name, a folder that is not a complete Stable Diffusion 1.x, 2.x or XL text-to-image base."""
    if (folder / "transformer").is_dir():
        raise BaseModelError(f"{folder} has transformer/: Stable Diffusion 3 or Flux is not supported; {_SUPPORTED}.")
    if (folder / "text_encoder_2").is_dir() and not (folder / "text_encoder").is_dir():
        raise BaseModelError(
            f"{folder} has text_encoder_2/ and no text_encoder/: a refiner of Stable Diffusion XL is not supported; "
            f"{_SUPPORTED}."
        )
    configs = {component: read_config(folder, component) for component in _config_components(folder)}
    unet, vae = configs["unet"], configs["vae"]
    where = folder / "unet" / "config.json"
    for option, family in _OTHER_FAMILIES.items():
        if unet.get(option) is not None:
            raise BaseModelError(
                f"{where}: {option} is {unet[option]!r}, which is {family} and not supported; {_SUPPORTED}."
            )
    channels = int(vae.get("latent_channels", 4))
    taken = int(unet.get("in_channels", 4))
    if taken != channels:
        kind = "an inpainting" if taken == 2 * channels + 1 else "an image-conditioned"
        raise BaseModelError(
            f"{where}: in_channels is {taken} and the VAE has {channels} latent channels, which is {kind} "
            f"base and not supported; {_SUPPORTED}."
        )
    if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
        raise BaseModelError(
            f"{folder}/vae/config.json: latents_mean and latents_std, as of Playground 2.5, are not supported; "
            f"{_SUPPORTED}."
        )
    widths = [configs[name].get("hidden_size", 512) for name in text_components(folder)]
    width, needed = sum(widths), unet.get("cross_attention_dim", 1280)
    if width != needed:
        raise BaseModelError(
            f"{where}: cross_attention_dim is {needed!r} and the text encoder's hidden_size is "
            f"{' + '.join(map(str, widths))}; these parts do not belong together: download the base again."
        )
    _check_added(folder, configs)
    zeros_without_text(folder)


def _check_added(folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a U-Net whose inputs beside text and timestep are not those of the folder's family."""
    unet, where = configs["unet"], folder / "unet" / "config.json"
    kind = unet.get("addition_embed_type")
    if family_of(folder) == "sd":
        if kind is not None:
            raise BaseModelError(
                f"{where}: addition_embed_type is {kind!r}, as in Stable Diffusion XL, and text_encoder_2/ is missing: "
                "download the base again."
            )
        return
    if kind != "text_time":
        raise BaseModelError(
            f"{where}: addition_embed_type is {kind!r}, and Stable Diffusion XL's is 'text_time'; {_SUPPORTED}."
        )
    pooled = int(configs["text_encoder_2"].get("projection_dim", 512))
    needed, each = unet.get("projection_class_embeddings_input_dim"), int(unet.get("addition_time_embed_dim") or 0)
    if needed != pooled + _SIZES * each:
        raise BaseModelError(
            f"{where}: projection_class_embeddings_input_dim is {needed!r}, and pooled text of {pooled} with {_SIZES} "
            f"sizes of {each} are {pooled + _SIZES * each}: this is a refiner, or its parts do not belong together; "
            f"{_SUPPORTED}."
        )


def _config_components(folder: Path) -> tuple[str, ...]:
    return tuple(name for name in _CONFIGS if not name.endswith("_2") or family_of(folder) == "sdxl")


def weight_patterns(infix: str) -> list[str]:
    """Return patterns of the names that the weight files of a variant may have."""
    return [f"{part}/{stem}{infix}{end}" for part, stem in _STEMS.items() for end in _WEIGHT_ENDS]


def check_complete(folder: Path) -> Path:
    """Return the folder when it is a base with all its files; raises BaseModelError."""
    check_family(folder)
    for component in weight_components(folder):
        weight_files(folder, component)
    return folder


def weight_files(folder: Path, component: str) -> WeightFiles:
    """Find a component's safetensors files, the plain names before the fp16 variant's; one file or shards."""
    stem, place = _STEMS[component], folder / component
    for variant in (None, "fp16"):
        infix = f".{variant}" if variant else ""
        single = place / f"{stem}{infix}.safetensors"
        if single.is_file():
            return WeightFiles(variant, (single,))
        index = place / f"{stem}.safetensors.index{infix}.json"
        if index.is_file():
            return WeightFiles(variant, _shards(index))
    if any(place.glob("*.bin")) or any(place.glob("*.ckpt")):
        raise BaseModelError(
            f"{place} holds pickled weights only, which are never read: convert the base once, in a place where "
            "you trust it, with StableDiffusionPipeline.from_pretrained(OLD, use_safetensors=False)"
            ".save_pretrained(NEW, safe_serialization=True)."
        )
    raise BaseModelError(f"{place}: {stem}.safetensors is missing; download the base again.")


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise BaseModelError(f"{index} cannot be read ({error!r}); download the base again.") from error
    shards = tuple(index.parent / name for name in names)
    for shard in shards:
        if not shard.is_file():
            raise BaseModelError(f"{shard} is missing and {index.name} names it; download the base again.")
    return shards
