from __future__ import annotations

import numpy as np
import torch
from diffusers import DDPMScheduler

from cat_cluster.models.pretraining.noise import add_noise


def test_noisy_latents_are_those_of_diffusers_and_every_noise_level_is_in_every_batch() -> None:
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    clean = torch.randn(20, 8, 4, 6)
    batch = add_noise(clean, scheduler.alphas_cumprod, np.random.default_rng(0))
    torch.testing.assert_close(batch.noisy, scheduler.add_noise(clean, batch.noise, batch.steps))
    torch.testing.assert_close(batch.alpha.flatten(), scheduler.alphas_cumprod[batch.steps])
    assert (batch.steps // 50).tolist() == list(range(20))
    assert batch.noise.std() > 0.9
    again = add_noise(clean, scheduler.alphas_cumprod, np.random.default_rng(0))
    assert torch.equal(again.noisy, batch.noisy)
