"""Fisher drift: how far the adapter's noise predictions left the base model's on prompts without the token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cat_cluster.evaluation.metrics import Array
from cat_cluster.lora.bank import LoraBank
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.conditioning import Conditioning, Sizes, Text

TIMESTEPS = 10
ROWS_PER_CALL = 32


@torch.no_grad()
def fisher_drift(
    base: BaseModel,
    bank: LoraBank,
    slot: int,
    images_NCHW: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> Array:
    """Return the CAT term per base image, [N], from base images [N, 3, H, W] in [0, 1] and their prompts y.

    fisher_n = mean_k mean_CHW (eps_a(z_t, t_k, y) - eps_base(z_t, t_k, y))^2,   z_t = add_noise(z0_n, e_n, t_k)

    z0 is the mean latent of the base image, e_n is drawn once per image from its seed, and t_k is one timestep
    from each of 10 equal strata. Each side reads y as its own text encoders make it. Small changes of the weights move
    it quadratically: hence the name.
    """
    latents = torch.cat(
        [_mean_latents(base, images_NCHW[i : i + ROWS_PER_CALL]) for i in range(0, len(images_NCHW), ROWS_PER_CALL)]
    )
    noise = torch.stack([_noise(seed, latents.shape[1:]) for seed in seeds]).to(latents)
    timesteps = stratified_timesteps(base.schedule.num_timesteps, seeds)
    plain_texts, adapted_texts = (_encoded(base, bank, of_slot, sorted(set(prompts))) for of_slot in (0, slot))
    sizes = Sizes.drawn(*images_NCHW.shape[-2:])
    cells = [(n, k) for n in range(len(latents)) for k in range(TIMESTEPS)]
    losses: list[Tensor] = []
    for start in range(0, len(cells), ROWS_PER_CALL):
        chosen = cells[start : start + ROWS_PER_CALL]
        rows = [n for n, _ in chosen]
        t = torch.tensor([timesteps[n][k] for n, k in chosen], device=base.device)
        noisy = base.schedule.add_noise(latents[rows], noise[rows], t)
        # Two calls of one shape: an adapter that changes nothing then gives exactly 0.
        adapted, plain = (
            _predict(base, bank, s, noisy, t, Conditioning.of([texts[prompts[n]] for n in rows], [sizes] * len(rows)))
            for s, texts in ((slot, adapted_texts), (0, plain_texts))
        )
        losses.append((adapted.float() - plain.float()).square().flatten(1).mean(1).cpu())
    per_image: Array = torch.cat(losses).double().view(len(latents), TIMESTEPS).mean(1).numpy()
    return per_image


def stratified_timesteps(count: int, seeds: Sequence[int]) -> list[list[int]]:
    """Return per seed one timestep from each of 10 equal strata of [0, count), drawn from the seed alone."""
    return [
        [int((k + u) * count / TIMESTEPS) for k, u in enumerate(np.random.default_rng([seed, 2]).random(TIMESTEPS))]
        for seed in seeds
    ]


def _mean_latents(base: BaseModel, images_NCHW: Tensor) -> Tensor:
    moments = base.encode_moments(images_NCHW * 2.0 - 1.0)
    return base.sample_latents(moments, torch.zeros_like(moments.chunk(2, dim=1)[0]))


def _noise(seed: int, shape: torch.Size) -> Tensor:
    # Not the stream of the image itself: there the same seed drew the latents it was denoised from.
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed ^ 0x5EED))


def _encoded(base: BaseModel, bank: LoraBank, slot: int, prompts: Sequence[str]) -> dict[str, Text]:
    with bank.text_rows([slot] * len(prompts)):
        return dict(zip(prompts, base.text_encoders.encode(prompts), strict=True))


def _predict(
    base: BaseModel, bank: LoraBank, slot: int, noisy_BCHW: Tensor, timestep_B: Tensor, conditioning: Conditioning
) -> Tensor:
    with bank.rows([slot] * len(noisy_BCHW)):
        prediction: Tensor = base.unet(noisy_BCHW, timestep_B, **conditioning.arguments(), return_dict=False)[0]
    return prediction
