"""Which family of models an adapter file was made for, as its names and shapes tell, for messages that say so."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

from torch import nn

from cat_cluster.errors import AdapterMismatchError
from cat_cluster.lora.layer_names import has_pooled_text
from cat_cluster.lora.layers import sizes_of

_SD = "Stable Diffusion 1.x or 2.x"
_SDXL = "Stable Diffusion XL"
_BY_WIDTH = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: f"{_SDXL}'s refiner", 2048: _SDXL}
# Models whose denoiser is no U-Net of these, by what only their layers are called; the first that matches counts.
_OTHERS = {
    r"single_transformer_blocks|double_blocks|single_blocks": "Flux, or a model of its kind",
    r"joint_blocks|(^|[._])transformer_blocks[._]\d+[._]attn[._]add_[qkv]_proj": "Stable Diffusion 3",
    r"prior_unet": "Stable Cascade",
    r"^(base_model\.model\.)?transformer\.|^lora_(transformer|unet_(transformer_)?blocks|unet_layers)_|"
    r"^diffusion_model\.(transformer_)?(blocks|layers)\.": "a diffusion transformer",
}
_DEEP = re.compile(r"transformer_blocks[._][1-9]\d*[._]")
_SECOND_ENCODER = re.compile(r"lora_te2_|text_encoder_2\.|clip_g\.")
# Blocks with attention in the first and the last place, where SDXL's have none.
_SD_BLOCKS = re.compile(
    r"down_blocks[._]0[._]attentions|up_blocks[._]3[._]attentions|"
    r"input_blocks[._][12][._]1[._]|output_blocks[._](9|10|11)[._]1[._]"
)
_TEXT_SIDE = re.compile(r"attn2[._]to_[kv]$")


@dataclass(frozen=True)
class Family:
    """A family's name, None where nothing tells, and the width of the text that its cross-attention reads, if known.

    layer: one that has that width.
    """

    name: str | None
    width: int | None
    layer: str = ""

    def __str__(self) -> str:
        width = "" if self.width is None else f" (cross-attention of width {self.width})"
        return f"{self.name or 'another model'}{width}"


def family_of_unet(unet: nn.Module) -> Family:
    """Return the family of a base model's U-Net."""
    sizes = [sizes_of(module) for name, module in unet.named_modules() if _TEXT_SIDE.search(name)]
    width = next((found[0] for found in sizes if found is not None), None)
    return Family(_BY_WIDTH.get(width or 0) or (_SDXL if has_pooled_text(unet) else _SD), width)


def family_of_file(keys: Iterable[str], inputs: Iterable[tuple[str, int]]) -> Family:
    """Return the family that a file's keys tell, and `inputs`, the width that a layer takes by its name in the file."""
    keys = list(keys)
    layer, width = next(((name, size) for name, size in inputs if _TEXT_SIDE.search(name)), ("", None))
    named = _BY_WIDTH.get(width or 0)
    if named is None and any(_DEEP.search(key) or _SECOND_ENCODER.search(key) for key in keys):
        named = _SDXL
    if named is None and any(_SD_BLOCKS.search(key) for key in keys):
        named = _SD
    return Family(named, width, layer)


def refuse_other_models(name: str, keys: Iterable[str], unet: nn.Module | None) -> None:
    """Raise AdapterMismatchError, naming both, for a file of a model that is no Stable Diffusion with a U-Net."""
    keys = list(keys)
    for pattern, family in _OTHERS.items():
        if (key := next((key for key in keys if re.search(pattern, key)), None)) is not None:
            made_for = f"{name} was made for {family}, as {key} shows"
            if unet is None:
                remedy = "cat-cluster draws with Stable Diffusion 1.x, 2.x and XL; choose a file made for one of these"
                raise AdapterMismatchError(f"{made_for}: {remedy}")
            raise AdapterMismatchError(
                f"{made_for}, and the base model is {family_of_unet(unet)}: choose a file made for the base model"
            )


def refuse_other_width(name: str, file: Family, unet: nn.Module) -> None:
    """Raise AdapterMismatchError, naming both families, where a file's cross-attention reads text of another width."""
    base = family_of_unet(unet)
    if None not in (file.width, base.width) and file.width != base.width:
        raise AdapterMismatchError(_other_family(name, file.layer, file, base))


def refuse_unknown_layer(name: str, raw: str, file: Family, unet: nn.Module) -> NoReturn:
    """Raise AdapterMismatchError for a layer that the base does not have, naming the families where they differ."""
    base = family_of_unet(unet)
    if file.name is not None and (_SDXL in file.name) != (_SDXL in str(base.name)):
        raise AdapterMismatchError(_other_family(name, raw, file, base))
    raise AdapterMismatchError(f"{name}: {raw} is no layer of this base model: use the base it was made for")


def _other_family(name: str, raw: str, file: Family, base: Family) -> str:
    return (
        f"{name} was made for {file}, and the base model is {base}, which {raw} does not fit: import it with --base "
        "naming a base that it was made for, or choose a file made for this one"
    )
