"""Editing an image: denoising begins at the image with noise on it, and keeps what a mask does not mark.

As diffusers' StableDiffusionImg2ImgPipeline does it (SDEdit, arXiv 2108.01073), and StableDiffusionInpaintPipeline with
a U-Net of four channels: the same seed gives the same image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cat_cluster.errors import SpecError
from cat_cluster.models.edit_steps import steps_made
from cat_cluster.models.samplers import SamplerTable


@dataclass(frozen=True, eq=False)
class EditSource:
    """An image to edit. pixels: [3, H, W] in [-1, 1]; mask: [H, W] bool, True where it is edited, None: everywhere.

    strength: the share of the steps that are made, in (0, 1].
    """

    pixels: Tensor
    mask: Tensor | None
    strength: float

    @classmethod
    def of(cls, pixels: NDArray[np.uint8], mask: NDArray[np.bool_] | None, strength: float) -> EditSource:
        """Return the source of an image, uint8 [H, W, 3], and its mask, bool [H, W]."""
        levels = torch.from_numpy(pixels.astype(np.float32)).movedim(-1, 0)
        return cls(levels / 255.0 * 2.0 - 1.0, None if mask is None else torch.from_numpy(mask.copy()), strength)

    def check_mask(self, unit: int) -> None:
        """Raise SpecError for a mask of which nothing is left in latents of `unit` pixels a side.

        A latent is edited where the first of its pixels is, as start_from_image has it.
        """
        if self.mask is not None and not bool(self.mask[::unit, ::unit].any()):
            raise SpecError(
                "mask: what it marks, or the image by its transparent areas, is too small to be edited: of each "
                f"{unit}x{unit} pixels the one at the top left counts, and none of these is marked; mark a larger area"
            )


@dataclass(frozen=True, eq=False)
class KeptAreas:
    """What an edit puts back after each step. edited: [1, H, W], 1 where it edits, else 0; image, noise: [C, H, W]."""

    edited: Tensor
    image: Tensor
    noise: Tensor

    def put_back(self, latents: Tensor, table: SamplerTable, step: int) -> Tensor:
        """Return the latents [C, H, W] after `step` of a table, with the image around them as noisy as they are."""
        is_last = step + 1 >= len(table)
        signal = 1.0 if is_last else float(table.signal[step + 1])
        noise = 0.0 if is_last else float(table.noise[step + 1])
        return (1.0 - self.edited) * (signal * self.image + noise * self.noise) + self.edited * latents


def edit_table(table: SamplerTable, steps: int, strength: float) -> SamplerTable:
    """Return the part of a sampler's table that an edit makes; see steps_made."""
    # A table with fewer steps than were asked for (trailing spacing) loses as many of its first ones as another.
    return table.after(min(steps - steps_made(steps, strength), len(table) - 1))
