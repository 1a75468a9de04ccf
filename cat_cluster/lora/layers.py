"""Which layers of a base an adapter can change: linears, and 1x1 convolutions, which are a linear at each pixel.

A layer of the U-Net goes by its module path; one of a text encoder by `text_encoder.` or `text_encoder_2.` and its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

TEXT_ENCODERS = ("text_encoder.", "text_encoder_2.")  # what paths of their layers begin with


def sizes_of(module: nn.Module | None) -> tuple[int, int] | None:
    """Return (in, out) of a layer that an adapter can change, also through a bank that sits there; None for others."""
    module = getattr(module, "base", module)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv2d) and _is_pointwise(module):
        return module.in_channels, module.out_channels
    return None


def in_text_encoder(layer: str) -> bool:
    """Say whether a layer, by its path, is one of a text encoder; else it is one of the U-Net."""
    return layer.startswith(TEXT_ENCODERS)


def part_of(layer: str) -> str:
    """Return which part of a base a layer is in, by its path with dots or underscores, as diffusers calls the part."""
    return next((part for part in ("text_encoder_2", "text_encoder") if layer.startswith(part)), "unet")


def is_convolution(module: nn.Module | None) -> bool:
    """Say whether a layer is a convolution, also through a bank that sits there."""
    return isinstance(getattr(module, "base", module), nn.Conv2d)


def change_of_pixels(x_BIHW: Tensor, down_BRI: Tensor, up_BOR: Tensor) -> Tensor:
    """Return what adapters add to the output of a 1x1 convolution, [B, out, H, W]; one product per row."""
    hidden_BTR = torch.bmm(x_BIHW.flatten(2).mT, down_BRI.to(x_BIHW.dtype).mT)
    change_BTO = torch.bmm(hidden_BTR, up_BOR.to(hidden_BTR.dtype).mT)
    rows, _, height, width = x_BIHW.shape
    return change_BTO.mT.reshape(rows, -1, height, width)


def _is_pointwise(module: nn.Conv2d) -> bool:
    plain = module.groups == 1 and module.stride == (1, 1) and module.padding in ((0, 0), "valid")
    return plain and module.kernel_size == (1, 1)
