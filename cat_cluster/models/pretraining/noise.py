"""Noise prediction: noisy latents of a batch, and the loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

_SNR_GAMMA = 5.0


@dataclass(frozen=True)
class NoisyBatch:
    """Latents [B, C, H, W] with noise at timesteps [B]; `alpha` [B, 1, 1, 1] is the cumulated alpha of each."""

    noisy: torch.Tensor
    steps: torch.Tensor
    noise: torch.Tensor
    alpha: torch.Tensor


def add_noise(clean: torch.Tensor, alphas: torch.Tensor, rng: np.random.Generator) -> NoisyBatch:
    """z_t = sqrt(alpha_t) z_0 + sqrt(1 - alpha_t) e, with t stratified: every noise level in every batch."""
    noise = torch.from_numpy(rng.standard_normal(tuple(clean.shape), dtype=np.float32)).to(clean)
    strata = (np.arange(len(clean)) + rng.random(len(clean))) / len(clean)
    steps = torch.from_numpy((strata * len(alphas)).astype(np.int64)).to(clean.device)
    alpha = alphas[steps].view(-1, 1, 1, 1)
    return NoisyBatch(alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, steps, noise, alpha)


def snr_weighted(predicted: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """min(snr, 5) / snr * (e - v)^2, the mean over B C H W (min-SNR, Hang et al. 2023); `alpha` is [B, 1, 1, 1]."""
    snr = alpha / (1 - alpha)
    loss: torch.Tensor = (snr.clamp(max=_SNR_GAMMA) / snr * (predicted - noise) ** 2).mean()
    return loss
