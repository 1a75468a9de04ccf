"""How an image begins: from noise alone, or from another image with noise on it.

The same seed draws what a stock pipeline of batch 1 draws with a CPU generator, in its order: the first latents, and
then a sampler's noise of each step. Draws are made on the CPU in the base's dtype, and carried in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.edit import KeptAreas
from cat_cluster.models.samplers import SamplerTable
from cat_cluster.models.step_noise import StepNoise


@dataclass(frozen=True, eq=False)
class ImageStart:
    """latents: the first ones [C, H, W], float32; noise: of the steps, None where the sampler adds none.

    kept: what an edit with a mask puts back after each step.
    """

    latents: Tensor
    noise: StepNoise | None
    kept: KeptAreas | None = None


def start_from_noise(
    base: BaseModel, seed: int, table: SamplerTable, size: tuple[int, int] | None = None
) -> ImageStart:
    """Return the start of an image from noise alone; size: latent (H, W), None: the base's own."""
    height, width = size or (base.latent_size, base.latent_size)
    draws = _Draws(base, seed, height, width)
    return ImageStart(draws.next().to(base.device, torch.float32) * table.initial_scale, draws.of_steps(table))


def start_from_image(
    base: BaseModel, moments: Tensor, mask: Tensor | None, strength: float, seed: int, table: SamplerTable
) -> ImageStart:
    """Return the start of an edit.

    moments: of the image by the VAE [2C, H, W]; mask: as in EditSource; table: of edit_table. The seed draws first the
    VAE's noise, then the noise on the image. With a mask and strength 1 the image is no part of the first latents.
    """
    height, width = moments.shape[-2:]
    draws = _Draws(base, seed, height, width)
    of_vae, drawn = (draws.next().to(base.device) for _ in range(2))
    image = base.sample_latents(moments.unsqueeze(0), of_vae.unsqueeze(0))[0].float()
    noise = drawn.float()
    noisy = float(table.signal[0]) * image + float(table.noise[0]) * noise
    if mask is None:
        return ImageStart(noisy, draws.of_steps(table))
    # To the nearest pixel, as the stock pipeline reduces it.
    edited = functional.interpolate(mask[None, None].to(base.device, torch.float32), size=(height, width))[0]
    latents = noise * table.initial_scale if strength == 1.0 else noisy
    # The stock pipeline has the VAE draw once more, for the masked image, although a U-Net of four channels sees none.
    return ImageStart(latents, draws.of_steps(table, skipped=1), KeptAreas(edited, image, noise))


class _Draws:
    """What one generator of a seed draws, latents of one size after another."""

    def __init__(self, base: BaseModel, seed: int, height: int, width: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._shape, self._dtype = (base.latent_channels, height, width), base.dtype

    def next(self) -> Tensor:
        """Return the next draw [C, H, W], on the CPU in the base's dtype."""
        return torch.randn((1, *self._shape), generator=self._generator, dtype=self._dtype)[0]

    def of_steps(self, table: SamplerTable, *, skipped: int = 0) -> StepNoise | None:
        """Return what follows, without as many draws as are `skipped`, as the noise of the table's steps."""
        if not table.adds_noise:
            return None
        for _ in range(skipped):
            self.next()
        return StepNoise(self._generator, self._shape, table.noise_dtype or self._dtype)
