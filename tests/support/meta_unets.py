"""Models of the releases' shapes without weights, and what a step of theirs keeps: counted, not measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from cat_cluster.lora.bank import adapted_layers

# unet/config.json of Stable Diffusion 1.5 (the other defaults are diffusers') and of Stable Diffusion XL 1.0.
SD15: Mapping[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
SDXL: Mapping[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


# text_encoder/config.json of Stable Diffusion 1.5, and text_encoder_2's of Stable Diffusion XL 1.0.
CLIP_L: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
CLIP_G: Mapping[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
}


class _Attention(torch.autograd.Function):
    """An attention that keeps what the fused kernels keep: its inputs and its output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output


def meta_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """Return a U-Net on the device that has shapes alone."""
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def kept_by_a_row(config: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> float:
    """Return the MiB in fp32 that a forward of one row keeps for the backward of a LoRA in all its linears."""
    unet = meta_unet(config)
    layers = list(adapted_layers(unet, "attention_ff"))
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=8, target_modules=layers))
    unet.to("meta")
    side = unet.config.sample_size
    added = {"text_embeds": torch.zeros(1, 1280, device="meta"), "time_ids": torch.zeros(1, 6, device="meta")}
    return _kept(
        unet,
        lambda: unet(
            torch.zeros(1, 4, side, side, device="meta"),
            torch.zeros(1, device="meta"),
            torch.zeros(1, 77, unet.config.cross_attention_dim, device="meta"),
            added_cond_kwargs=added,
        ),
        monkeypatch,
    )


def meta_text_encoder(config: Mapping[str, Any]) -> CLIPTextModel:
    """Return a text encoder on the device that has shapes alone."""
    with torch.device("meta"):
        return CLIPTextModel(CLIPTextConfig(**config))


def kept_by_a_text(configs: Sequence[Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch) -> float:
    """Return the MiB in fp32 that text encoders keep of one prompt for the backward of a LoRA in all their linears."""
    total = 0.0
    for config in configs:
        encoder = meta_text_encoder(config)
        encoder.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=8, target_modules=r".*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"), encoder)
        encoder.to("meta")
        ids = torch.zeros(1, 77, dtype=torch.long, device="meta")
        total += _kept(encoder, partial(encoder, ids), monkeypatch)
    return total


def _kept(model: nn.Module, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> float:
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, key, value, **_: _Attention.apply(query, key, value),
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(tensor.untyped_storage().nbytes() for name, tensor in kept.items() if name not in weights) / 2**20
