"""An embedded base's CLIP, the default judge: its text half is the base's text encoder, of Pocket-XL the second."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

from cat_cluster.errors import BaseModelError


def load_judge(weights: Path) -> CLIPModel:
    """The whole CLIP, fp32: `weights`/judge with the text half of `weights`/text_encoder_2, else /text_encoder."""
    folder = weights / "judge"
    if not (folder / "model.safetensors").is_file():
        raise BaseModelError(
            f"no pocket judge in {weights} (judge/model.safetensors is missing); "
            "point to a folder written by `cat-cluster pocket pretrain`"
        )
    model = CLIPModel(CLIPConfig.from_pretrained(folder))
    text: nn.Module
    if (weights / "text_encoder_2").is_dir():
        text = CLIPTextModelWithProjection.from_pretrained(weights / "text_encoder_2", dtype=torch.float32).text_model
    else:
        text = CLIPTextModel.from_pretrained(weights / "text_encoder", dtype=torch.float32)
    halves = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    halves |= {f"text_model.{name}": tensor for name, tensor in text_transformer(text).state_dict().items()}
    missing, unexpected = model.load_state_dict(halves, strict=False)
    lost = [name for name in missing if not name.endswith("position_ids")]
    if lost or unexpected:
        raise BaseModelError(f"the pocket judge in {weights} does not fit its text encoder: {[*lost, *unexpected][:4]}")
    return model.eval()


def text_transformer(encoder: nn.Module) -> nn.Module:
    """The transformer itself: some versions of transformers wrap it once more."""
    inner = getattr(encoder, "text_model", encoder)
    return inner if isinstance(inner, nn.Module) else encoder
