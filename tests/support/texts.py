"""Texts as a base reads them, and the sizes of pictures that tests make up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.conditioning import Sizes


def states_of(base: BaseModel, prompts: Sequence[str]) -> Tensor:
    """Return the states [B, L, D] of prompts."""
    return torch.stack([text.states for text in base.text_encoders.encode(prompts)])


def square_sizes(count: int, side: int = 16) -> tuple[Sizes, ...]:
    """Return the sizes of so many pictures that are whole squares."""
    return (Sizes.drawn(side, side),) * count
