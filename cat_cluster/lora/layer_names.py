"""What adapter files call the layers of a base: diffusers' paths, those of the original code, kohya's underscores."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from cat_cluster.lora.layers import in_text_encoder

KOHYA_PREFIX = "lora_unet_"
PEFT_PREFIX = "base_model.model."
# Before a layer's name, in any order and number: kohya's and LyCORIS' own, PEFT's, diffusers', ComfyUI's.
_FLAT_PREFIXES = (KOHYA_PREFIX, "lycoris_")
# kohya's trainer counts the text encoders of SDXL, and not the one of other families.
_TEXT_PREFIXES: Mapping[str, str] = {
    "lora_te_": "text_encoder_",
    "lora_te1_": "text_encoder_",
    "lora_te2_": "text_encoder_2_",
}
# What the first text encoder's layers are in, which some versions of transformers leave out.
_TEXT_MODEL = "text_model."
# Diffusers' old attention processors call the projections of CLIP as those of a U-Net.
_OLD_TEXT: Mapping[str, str] = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
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
    """The layers of one base by all the names that files give them; of a U-Net alone, its own."""

    def __init__(self, unet: nn.Module) -> None:
        self._paths = {name for name, _ in unet.named_modules()}
        original = original_paths(unet)
        self._flat = {_flat(name): path for path in original for name in (path, original[path])}
        of_text = (path for path in original if in_text_encoder(path))
        self._flat |= {_flat(path.replace(_TEXT_MODEL, "", 1)): path for path in of_text}

    def path(self, raw: str) -> str | None:
        """Return the module path of a layer that a file calls `raw`, None where this base has no such layer."""
        bare = bare_name(raw)
        return bare if bare in self._paths else self._flat.get(_flat(bare))


def is_flat(raw: str) -> bool:
    """Say whether a file writes a layer's dots as underscores, so that only the base tells which they are."""
    return raw.startswith((*_FLAT_PREFIXES, *_TEXT_PREFIXES))


def bare_name(raw: str) -> str:
    """Return a layer's name without the prefixes of file formats and diffusers' old attention processors."""
    prefixes = (*_FLAT_PREFIXES, *_DOTTED_PREFIXES)
    while (prefix := next((one for one in prefixes if raw.startswith(one)), None)) is not None:
        raw = raw.removeprefix(prefix)
    for prefix, encoder in _TEXT_PREFIXES.items():
        if raw.startswith(prefix):
            return encoder + raw.removeprefix(prefix)
    if in_text_encoder(raw):
        parent, _, last = raw.rpartition(".")
        return f"{parent}.{_OLD_TEXT.get(last, last)}"
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
    both; kohya's own merging, resizing and block-weight tools read that one alone. Without a U-Net the names are those
    of a base that is no SDXL.
    """
    of_xl = unet is not None and has_pooled_text(unet)
    original = original_paths(unet) if unet is not None and of_xl else {}
    text = {"text_encoder.": "lora_te1_" if of_xl else "lora_te_", "text_encoder_2.": "lora_te2_"}

    def name(path: str) -> str:
        encoder = next((encoder for encoder in text if path.startswith(encoder)), None)
        if encoder is not None:
            return text[encoder] + _flat(path.removeprefix(encoder))
        return KOHYA_PREFIX + _flat(original.get(path, path))

    return {path: name(path) for path in layers}


def names_depend_on_base(layers: Iterable[str]) -> bool:
    """Say whether kohya's names of layers may be those of an SDXL.

    Attentions of SD 1.x and 2.x have one block each; a first text encoder all have.
    """
    return any(_DEEPER.search(path) or in_text_encoder(path) for path in layers)


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
