"""Prompts of any length, with the weights of their words, as the U-Net reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias

import torch
from torch import Tensor

from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.conditioning import Text
from cat_cluster.models.prompt_weights import Prompt
from cat_cluster.models.text_limit import TextLimit

_LEAST_MEAN = 1e-3  # of the mean size of the values: below that a mean is little more than rounding


# Binds the rows of a text encoder's call to adapters: given for each row the place of its prompt.
BindRows: TypeAlias = Callable[[Sequence[int]], AbstractContextManager[None]]


def encode_prompts(
    base: BaseModel, limit: TextLimit, prompts: Sequence[Prompt], bind: BindRows | None = None
) -> list[Text]:
    """Return each prompt's text of n chunks; of one chunk without weights, what the encoders' `encode` returns.

    limit: the base's, for this thread. bind: puts adapters into the encoders, and a gradient reaches those that are
    trained; None: the base alone. Every chunk is encoded alone, and the states of its tokens are weighted:

        z' = w z,   z'' = z' mean(z) / mean(z')     (w [L, 1]: the tokens' weights, 1 for marks and padding)

    Means are over the chunk [L, D] of each encoder, as AUTOMATIC1111 has it (`EmphasisOriginal` in its
    modules/sd_emphasis.py; there over the chunks of all prompts of a batch, so that these change each other). A mean
    that is rounding alone is not restored. The pooled text is that of the first chunk, without weights, as there.
    Raises SpecError for a weight that cannot be.
    """
    read = [limit.chunks(prompt) for prompt in prompts]
    chunks = [chunk for own in read for chunk in own]
    owners = [place for place, own in enumerate(read) for _ in own]
    with nullcontext() if bind is None else bind(owners):
        states, pooled = base.text_encoders.encode_chunks([chunk.tokens for chunk in chunks])
    weighted = [list(of_encoder) for of_encoder in states]
    for row, chunk in enumerate(chunks):
        if any(weight != 1.0 for weight in chunk.weights):
            weights = torch.ones(limit.tokens)
            weights[1 : len(chunk.weights) + 1] = torch.tensor(chunk.weights)
            for of_encoder in weighted:
                of_encoder[row] = _weighted(of_encoder[row], weights.to(base.device))
    texts, start = [], 0
    for prompt, own in zip(prompts, read, strict=True):
        rows = range(start, start + len(own))
        joined = [torch.cat([of_encoder[row] for row in rows]) for of_encoder in weighted]
        text = Text(torch.cat(joined, dim=-1), None if pooled is None else pooled[start].clone())
        no_text = prompt.negative and not prompt.text and base.text_encoders.zeros_without_text
        texts.append(base.text_encoders.zeros() if no_text else text)
        start += len(own)
    return texts


def _weighted(states_LD: Tensor, weights_L: Tensor) -> Tensor:
    states = states_LD.float()
    weighted = states * weights_L.unsqueeze(1)
    before, after = states.mean(), weighted.mean()
    if bool(torch.minimum(before.abs(), after.abs()) > _LEAST_MEAN * states.abs().mean()):
        weighted = weighted * (before / after)
    return weighted.to(states_LD.dtype)
