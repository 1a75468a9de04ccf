"""U-Nets of the releases' shapes without weights, and what a step of theirs keeps: counted, not measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

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
    weights = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, key, value, **_: _Attention.apply(query, key, value),
    )
    side = unet.config.sample_size
    added = {"text_embeds": torch.zeros(1, 1280, device="meta"), "time_ids": torch.zeros(1, 6, device="meta")}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        unet(
            torch.zeros(1, 4, side, side, device="meta"),
            torch.zeros(1, device="meta"),
            torch.zeros(1, 77, unet.config.cross_attention_dim, device="meta"),
            added_cond_kwargs=added,
        )
    return sum(tensor.untyped_storage().nbytes() for name, tensor in kept.items() if name not in weights) / 2**20
