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


def plain_replacement(prompt: str, token: str, word: str) -> str:
    """Return a prompt with a word in the token's place, letter by letter: words end at spaces and commas."""
    out, current = "", ""
    for letter in prompt + " ":
        if letter in " ,\n\t":
            out += (word if current.lower() == token.lower() else current) + letter
            current = ""
        else:
            current += letter
    return out[:-1]
