"""Checkpoints in the layout of Stable Diffusion's own repository, written from diffusers folders by hand.

The names are those of CompVis' ldm and Stability's generative-models: what A1111 and ComfyUI read. Written without the
library's converters, which read them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]

_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
)
_ENDS = (
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
)
_OPEN_CLIP = (
    ("encoder.layers.", "transformer.resblocks."),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("final_layer_norm", "ln_final"),
)


def write_checkpoint(
    folder: Path,
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    marks: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a base's folder as one file. marks: further tensors, such as ComfyUI's v_pred."""
    found: Tensors = {f"model.diffusion_model.{key}": value for key, value in _unet(folder).items()}
    found |= {f"first_stage_model.{key}": value for key, value in _vae(folder).items()}
    first = load_file(folder / "text_encoder" / "model.safetensors")
    if (folder / "text_encoder_2").is_dir():
        found |= _clip(first, "conditioner.embedders.0.transformer.")
        second = load_file(folder / "text_encoder_2" / "model.safetensors")
        found |= _open_clip(second, "conditioner.embedders.1.model.")
    elif json.loads((folder / "unet" / "config.json").read_text())["use_linear_projection"]:
        found |= _open_clip(first, "cond_stage_model.model.")
    else:
        found |= _clip(first, "cond_stage_model.transformer.")
    kept = {key: value.to(dtype).contiguous() for key, value in found.items()}
    save_file({**kept, **(marks or {})}, path, metadata=dict(metadata or {}))
    return path


def _unet(folder: Path) -> Tensors:
    config = json.loads((folder / "unet" / "config.json").read_text())
    layers, names = config["layers_per_block"], {}
    for place in range(len(config["down_block_types"])):
        for layer in range(layers):
            at = 1 + place * (layers + 1) + layer
            names[f"down_blocks.{place}.resnets.{layer}."] = f"input_blocks.{at}.0."
            names[f"down_blocks.{place}.attentions.{layer}."] = f"input_blocks.{at}.1."
        names[f"down_blocks.{place}.downsamplers.0.conv."] = f"input_blocks.{1 + place * (layers + 1) + layers}.0.op."
    for place, kind in enumerate(config["up_block_types"]):
        for layer in range(layers + 1):
            at = place * (layers + 1) + layer
            names[f"up_blocks.{place}.resnets.{layer}."] = f"output_blocks.{at}.0."
            names[f"up_blocks.{place}.attentions.{layer}."] = f"output_blocks.{at}.1."
        behind = 2 if "CrossAttn" in kind else 1
        last = place * (layers + 1) + layers
        names[f"up_blocks.{place}.upsamplers.0.conv."] = f"output_blocks.{last}.{behind}.conv."
    names |= {"mid_block.resnets.0.": "middle_block.0.", "mid_block.attentions.0.": "middle_block.1."}
    names |= {"mid_block.resnets.1.": "middle_block.2."}
    found = {}
    for key, value in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        start = next((one for one in names if key.startswith(one)), None)
        if start is None:
            new = _replaced(key, _ENDS)
        else:
            new = names[start] + (_replaced(key[len(start) :], _RESNET) if ".resnets." in start else key[len(start) :])
        found[new] = value
    return found


def _vae(folder: Path) -> Tensors:
    count = len(json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"])
    found = {}
    for key, value in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        new = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", key)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{count - 1 - int(m[1])}.block.{m[2]}", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{count - 1 - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "mid_block.attentions.0" in new:
            new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            for ours, theirs in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
                new = new.replace(f".{ours}.", f".{theirs}.")
            value = value[:, :, None, None] if value.ndim == 2 else value  # they are 1x1 convolutions there
        found[new] = value
    return found


def _clip(tensors: Tensors, prefix: str) -> Tensors:
    """CLIP's own text encoder in the layout of transformers, with a buffer that is no weight."""
    found = {f"{prefix}text_model.{key.removeprefix('text_model.')}": value for key, value in tensors.items()}
    found[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(77.0).unsqueeze(0)
    return found


def _open_clip(tensors: Tensors, prefix: str) -> Tensors:
    found: Tensors = {}
    for key, value in tensors.items():
        short = key.removeprefix("text_model.")
        if short == "text_projection.weight":
            found[f"{prefix}text_projection"] = value.T
        elif ".self_attn.q_proj." in short:
            side = short.rpartition(".")[2]
            parts = [tensors[key.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")]
            start = _replaced(short.partition(".self_attn")[0], _OPEN_CLIP)
            found[f"{prefix}{start}.attn.in_proj_{side}"] = torch.cat(parts)
        elif not re.search(r"self_attn\.[kv]_proj", short):
            found[prefix + _replaced(short, _OPEN_CLIP)] = value
    return found


def _replaced(text: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for ours, theirs in pairs:
        text = text.replace(ours, theirs)
    return text
