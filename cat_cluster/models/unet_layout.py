"""The layout of a base's U-Net without its weights: for what depends on the names of its layers alone."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from cat_cluster.models.base_files import read_config
from cat_cluster.models.base_names import base_folder


def unet_layout(name: str) -> UNet2DConditionModel:
    """Return the U-Net of a base by name, on the meta device: every module in its place, no weights, no memory.

    Raises BaseModelError where there is no such base.
    """
    with torch.device("meta"):
        unet: UNet2DConditionModel = UNet2DConditionModel.from_config(read_config(base_folder(name), "unet"))
    return unet
