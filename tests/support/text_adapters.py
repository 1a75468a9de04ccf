"""Adapters of U-Net and text encoders, as files of other programs have them, and what stock pipelines draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from cat_cluster.lora.bank import adapted_layers, served_layers
from cat_cluster.lora.formats import AdapterWeights, LoraLayer
from cat_cluster.models.base_model import BaseModel

# Written out, so that a layer that nobody adapts is missed.
OF_CLIP = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
)


def text_paths(base: BaseModel) -> list[str]:
    """Diffusers' names of every layer of the text encoders that kohya's trainer adapts."""
    names = ("text_encoder", "text_encoder_2")
    return [
        f"{name}.text_model.encoder.layers.{number}.{layer}"
        for name, model in zip(names, base.text_encoders.models, strict=False)
        for number in range(model.config.num_hidden_layers)
        for layer in OF_CLIP
    ]


def whole_adapter(
    base: BaseModel, seed: int = 0, *, rank: int = 4, unet: bool = True, text: float = 0.3, everywhere: bool = False
) -> AdapterWeights:
    """Random values in every layer that kohya's trainer adapts; `text`: the size of ups in text encoders, 0: none.

    everywhere: in all linears of the U-Net, as ai-toolkit does.
    """
    generator = torch.Generator().manual_seed(seed)
    names = list(adapted_layers(base.unet, "attention_ff")) if unet else []
    if everywhere:
        names = [name for name in served_layers(base.unet, "all") if isinstance(linear(base.unet, name), nn.Linear)]
    layers = {}
    for name in [*names, *(text_paths(base) if text else [])]:
        module, size = linear(base.network, name), text if name.startswith("text_encoder") else 0.3
        assert isinstance(module, nn.Linear)
        down = torch.randn(rank, module.in_features, generator=generator) * module.in_features**-0.5
        layers[name] = LoraLayer(down, size * torch.randn(module.out_features, rank, generator=generator))
    return AdapterWeights(layers)


def linear(network: nn.Module, name: str) -> nn.Module:
    """The module of a layer, also where a bank has its place."""
    module = network.get_submodule(name)
    found: nn.Module = getattr(module, "base", module)
    return found


def kohya_file(weights: AdapterWeights, path: Path, *, xl: bool, alpha: float | None = None) -> Path:
    """What kohya's trainer writes, `lora_unet_*` and `lora_te_*`, of an SDXL `lora_te1_*` and `lora_te2_*`.

    alpha: None for the rank. The ups are divided by alpha / rank, so that the file means the weights.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in weights.layers.items():
        part, _, rest = name.partition(".")
        prefix = {"text_encoder": "lora_te1" if xl else "lora_te", "text_encoder_2": "lora_te2"}.get(part, "lora_unet")
        flat = (name if prefix == "lora_unet" else rest).replace(".", "_")
        scale = 1.0 if alpha is None else alpha / len(layer.down)
        tensors[f"{prefix}_{flat}.lora_down.weight"] = layer.down
        tensors[f"{prefix}_{flat}.lora_up.weight"] = layer.up / scale
        tensors[f"{prefix}_{flat}.alpha"] = torch.tensor(float(len(layer.down) if alpha is None else alpha))
    save_file(tensors, path, {"ss_network_dim": "4"})
    return path


def diffusers_file(weights: AdapterWeights, path: Path, *, text_model: bool = True) -> Path:
    """What diffusers writes; text_model: with the module that newer versions of transformers leave out."""
    tensors: dict[str, Tensor] = {}
    for name, layer in weights.layers.items():
        key = name if name.startswith("text_encoder") else f"unet.{name}"
        key = key if text_model else key.replace("text_model.", "")
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = layer.down, layer.up
    save_file(tensors, path)
    return path


def stock_pipeline(folder: Path, *, xl: bool) -> Any:
    """The stock pipeline of a base."""
    pipeline = (StableDiffusionXLPipeline if xl else StableDiffusionPipeline).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
