"""The noise that some samplers add at each step: an image's own, from its seed, whatever shares its calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class StepNoise:
    """The noise of an image's steps, one draw for each, behind those of its first latents.

    As a stock pipeline of batch 1 draws with a CPU generator: it depends on the seed, the size and the dtype alone.
    """

    def __init__(self, generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype) -> None:
        """generator: that drew the first latents; shape: (C, H, W)."""
        self._generator, self._shape, self._dtype = generator, (1, *shape), dtype
        self._drawn = 0
        self._latest = torch.empty(0)

    def of(self, step: int) -> Tensor:
        """Return the noise of a step [C, H, W], float32 on the CPU: of the next one, or of the last one again.

        So a step whose call failed has the same noise when it is made again. Raises ValueError for an earlier one.
        """
        if step < self._drawn - 1:
            raise ValueError(f"step {step} comes again after step {self._drawn - 1}, and its noise is not kept")
        while self._drawn <= step:
            drawn = torch.randn(self._shape, generator=self._generator, dtype=self._dtype)
            self._latest = drawn[0].float()
            self._drawn += 1
        return self._latest


@dataclass(frozen=True, eq=False)
class CallNoise:
    """The noise of a call. places: [n] of the images that get some; values: [n, C, H, W] float32, on the device."""

    places: Tensor
    values: Tensor


def gather_noise(noises: Sequence[StepNoise | None], steps: Sequence[int], device: torch.device) -> CallNoise | None:
    """Return the noise of a call at each image's step, on `device`; None when no image gets any."""
    drawn = {place: noise.of(steps[place]) for place, noise in enumerate(noises) if noise is not None}
    if not drawn:
        return None
    return CallNoise(_moved(torch.tensor(list(drawn)), device), _moved(torch.stack(list(drawn.values())), device))


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    # From pinned memory, or the copy would wait for the U-Net call that is under way.
    return tensor.pin_memory().to(device, non_blocking=True)
