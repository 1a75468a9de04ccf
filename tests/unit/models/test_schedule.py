"""The schedule against diffusers' own schedulers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr

from cat_cluster.errors import BaseModelError
from cat_cluster.models.schedule import NoiseSchedule

STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CONFIGS: list[dict[str, Any]] = [
    {},
    STABLE,
    {"beta_schedule": "linear", "beta_start": 0.0002, "beta_end": 0.01, "num_train_timesteps": 400},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.01 + 0.002 * step for step in range(50)], "num_train_timesteps": 50},
    {**STABLE, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_alphas_cumprod_are_diffusers_values(config: dict[str, Any]) -> None:
    schedule = NoiseSchedule.from_config(config)
    oracle = DDIMScheduler(**config)
    assert schedule.alphas_cumprod.dtype == torch.float64
    assert schedule.num_timesteps == len(oracle.alphas_cumprod)
    torch.testing.assert_close(schedule.alphas_cumprod.float(), oracle.alphas_cumprod, rtol=0, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("config", CONFIGS[:-1])
def test_add_noise_and_target_equal_diffusers(config: dict[str, Any], prediction_type: str) -> None:
    config = {**config, "prediction_type": prediction_type}
    schedule, oracle = NoiseSchedule.from_config(config), DDPMScheduler(**config)
    generator = torch.Generator().manual_seed(0)
    z0, noise = torch.randn(2, 5, 4, 8, 8, generator=generator).unbind()
    t = torch.tensor([0, 1, 17, 30, schedule.num_timesteps - 1])
    torch.testing.assert_close(schedule.add_noise(z0, noise, t), oracle.add_noise(z0, noise, t))
    expected = noise if prediction_type == "epsilon" else oracle.get_velocity(z0, noise, t)
    torch.testing.assert_close(schedule.target(z0, noise, t), expected)


@pytest.mark.parametrize("gamma", [0.5, 5.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_follow_diffusers_recipe(prediction_type: str, gamma: float) -> None:
    config = {**STABLE, "prediction_type": prediction_type}
    schedule = NoiseSchedule.from_config(config)
    t = torch.arange(schedule.num_timesteps)
    snr = compute_snr(DDPMScheduler(**config), t)
    torch.testing.assert_close(schedule.snr(t), snr, rtol=1e-4, atol=0)
    clipped = torch.stack([snr, torch.full_like(snr, gamma)], dim=1).min(dim=1).values
    expected = clipped / snr if prediction_type == "epsilon" else clipped / (snr + 1)
    torch.testing.assert_close(schedule.loss_weight(t, gamma), expected, rtol=1e-4, atol=0)


def test_no_gamma_means_weight_one() -> None:
    schedule = NoiseSchedule.from_config(STABLE)
    assert schedule.loss_weight(torch.tensor([0, 500, 999]), None).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("prediction_type", "last"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_min_snr_is_finite_at_zero_terminal_snr(prediction_type: str, last: float) -> None:
    config = {**STABLE, "rescale_betas_zero_snr": True, "prediction_type": prediction_type}
    schedule = NoiseSchedule.from_config(config)
    assert schedule.snr(torch.tensor([999])).item() == 0.0
    assert schedule.loss_weight(torch.tensor([999]), 5.0).item() == last


def test_add_noise_keeps_the_latents_dtype() -> None:
    schedule = NoiseSchedule.from_config(STABLE)
    z0 = torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16)
    assert schedule.add_noise(z0, z0 + 1, torch.tensor([10])).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "named"),
    [({"prediction_type": "sample"}, "prediction_type 'sample'"), ({"beta_schedule": "sigmoid"}, "'sigmoid'")],
)
def test_unsupported_schedules_are_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(BaseModelError, match=named):
        NoiseSchedule.from_config(config)
