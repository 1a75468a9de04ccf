"""Adapters as files of diffusers, PEFT and kohya: writing them, and by their names here all that reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import save
from torch import Tensor, nn

from cat_cluster.errors import AdapterFormatError
from cat_cluster.files import write_whole
from cat_cluster.lora.foreign_parts import BIAS as BIAS
from cat_cluster.lora.foreign_parts import CONVOLUTION as CONVOLUTION
from cat_cluster.lora.foreign_parts import DORA as DORA
from cat_cluster.lora.foreign_parts import TEXT_ENCODER as TEXT_ENCODER
from cat_cluster.lora.foreign_parts import UNSUPPORTED as UNSUPPORTED
from cat_cluster.lora.layer_names import PEFT_PREFIX, kohya_names
from cat_cluster.lora.layers import in_text_encoder
from cat_cluster.lora.peft_config import HEADER_KEY, config_for
from cat_cluster.lora.reading import ForeignAdapter as ForeignAdapter
from cat_cluster.lora.reading import read_adapter as read_adapter
from cat_cluster.lora.reading import read_foreign as read_foreign
from cat_cluster.lora.sources import DIFFUSERS_WEIGHTS, PEFT_CONFIG, PEFT_WEIGHTS
from cat_cluster.lora.sources import find_weights as find_weights
from cat_cluster.lora.weights import AdapterWeights as AdapterWeights
from cat_cluster.lora.weights import LoraLayer as LoraLayer
from cat_cluster.lora.weights import check_fits as check_fits
from cat_cluster.spec.choices import AdapterFormat


def to_safetensors(
    weights: AdapterWeights, fmt: AdapterFormat, metadata: Mapping[str, str], *, unet: nn.Module | None = None
) -> bytes:
    """Return the adapter as the bytes of a safetensors file; alpha equals the rank, so no scale is left to apply.

    The header holds `metadata` and the hashes of the tensors. unet: the base's, its weights on any device, meta too:
    kohya's names of an SDXL's layers depend on its blocks. Raises AdapterFormatError for PEFT where text encoders are
    changed: it has a file for each model.
    """
    if fmt not in get_args(AdapterFormat):
        raise AdapterFormatError(f"format {fmt!r} is unknown: choose one of {', '.join(get_args(AdapterFormat))}")
    if not weights.layers:
        raise AdapterFormatError("an adapter without layers cannot be written: train it first")
    if fmt == "peft" and (text := next(iter(weights.of_text.layers), None)) is not None:
        raise AdapterFormatError(
            f"PEFT has a file for each model, and this adapter changes text encoders beside the U-Net ({text}): write "
            "it as diffusers or kohya"
        )
    tensors: dict[str, Tensor] = {}
    header = dict(metadata)
    kohya = kohya_names(weights.layers, unet)
    for name, layer in weights.layers.items():
        ones = (1, 1) if layer.convolution else ()
        down, up = (side.reshape(*side.shape, *ones).contiguous() for side in (layer.down, layer.up))
        if fmt == "kohya":
            prefix = kohya[name]
            tensors[f"{prefix}.lora_down.weight"], tensors[f"{prefix}.lora_up.weight"] = down, up
            tensors[f"{prefix}.alpha"] = torch.tensor(float(len(down)))
        else:
            part = "" if in_text_encoder(name) else "unet."
            prefix = f"{part}{name}" if fmt == "diffusers" else f"{PEFT_PREFIX}{name}"
            tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = down, up
    if fmt == "peft":  # so that the file alone says its scale, also where its adapter_config.json is not at hand
        header[HEADER_KEY] = json.dumps(config_for(_ranks(weights)))
    return _with_hashes_and_sorted_metadata(save(tensors, header))


def _with_hashes_and_sorted_metadata(data: bytes) -> bytes:
    """Add the hashes of the tensors by which kohya's trainer and ModelSpec know a file, and sort the metadata by key.

    safetensors writes it as its hash map has it, anew each process.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    digest = hashlib.sha256(data[end:]).hexdigest()
    hashes = {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    header["__metadata__"] = dict(sorted({**header.get("__metadata__", {}), **hashes}.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def write_adapter(
    weights: AdapterWeights,
    folder: Path,
    fmt: AdapterFormat,
    *,
    adapter_id: str,
    metadata: Mapping[str, str],
    unet: nn.Module | None = None,
) -> Path:
    """Write an adapter to `folder` under the file name its format goes by, and return the path of the weights.

    unet: see `to_safetensors`.
    """
    data = to_safetensors(weights, fmt, metadata, unet=unet)
    names = {"diffusers": DIFFUSERS_WEIGHTS, "peft": PEFT_WEIGHTS, "kohya": f"{adapter_id}.safetensors"}
    path = folder / names[fmt]
    if fmt == "peft":
        write_whole(folder / PEFT_CONFIG, json.dumps(config_for(_ranks(weights)), indent=2).encode())
    write_whole(path, data)
    return path


def _ranks(weights: AdapterWeights) -> dict[str, int]:
    return {name: len(layer.down) for name, layer in weights.layers.items()}
