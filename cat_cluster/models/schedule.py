"""The noise schedule a base model was trained with: noising, the training target, and min-SNR weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from cat_cluster.errors import BaseModelError

PredictionType = Literal["epsilon", "v_prediction"]
SCHEDULER_FILE = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class NoiseSchedule:
    """A variance-preserving schedule: z_t = sqrt(a_t) z0 + sqrt(1 - a_t) noise, a_t = alphas_cumprod[t].

    alphas_cumprod: [T] float64 on the CPU, holding exactly diffusers' float32 values.
    scheduler_config: the base's scheduler config as read, from which samplers take their options.
    """

    alphas_cumprod: Tensor
    prediction_type: PredictionType
    scheduler_config: Mapping[str, Any]

    @classmethod
    def from_config(cls, scheduler_config: Mapping[str, Any]) -> NoiseSchedule:
        """Build from a diffusers scheduler config; missing keys take diffusers' defaults.

        Raises BaseModelError for a prediction type or beta schedule that Stable Diffusion does not use.
        """
        prediction_type = scheduler_config.get("prediction_type", "epsilon")
        if prediction_type not in get_args(PredictionType):
            raise BaseModelError(
                f"prediction_type {prediction_type!r} in {SCHEDULER_FILE} is not supported: "
                "use a base with 'epsilon' or 'v_prediction'."
            )
        betas = _betas(scheduler_config)
        if scheduler_config.get("rescale_betas_zero_snr", False):
            betas = _zero_terminal_snr(betas)
        alphas_cumprod = torch.cumprod(1.0 - betas, dim=0).to(torch.float64)
        return cls(alphas_cumprod, cast(PredictionType, prediction_type), dict(scheduler_config))

    @property
    def num_timesteps(self) -> int:
        """T, the number of training timesteps."""
        return len(self.alphas_cumprod)

    def add_noise(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return z_t = sqrt(a_t) z0 + sqrt(1 - a_t) noise; z0 and noise [B, C, H, W], t [B] integers."""
        signal, sigma = self._signal_and_sigma(z0, t)
        return signal * z0 + sigma * noise

    def target(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the U-Net predicts [B, C, H, W]: the noise, or v = sqrt(a_t) noise - sqrt(1 - a_t) z0."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self._signal_and_sigma(z0, t)
        return signal * noise - sigma * z0

    def snr(self, t: Tensor) -> Tensor:
        """Return the signal-to-noise ratio a_t / (1 - a_t) [B] in float32."""
        alphas = self.alphas_cumprod[t.cpu()]
        return (alphas / (1.0 - alphas)).to(torch.float32).to(t.device)

    def loss_weight(self, t: Tensor, gamma: float | None) -> Tensor:
        """Return the loss weight w(t) [B] in float32: 1 for gamma None, else min-SNR (arXiv 2303.09556).

        min(snr, gamma) / snr for noise prediction, min(snr, gamma) / (snr + 1) for v-prediction.
        """
        if gamma is None:
            return torch.ones(t.shape, dtype=torch.float32, device=t.device)
        snr = self.snr(t)
        if self.prediction_type == "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1.0)
        # The same quotient as min(snr, gamma) / snr, and finite where a zero-terminal schedule has snr = 0.
        return gamma / snr.clamp(min=gamma)

    def _signal_and_sigma(self, like: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self.alphas_cumprod[t.cpu()]
        shape = (-1, *([1] * (like.dim() - 1)))
        signal, sigma = alphas.sqrt().view(shape), (1.0 - alphas).sqrt().view(shape)
        return signal.to(like), sigma.to(like)


def _betas(config: Mapping[str, Any]) -> Tensor:
    """Return the betas [T] in float32, computed as diffusers computes them."""
    trained = config.get("trained_betas")
    if trained is not None:
        return torch.tensor(trained, dtype=torch.float32)
    kind = config.get("beta_schedule", "linear")
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    count = int(config.get("num_train_timesteps", 1000))
    if kind == "linear":
        return torch.linspace(start, end, count, dtype=torch.float32)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    if kind == "squaredcos_cap_v2":
        return torch.tensor([_cosine_beta(step, count) for step in range(count)], dtype=torch.float32)
    raise BaseModelError(
        f"beta_schedule {kind!r} in {SCHEDULER_FILE} is not supported: "
        "use 'scaled_linear', 'linear', 'squaredcos_cap_v2' or trained_betas."
    )


def _cosine_beta(step: int, count: int) -> float:
    """Return beta of one step of the cosine schedule (arXiv 2102.09672, equation 17), at most 0.999."""

    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    return min(1 - alpha_bar((step + 1) / count) / alpha_bar(step / count), 0.999)


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    """Return betas [T] shifted and scaled so that alphas_cumprod ends at 0 (arXiv 2305.08891, algorithm 1)."""
    roots = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    roots = (roots - last) * (first / (first - last))
    alphas_cumprod = roots**2
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - alphas
