"""What adapter files call the layers of a U-Net: diffusers' paths, those of the original code, kohya's underscores."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

KOHYA_PREFIX = "lora_unet_"
PEFT_PREFIX = "base_model.model."
# Before a layer's name, in any order and number: kohya's and LyCORIS' own, PEFT's, diffusers', ComfyUI's.
_FLAT_PREFIXES = (KOHYA_PREFIX, "lycoris_")
_DOTTED_PREFIXES = (PEFT_PREFIX, "unet.", "model.diffusion_model.", "diffusion_model.")

# Diffusers' paths and those of the original Stable Diffusion code (ldm, of SDXL sgm), for what is not in a block list.
_ORIGINAL: Mapping[str, str] = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_IN_RESNETS: Mapping[str, str] = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

_DEEPER = re.compile(r"transformer_blocks\.[1-9]")


class LayerNames:
    """The layers of one U-Net by all the names that files give them."""

    def __init__(self, unet: nn.Module) -> None:
        self._paths = {name for name, _ in unet.named_modules()}
        original = original_paths(unet)
        self._flat = {_flat(name): path for path in original for name in (path, original[path])}

    def path(self, raw: str) -> str | None:
        """Return the module path of a layer that a file calls `raw`, None where this U-Net has no such layer."""
        bare = bare_name(raw)
        return bare if bare in self._paths else self._flat.get(_flat(bare))


def is_flat(raw: str) -> bool:
    """Say whether a file writes a layer's dots as underscores, so that only the U-Net tells which they are."""
    return raw.startswith(_FLAT_PREFIXES)


def bare_name(raw: str) -> str:
    """Return a layer's name without the prefixes of file formats and diffusers' old attention processors."""
    prefixes = (*_FLAT_PREFIXES, *_DOTTED_PREFIXES)
    while (prefix := next((one for one in prefixes if raw.startswith(one)), None)) is not None:
        raw = raw.removeprefix(prefix)
    if ".processor." in raw:
        raw = raw.replace(".processor.", ".")
        raw = f"{raw}.0" if raw.endswith(".to_out") else raw
    return raw


def original_paths(unet: nn.Module) -> dict[str, str]:
    """Return what the original Stable Diffusion code calls each module of a U-Net, by diffusers' path.

    There every residual block, with the attention behind it, is an entry of input_blocks or output_blocks, counted
    through the whole U-Net, and so is every downsampler; an upsampler lies in the entry before it.
    """
    names = {name for name, _ in unet.named_modules()}
    places = dict(_ORIGINAL)
    place = 1
    for block in _numbered(names, "down_blocks"):
        for j, resnet in enumerate(_numbered(names, f"{block}.resnets")):
            places |= {resnet: f"input_blocks.{place}.0", f"{block}.attentions.{j}": f"input_blocks.{place}.1"}
            place += 1
        if f"{block}.downsamplers.0" in names:
            places[f"{block}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
            place += 1
    place = 0
    for block in _numbered(names, "up_blocks"):
        for j, resnet in enumerate(_numbered(names, f"{block}.resnets")):
            places |= {resnet: f"output_blocks.{place}.0", f"{block}.attentions.{j}": f"output_blocks.{place}.1"}
            place += 1
        inside = 2 if f"{block}.attentions.0" in names else 1
        places[f"{block}.upsamplers.0.conv"] = f"output_blocks.{place - 1}.{inside}.conv"
    return {name: _moved(name, places) for name in names}


def kohya_names(layers: Iterable[str], unet: nn.Module | None) -> dict[str, str]:
    """Return kohya's names of layers, by module path: diffusers' paths, or for an SDXL the original code's.

    kohya's trainer runs SDXL in a copy of the original code and calls its layers so. ComfyUI, A1111 and diffusers read
    both; kohya's own merging, resizing and block-weight tools read that one alone. Without a U-Net diffusers' paths are
    returned.
    """
    original = {} if unet is None or not has_pooled_text(unet) else original_paths(unet)
    return {path: KOHYA_PREFIX + _flat(original.get(path, path)) for path in layers}


def names_depend_on_base(layers: Iterable[str]) -> bool:
    """Say whether kohya's names of layers are those of an SDXL: attentions of SD 1.x and 2.x have one block each."""
    return any(_DEEPER.search(path) for path in layers)


def has_pooled_text(unet: nn.Module) -> bool:
    """Say whether a U-Net takes pooled text and picture sizes, as those of SDXL do."""
    return any(name == "add_embedding" for name, _ in unet.named_modules())


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _numbered(names: set[str], prefix: str) -> Iterator[str]:
    """Yield prefix.0, prefix.1 and so on, as far as there are such modules."""
    number = 0
    while (name := f"{prefix}.{number}") in names:
        yield name
        number += 1


def _moved(name: str, places: Mapping[str, str]) -> str:
    """Return a module's path with the longest beginning that is in `places` replaced, and names inside of resnets."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        begin, rest = ".".join(parts[:end]), parts[end:]
        if begin in places:
            if "resnets" in parts[:end] and rest:
                rest = [_IN_RESNETS.get(rest[0], rest[0]), *rest[1:]]
            return ".".join([places[begin], *rest])
    return name
