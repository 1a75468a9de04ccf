"""The loss terms of CAT (arXiv 2404.07554) per row, and the sum that keeps the adapters of a pack apart."""

from __future__ import annotations

import torch
from torch import Tensor


def prediction_loss(prediction_BCHW: Tensor, target_BCHW: Tensor, weight_B: Tensor) -> Tensor:
    """Return the weighted squared error of each row against its target, [B], in fp32.

    Both terms of CAT have this form and differ only in prompt and target:

        identity = w(t) * mean_CHW (eps_a(z_t, t, y_T) - v)^2                    v = noise or velocity
        cat      = w(t) * mean_CHW (eps_a(z_t, t, y) - eps_base(z_t, t, y))^2    the base prediction is a constant
    """
    error = prediction_BCHW.float() - target_BCHW.detach().float()
    return weight_B * error.square().flatten(1).mean(1)


def pack_loss(loss_B: Tensor, weight_B: Tensor) -> Tensor:
    """Return sum_i weight_i * loss_i; the row weights already hold weight_k, alpha_k and the row counts.

        L_a = sum_k weight_k (identity_k + alpha_k cat_k) / sum_k weight_k,      pack loss = sum_a L_a

    The gradient of each summand is its own: a NaN row changes no gradient of another adapter's slot.
    """
    return torch.sum(weight_B * loss_B)
