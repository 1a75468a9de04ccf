"""The teacher: the same U-Net with every row on slot 0, the zero adapter, and the base's own text embeddings."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from cat_cluster.lora.bank import LoraBank


@torch.no_grad()
def predict_base(
    unet: UNet2DConditionModel, bank: LoraBank, noisy_BCHW: Tensor, timestep_B: Tensor, text_BLD: Tensor
) -> Tensor:
    """Return the frozen base model's prediction, [B, C, H, W].

    Call it before the student's forward: modules must not be rebound between a forward and its backward
    (gradient checkpointing recomputes with the binding of that moment).
    """
    with bank.rows([0] * len(noisy_BCHW)):
        prediction: Tensor = unet(noisy_BCHW, timestep_B, text_BLD, return_dict=False)[0]
    return prediction
