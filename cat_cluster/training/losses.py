"""The loss terms of CAT (arXiv 2404.07554) per row, and the sum that keeps the adapters of a pack apart."""

from __future__ import annotations

import torch
from torch import Tensor


def prediction_loss(
    prediction_BCHW: Tensor, target_BCHW: Tensor, weight_B: Tensor, mask_B1HW: Tensor | None = None
) -> Tensor:
    """Return the weighted squared error of each row against its target, [B], in fp32.

    All terms have this form and differ only in prompt, target and the part of the picture, m in [0, 1], that counts:

        identity = w(t) * mean_m (eps_a(z_t, t, y_T) - v)^2                          v = noise or velocity
        cat      = w(t) * mean   (eps_a(z_t, t, y) - eps_base(z_t, t, y))^2          the base prediction is a constant
        outside  = w(t) * mean_(1-m) (eps_a(z_t, t, y_T) - eps_base(z_t, t, y))^2    of photos with a mask

    mean_m f = sum_CHW m f / (C sum_HW m), 0 where m is 0 everywhere: a small object is learned as fast as a large one.
    """
    error = (prediction_BCHW.float() - target_BCHW.detach().float()).square()
    if mask_B1HW is None:
        return weight_B * error.flatten(1).mean(1)
    places = mask_B1HW.sum((1, 2, 3)) * error.shape[1]
    return weight_B * (error * mask_B1HW).sum((1, 2, 3)) / places.clamp_min(1e-6)


def pack_loss(loss_B: Tensor, weight_B: Tensor) -> Tensor:
    """Return sum_i weight_i * loss_i; the row weights already hold weight_k, alpha_k and the row counts.

        L_a = sum_k weight_k (identity_k + alpha_k (cat_k + outside_k)) / sum_k weight_k,      pack loss = sum_a L_a

    The gradient of each summand is its own: a NaN row changes no gradient of another adapter's slot.
    """
    return torch.sum(weight_B * loss_B)
