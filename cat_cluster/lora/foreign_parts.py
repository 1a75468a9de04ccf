"""Parts of adapter files that this project does not apply: refused by name, or left out where that was asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from cat_cluster.errors import AdapterFormatError

_TEXT_ENCODER = re.compile(r"(^|[._])(text_encoder|text_model|text_projection)|lora_te\d?_|self_attn\.")
_FOREIGN = {
    r"dora_scale|magnitude_vector": "DoRA weights",
    r"hada_": "LoHa weights",
    r"lokr_": "LoKr weights",
    r"lora_embedding_": "an embedding",
    r"\.bias$": "a bias",
}


def is_text_encoder(key: str) -> bool:
    """Say whether a tensor's name is of a text encoder's layer."""
    return _TEXT_ENCODER.search(key) is not None


def without_text_encoder(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors but those of a text encoder; raises AdapterFormatError where nothing is left."""
    kept = {key: tensor for key, tensor in tensors.items() if not is_text_encoder(key)}
    if tensors and not kept:
        raise AdapterFormatError(f"{name} holds a text-encoder part alone: choose a file with a U-Net part")
    return kept


def refuse_foreign(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise AdapterFormatError, naming the tensor, for the first one of a kind that is not applied."""
    for key, tensor in tensors.items():
        if is_text_encoder(key):
            raise AdapterFormatError(
                f"{name}: {key} is a text-encoder part, which cat-cluster does not apply: import the file with "
                "--unet-only, which leaves that part out, or use a plain U-Net LoRA"
            )
        kind = next((kind for pattern, kind in _FOREIGN.items() if re.search(pattern, key)), None)
        if kind is None and tensor.ndim == 4 and tensor.shape[2:] != (1, 1):
            kind = "a convolution layer larger than 1x1"
        if kind is not None:
            raise AdapterFormatError(
                f"{name}: {key} is {kind}, which cat-cluster does not apply: use a plain U-Net LoRA"
            )
