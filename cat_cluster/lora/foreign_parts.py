"""Parts of adapter files that this project does not apply: refused by name, or left out where that was asked for."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from cat_cluster.errors import AdapterFormatError
from cat_cluster.lora.file_layers import FileLayer


@dataclass(frozen=True)
class Kind:
    """A kind of parts: what is said of one tensor of it, and of all that were left out."""

    one: str
    all: str


# Of a text encoder that is not at hand: the base has none of that name, or its U-Net alone is asked for.
TEXT_ENCODER: Final = Kind("a text-encoder part", "the text-encoder part")
CONVOLUTION: Final = Kind("a convolution layer larger than 1x1", "convolution layers larger than 1x1")
DORA: Final = Kind("DoRA weights", "DoRA magnitudes, of layers that are plain LoRA without them")
BIAS: Final = Kind("a bias", "biases")
_TUCKER: Final = Kind("a Tucker decomposition", "layers in Tucker decomposition")
_EMBEDDING: Final = Kind("an embedding", "embeddings")
_TEXT_KEY = re.compile(
    r"(^|[._])(text_encoders?|text_model|text_projection)|lora_te\d?_|self_attn\.|^(clip_[lgh]|t5xxl)\."
)
# By a tensor's name, in this order. What is not among them and is no LoRA, LoHa or LoKr is refused in any case.
_BY_NAME: Mapping[str, Kind] = {
    r"lora_embedding_|^bundle_emb\.": _EMBEDDING,
    r"\.bias$|\.diff_b$|\.b_norm$": BIAS,
    r"\.diff$|\.w_norm$": Kind("a whole trained layer", "whole trained layers"),
    r"\.oft_(R|blocks|diag)": Kind("OFT weights", "OFT weights"),
    r"\.[ab][12]\.weight$|\.bm[12]\.weight$": Kind("GLoRA weights", "GLoRA weights"),
}
UNSUPPORTED: Final = frozenset({TEXT_ENCODER, CONVOLUTION, DORA, _TUCKER, *_BY_NAME.values()})


@dataclass(frozen=True)
class LeftOut:
    """What was left out of a file: the names of its tensors by kind."""

    keys: Mapping[Kind, tuple[str, ...]]

    @property
    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(key for keys in self.keys.values() for key in keys)

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors there were of each kind, by what all of it is called."""
        return {kind.all: len(keys) for kind, keys in self.keys.items()}


def kind_by_name(key: str) -> Kind | None:
    """Return what a tensor's name says that is not applied, None for one that may be of a LoRA."""
    if _TEXT_KEY.search(key) is not None:
        return TEXT_ENCODER
    return next((kind for pattern, kind in _BY_NAME.items() if re.search(pattern, key)), None)


def foreign_parts(layer: FileLayer, module: nn.Module | None) -> dict[str, Kind]:
    """Return what of a layer is not applied, by part: all of it, or DoRA's magnitudes alone.

    module: the base's layer. A LoHa of a larger convolution has the shapes of a linear layer's.
    """
    kind = None
    if any(part == "mid" or re.fullmatch(r"(hada|lokr)_t\d", part) for part in layer.tensors):
        kind = _TUCKER
    elif any(_is_larger(tensor) for tensor in layer.tensors.values()) or (
        layer.kind in ("LOHA", "LOKR") and isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
    ):
        kind = CONVOLUTION
    if kind is not None:
        return dict.fromkeys(layer.tensors, kind)
    return {part: DORA for part in layer.tensors if part == "magnitude"}


def refuse(name: str, key: str, kind: Kind) -> None:
    """Raise AdapterFormatError, naming the tensor and what it is."""
    option = "--unet-only" if kind == TEXT_ENCODER else "--skip-unsupported"
    raise AdapterFormatError(
        f"{name}: {key} is {kind.one}, which cat-cluster does not apply: import the file with {option}, which leaves "
        "that out, or use a plain U-Net LoRA"
    )


def left_out(parts: Mapping[str, Kind], skip: Collection[Kind], name: str) -> LeftOut:
    """Return the tensors that are left out, of their kinds by key; AdapterFormatError for one that `skip` lacks."""
    keys: dict[Kind, list[str]] = {}
    for key, kind in parts.items():
        if kind not in skip:
            refuse(name, key, kind)
        keys.setdefault(kind, []).append(key)
    return LeftOut({kind: tuple(sorted(keys[kind])) for kind in sorted(keys, key=lambda kind: kind.all)})


def _is_larger(tensor: Tensor) -> bool:
    return tensor.ndim > 2 and any(side != 1 for side in tensor.shape[2:])
