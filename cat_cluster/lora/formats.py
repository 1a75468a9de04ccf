"""Adapter weights and the files they travel in: diffusers, PEFT and kohya, both ways, safetensors only."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from cat_cluster.errors import AdapterFormatError, AdapterMismatchError

AdapterFormat = Literal["diffusers", "peft", "kohya"]

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
_PEFT_PREFIX = "base_model.model."
_KOHYA_PREFIX = "lora_unet_"


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """The change of one linear: W + up @ down, down [R, in] and up [out, R], fp32; every scale is folded into up."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """An adapter: its layers by U-Net module path, such as down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q."""

    layers: Mapping[str, LoraLayer]

    @property
    def rank(self) -> int:
        """The largest rank of any layer."""
        return max(len(layer.down) for layer in self.layers.values())

    def check_finite(self) -> None:
        """Raise AdapterFormatError, naming the layer, when a weight is NaN or infinite."""
        for name, layer in self.layers.items():
            if not (bool(layer.down.isfinite().all()) and bool(layer.up.isfinite().all())):
                raise AdapterFormatError(f"layer {name} holds values that are not finite: train or download it again")

    def digest(self) -> str:
        """Return the sha256 over names, shapes and fp32 bytes."""
        digest = hashlib.sha256()
        for name in sorted(self.layers):
            for tensor in (self.layers[name].down, self.layers[name].up):
                digest.update(f"{name} {tuple(tensor.shape)} ".encode())
                digest.update(tensor.float().contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()


def check_fits(weights: AdapterWeights, unet: UNet2DConditionModel) -> None:
    """Raise AdapterMismatchError, naming layer and shapes, when an adapter does not fit a U-Net."""
    for name, layer in weights.layers.items():
        module = _module(unet, name)
        if not isinstance(module, nn.Linear):
            raise AdapterMismatchError(f"layer {name} is not a linear layer of this base model: use the base it was made for")
        wanted, found = (module.in_features, module.out_features), (layer.down.shape[1], layer.up.shape[0])
        if wanted != found:
            raise AdapterMismatchError(
                f"layer {name} takes (in, out) = {wanted} in this base model and {found} in the adapter: "
                "use the base it was made for"
            )


def to_safetensors(weights: AdapterWeights, fmt: AdapterFormat, metadata: Mapping[str, str]) -> bytes:
    """Return the adapter as the bytes of a safetensors file; alpha equals the rank, so no scale is left to apply."""
    if fmt not in get_args(AdapterFormat):
        raise AdapterFormatError(f"format {fmt!r} is unknown: choose one of {', '.join(get_args(AdapterFormat))}")
    tensors: dict[str, Tensor] = {}
    for name, layer in weights.layers.items():
        down, up = layer.down.contiguous(), layer.up.contiguous()
        if fmt == "kohya":
            prefix = _KOHYA_PREFIX + name.replace(".", "_")
            tensors[f"{prefix}.lora_down.weight"], tensors[f"{prefix}.lora_up.weight"] = down, up
            tensors[f"{prefix}.alpha"] = torch.tensor(float(len(down)))
        else:
            prefix = f"unet.{name}" if fmt == "diffusers" else f"{_PEFT_PREFIX}{name}"
            tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = down, up
    return save(tensors, dict(metadata))


def write_adapter(
    weights: AdapterWeights, folder: Path, fmt: AdapterFormat, *, adapter_id: str, metadata: Mapping[str, str]
) -> Path:
    """Write an adapter to `folder` under the file name its format goes by, and return the path of the weights."""
    names = {"diffusers": DIFFUSERS_WEIGHTS, "peft": PEFT_WEIGHTS, "kohya": f"{adapter_id}.safetensors"}
    data = to_safetensors(weights, fmt, metadata)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / names[fmt]
    if fmt == "peft":
        _write_whole(folder / PEFT_CONFIG, json.dumps(_peft_config(weights), indent=2).encode())
    _write_whole(path, data)
    return path


def read_adapter(source: Path | bytes, *, unet: UNet2DConditionModel | None = None) -> AdapterWeights:
    """Read an adapter of any of the three formats; a folder is searched for the file names of design.

    Raises AdapterFormatError for a damaged file, one that is not safetensors, values that are not finite, and, by
    name, for parts this project does not apply (text encoder, convolutions, DoRA, LoHa, LoKr). kohya files need
    `unet`: their names write dots as underscores. With `unet` the shapes are checked too.
    """
    name, data, config = _open(source)
    try:
        tensors = load(data)
    except (SafetensorError, ValueError) as error:
        raise AdapterFormatError(
            f"{name} is not a whole safetensors file ({error}): copy or export it again; pickle files are never read"
        ) from error
    _refuse_foreign(name, tensors)
    weights = AdapterWeights(_collect(name, tensors, config, unet))
    if not weights.layers:
        raise AdapterFormatError(f"{name} holds no LoRA layers of a U-Net")
    weights.check_finite()
    if unet is not None:
        check_fits(weights, unet)
    return weights


def _open(source: Path | bytes) -> tuple[str, bytes, Mapping[str, Any]]:
    if isinstance(source, bytes):
        return "the adapter file", source, {}
    path = source
    if path.is_dir():
        found = [path / name for name in (DIFFUSERS_WEIGHTS, PEFT_WEIGHTS) if (path / name).is_file()]
        found += sorted(path.glob("*.safetensors"))
        if not found:
            raise AdapterFormatError(f"{path} holds no .safetensors file; pickle files (.bin, .pt) are never read")
        path = found[0]
    if path.suffix in (".bin", ".pt", ".ckpt", ".pth", ".pkl"):
        raise AdapterFormatError(f"{path} is a pickle file, which can run code: convert it to safetensors first")
    try:
        config_path = path.parent / PEFT_CONFIG
        config = json.loads(config_path.read_text()) if path.name == PEFT_WEIGHTS and config_path.is_file() else {}
        return str(path), path.read_bytes(), config
    except (OSError, ValueError) as error:
        raise AdapterFormatError(f"{path} cannot be read: {error}") from error


def _refuse_foreign(name: str, tensors: Mapping[str, Tensor]) -> None:
    kinds = {
        r"(^|\.)(text_encoder|text_model)|lora_te": "a text-encoder part",
        r"dora_scale|magnitude_vector": "DoRA weights",
        r"hada_": "LoHa weights",
        r"lokr_": "LoKr weights",
    }
    for key, tensor in tensors.items():
        kind = next((kind for pattern, kind in kinds.items() if re.search(pattern, key)), None)
        if kind is None and tensor.ndim == 4:
            kind = "a convolution layer"
        if kind is not None:
            raise AdapterFormatError(f"{name}: {key} is {kind}, which cat-cluster does not apply: use a plain U-Net LoRA")


_KEY = re.compile(
    r"(?P<layer>.+?)\.(?:lora_A|lora_down|lora\.down|lora_B|lora_up|lora\.up)(?:\.default)?\.weight"
)


def _collect(
    name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], unet: UNet2DConditionModel | None
) -> dict[str, LoraLayer]:
    downs, ups, alphas = {}, {}, {}
    for key, tensor in tensors.items():
        if key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = float(tensor)
            continue
        match = _KEY.fullmatch(key)
        if match is None or tensor.ndim != 2:
            raise AdapterFormatError(f"{name}: {key} is not a LoRA weight of a linear layer")
        side = downs if re.search(r"lora_A|down", key[len(match["layer"]) :]) else ups
        side[match["layer"]] = tensor.float()
    kohya_names = None if unet is None else {n.replace(".", "_"): n for n, _ in unet.named_modules()}
    layers = {}
    for raw in sorted(downs.keys() | ups.keys()):
        if raw not in downs or raw not in ups or len(downs[raw]) != ups[raw].shape[1]:
            raise AdapterFormatError(f"{name}: layer {raw} lacks its down or up weight, or their ranks differ")
        rank = len(downs[raw])
        scale = alphas.get(raw, float(rank)) / rank * _peft_scale(config, rank)
        layers[_module_path(name, raw, kohya_names)] = LoraLayer(downs[raw], ups[raw] * scale)
    return layers


def _module_path(name: str, raw: str, kohya_names: Mapping[str, str] | None) -> str:
    if not raw.startswith(_KOHYA_PREFIX):
        return raw.removeprefix(_PEFT_PREFIX).removeprefix("unet.")
    if kohya_names is None:
        raise AdapterFormatError(f"{name} is a kohya file: reading it needs the base model, to tell its layers' names")
    path = kohya_names.get(raw.removeprefix(_KOHYA_PREFIX))
    if path is None:
        raise AdapterMismatchError(f"{name}: {raw} is no layer of this base model: use the base it was made for")
    return path


def _peft_scale(config: Mapping[str, Any], rank: int) -> float:
    if not config:
        return 1.0
    alpha = float(config.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _peft_config(weights: AdapterWeights) -> dict[str, Any]:
    ranks = {name: len(layer.down) for name, layer in weights.layers.items()}
    return {
        "peft_type": "LORA",
        "r": weights.rank,
        "lora_alpha": weights.rank,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != weights.rank},
        "alpha_pattern": {name: rank for name, rank in ranks.items() if rank != weights.rank},
        "target_modules": sorted(weights.layers),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def _module(unet: UNet2DConditionModel, name: str) -> nn.Module | None:
    """Return the linear at a path, looking through a bank that may sit there."""
    module = dict(unet.named_modules()).get(name)
    return getattr(module, "base", module) if module is not None else None


def _write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise AdapterFormatError(f"cannot write {path}: {error}; free space or choose another folder") from error

