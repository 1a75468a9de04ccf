"""Adapter weights and the files they travel in: diffusers, PEFT and kohya, both ways, safetensors only."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from cat_cluster.errors import AdapterFormatError, AdapterMismatchError
from cat_cluster.files import write_whole
from cat_cluster.lora.foreign_parts import is_text_encoder, refuse_foreign, without_text_encoder
from cat_cluster.lora.layers import is_convolution, sizes_of
from cat_cluster.lora.peft_config import HEADER_KEY, check_config, config_for, header_config, parse_config, scale_of
from cat_cluster.spec.choices import AdapterFormat

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
_PEFT_PREFIX = "base_model.model."
_KOHYA_PREFIX = "lora_unet_"
_PICKLE_SUFFIXES = (".bin", ".pt", ".ckpt", ".pth", ".pkl")


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """The change of one layer: W + up @ down, down [R, in] and up [out, R], fp32; every scale is folded into up.

    convolution: the layer is a 1x1 convolution, so that files hold [R, in, 1, 1] and [out, R, 1, 1].
    """

    down: Tensor
    up: Tensor
    convolution: bool = False


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """An adapter: its layers by U-Net module path, such as mid_block.attentions.0.transformer_blocks.0.attn1.to_q."""

    layers: Mapping[str, LoraLayer]

    @property
    def rank(self) -> int:
        """The largest rank of any layer; 0 without layers."""
        return max((len(layer.down) for layer in self.layers.values()), default=0)

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


def check_fits(weights: AdapterWeights, unet: nn.Module) -> None:
    """Raise AdapterMismatchError, naming layer and shapes, when an adapter does not fit a U-Net."""
    modules = dict(unet.named_modules())
    for name, layer in weights.layers.items():
        wanted, found = sizes_of(modules.get(name)), (layer.down.shape[1], layer.up.shape[0])
        if wanted is None:
            raise AdapterMismatchError(
                f"layer {name} is not a linear layer or 1x1 convolution of this base model: use the base it was made "
                "for, and a U-Net LoRA of such layers alone"
            )
        if wanted != found:
            raise AdapterMismatchError(
                f"layer {name} takes (in, out) = {wanted} in this base model and {found} in the adapter: "
                "use the base it was made for"
            )


def to_safetensors(weights: AdapterWeights, fmt: AdapterFormat, metadata: Mapping[str, str]) -> bytes:
    """Return the adapter as the bytes of a safetensors file; alpha equals the rank, so no scale is left to apply.

    The header holds `metadata` and the hashes of the tensors.
    """
    if fmt not in get_args(AdapterFormat):
        raise AdapterFormatError(f"format {fmt!r} is unknown: choose one of {', '.join(get_args(AdapterFormat))}")
    if not weights.layers:
        raise AdapterFormatError("an adapter without layers cannot be written: train it first")
    tensors: dict[str, Tensor] = {}
    header = dict(metadata)
    for name, layer in weights.layers.items():
        ones = (1, 1) if layer.convolution else ()
        down, up = (side.reshape(*side.shape, *ones).contiguous() for side in (layer.down, layer.up))
        if fmt == "kohya":
            prefix = _KOHYA_PREFIX + name.replace(".", "_")
            tensors[f"{prefix}.lora_down.weight"], tensors[f"{prefix}.lora_up.weight"] = down, up
            tensors[f"{prefix}.alpha"] = torch.tensor(float(len(down)))
        else:
            prefix = f"unet.{name}" if fmt == "diffusers" else f"{_PEFT_PREFIX}{name}"
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
    weights: AdapterWeights, folder: Path, fmt: AdapterFormat, *, adapter_id: str, metadata: Mapping[str, str]
) -> Path:
    """Write an adapter to `folder` under the file name its format goes by, and return the path of the weights."""
    data = to_safetensors(weights, fmt, metadata)
    names = {"diffusers": DIFFUSERS_WEIGHTS, "peft": PEFT_WEIGHTS, "kohya": f"{adapter_id}.safetensors"}
    path = folder / names[fmt]
    if fmt == "peft":
        write_whole(folder / PEFT_CONFIG, json.dumps(config_for(_ranks(weights)), indent=2).encode())
    write_whole(path, data)
    return path


def read_adapter(source: Path | bytes, *, unet: nn.Module | None = None, unet_only: bool = False) -> AdapterWeights:
    """Read an adapter of any of the three formats; a folder is searched for the file names that write_adapter uses.

    Raises AdapterFormatError for a damaged file, one that is not safetensors, values that are not finite, and, by
    name, for parts this project does not apply (text encoder, larger convolutions, DoRA, LoHa, LoKr, biases). kohya
    files need `unet`: their names write dots as underscores. With `unet` names and shapes are checked too. unet_only
    leaves a text-encoder part out: `text_encoder_keys` says which.
    """
    name, data, beside = _open(source)
    try:
        tensors = load(data)
    except (SafetensorError, ValueError) as error:
        raise AdapterFormatError(
            f"{name} is not a whole safetensors file ({error}): copy or export it again; pickle files are never read"
        ) from error
    tensors = without_text_encoder(name, tensors) if unet_only else tensors
    refuse_foreign(name, tensors)
    config = _config_of(name, data, tensors, beside)
    if config is not None:
        check_config(name, config)
    weights = AdapterWeights(_collect(name, tensors, config, unet))
    if not weights.layers:
        raise AdapterFormatError(f"{name} holds no LoRA layers of a U-Net: choose another file")
    try:
        weights.check_finite()
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{name}: {error}") from None
    if unet is not None:
        check_fits(weights, unet)
    return weights


def text_encoder_keys(source: Path) -> list[str]:
    """Return the names of a file's tensors that belong to a text encoder; raises AdapterFormatError."""
    path = find_weights(source)
    try:
        with safe_open(path, framework="pt") as file:
            keys: list[str] = file.keys()
    except (OSError, SafetensorError, ValueError) as error:
        raise AdapterFormatError(f"{path} cannot be read ({error}): copy or export it again") from error
    return sorted(key for key in keys if is_text_encoder(key))


def _open(source: Path | bytes) -> tuple[str, bytes, Path | None]:
    """Return what to call the source in messages, its bytes, and the adapter_config.json that lies beside it."""
    if isinstance(source, bytes):
        return "the adapter file", source, None
    path = find_weights(source)
    config_path = path.parent / PEFT_CONFIG
    try:
        return str(path), path.read_bytes(), config_path if config_path.is_file() else None
    except OSError as error:
        raise AdapterFormatError(f"{path} cannot be read: {error}; check the path") from error


def _config_of(name: str, data: bytes, tensors: Mapping[str, Tensor], beside: Path | None) -> Mapping[str, Any] | None:
    """Return the LoraConfig of a file: the one beside a file of PEFT, whatever its name, else that of its header."""
    of_peft = any(_PEFT_PREFIX in key for key in tensors)
    if beside is not None and (of_peft or Path(name).name == PEFT_WEIGHTS):
        _check_owner(name, beside)
        try:
            return parse_config(str(beside), beside.read_bytes())
        except OSError as error:
            raise AdapterFormatError(f"{beside} cannot be read: {error}; check the path") from error
    config = header_config(name, data)
    if config is None and of_peft:
        raise AdapterFormatError(f"{name} is a PEFT file, whose scale is in {PEFT_CONFIG}: put that file beside it")
    return config


def _check_owner(name: str, config: Path) -> None:
    """Refuse a config beside a renamed file where the file that PEFT writes it for lies there too."""
    other = config.parent / PEFT_WEIGHTS
    if Path(name).name != PEFT_WEIGHTS and other.is_file():
        raise AdapterFormatError(
            f"{name} lies beside {PEFT_CONFIG}, which belongs to {PEFT_WEIGHTS}: put the file into a folder of its own "
            f"with its own {PEFT_CONFIG}"
        )


def find_weights(source: Path) -> Path:
    """Return the file of weights that a path means: itself, or the one in a folder. Raises AdapterFormatError."""
    path = _weights_file(source) if source.is_dir() else source
    if path.suffix in _PICKLE_SUFFIXES:
        raise AdapterFormatError(f"{path} is a pickle file, which can run code: convert it to safetensors first")
    return path


def _weights_file(folder: Path) -> Path:
    found = [folder / name for name in (DIFFUSERS_WEIGHTS, PEFT_WEIGHTS) if (folder / name).is_file()]
    found = found or sorted(folder.glob("*.safetensors"))
    if not found:
        raise AdapterFormatError(f"{folder} holds no .safetensors file; pickle files (.bin, .pt) are never read")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise AdapterFormatError(f"{folder} holds several adapters ({names}): name one of the files")
    return found[0]


# After the layer: PEFT's lora_A, diffusers' lora.down and lora_linear_layer.down, kohya's lora_down, and to_q_lora.down
# of diffusers' first attention processors. Each has a twin for the up side.
_KEY = re.compile(
    r"(?P<layer>.+?)(?:\.lora_(?:(?P<A>A)|B)(?:\.default)?|[._]lora(?:_linear_layer)?[._](?:(?P<down>down)|up))\.weight"
)


def _collect(
    name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, unet: nn.Module | None
) -> dict[str, LoraLayer]:
    alphas = {key.removesuffix(".alpha"): tensor for key, tensor in tensors.items() if key.endswith(".alpha")}
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    modules = {} if unet is None else dict(unet.named_modules())
    kohya_names = None if unet is None else {path.replace(".", "_"): path for path in modules}
    convolutions = {path for path in modules if is_convolution(modules[path])}
    paths: dict[str, str] = {}
    for key, tensor in tensors.items():
        if key.endswith(".alpha"):
            continue
        match = _KEY.fullmatch(key)
        if match is None or tensor.ndim not in (2, 4) or not tensor.is_floating_point():
            raise AdapterFormatError(f"{name}: {key} is not a LoRA weight of a linear layer: use a plain U-Net LoRA")
        side = downs if match["A"] or match["down"] else ups
        path = _module_path(name, match["layer"], kohya_names)
        if path in side:
            raise AdapterFormatError(f"{name}: {key} and another key are the same weight of {path}: export it again")
        side[path] = tensor.float().flatten(1)  # of a 1x1 convolution [R, in, 1, 1], which is a linear at each pixel
        paths[path] = match["layer"]
        if unet is None and tensor.ndim == 4:
            convolutions.add(path)
    _check_pairs(name, downs, ups)
    stray = sorted(alphas.keys() - set(paths.values()))
    if stray:
        raise AdapterFormatError(f"{name}: {stray[0]}.alpha has no LoRA weights beside it: export it again")
    layers = {}
    for path in sorted(paths):
        rank, alpha = len(downs[path]), alphas.get(paths[path])
        if alpha is not None:
            scale = _alpha_value(name, paths[path], alpha) / rank
        else:
            scale = 1.0 if config is None else scale_of(name, config, path, rank)
        layers[path] = LoraLayer(downs[path], ups[path] * scale, convolution=path in convolutions)
    return layers


def _check_pairs(name: str, downs: Mapping[str, Tensor], ups: Mapping[str, Tensor]) -> None:
    for path in sorted(downs.keys() | ups.keys()):
        if path not in downs or path not in ups:
            raise AdapterFormatError(f"{name}: layer {path} lacks its {'up' if path in downs else 'down'} weight")
        rank, other = len(downs[path]), ups[path].shape[1]
        if rank != other or rank == 0:
            raise AdapterFormatError(f"{name}: layer {path} has rank {rank} in its down weight and {other} in its up")


def _alpha_value(name: str, layer: str, alpha: Tensor) -> float:
    if alpha.numel() != 1:
        raise AdapterFormatError(f"{name}: {layer}.alpha is not one number: export it again")
    return float(alpha)


def _module_path(name: str, raw: str, kohya_names: Mapping[str, str] | None) -> str:
    if not raw.startswith(_KOHYA_PREFIX):
        path = raw.removeprefix("unet.").removeprefix(_PEFT_PREFIX).removeprefix("unet.")
        if ".processor." in path:
            path = path.replace(".processor.", ".")
            path = f"{path}.0" if path.endswith(".to_out") else path
        return path
    if kohya_names is None:
        raise AdapterFormatError(f"{name} is a kohya file: reading it needs the base model, to tell its layers' names")
    known = kohya_names.get(raw.removeprefix(_KOHYA_PREFIX))
    if known is None:
        raise AdapterMismatchError(f"{name}: {raw} is no layer of this base model: use the base it was made for")
    return known


def _ranks(weights: AdapterWeights) -> dict[str, int]:
    return {name: len(layer.down) for name, layer in weights.layers.items()}
