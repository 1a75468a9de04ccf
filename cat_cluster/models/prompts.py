"""Prompts of any length, with the weights of their words, as the U-Net reads them; texts of several lengths at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.prompt_weights import Prompt
from cat_cluster.models.text_limit import TextLimit

_LEAST_MEAN = 1e-3  # of the mean size of the values: below that a mean is little more than rounding


def encode_prompts(base: BaseModel, limit: TextLimit, prompts: Sequence[Prompt]) -> list[Tensor]:
    """Return the text [n L, D] of each prompt, of n chunks; of one chunk without weights, what encode_text returns.

    limit: the base's, for this thread. Every chunk is encoded alone, and the states of its tokens are weighted:

        z' = w z,   z'' = z' mean(z) / mean(z')     (w [L, 1]: the tokens' weights, 1 for marks and padding)

    Means are over the chunk [L, D], as AUTOMATIC1111 has it (`EmphasisOriginal` in its modules/sd_emphasis.py; there
    over the chunks of all prompts of a batch, so that these change each other). A mean that is rounding alone is not
    restored. Raises SpecError for a weight that cannot be.
    """
    read = [limit.chunks(prompt) for prompt in prompts]
    chunks = [chunk for own in read for chunk in own]
    length, tokenizer = limit.tokens, base.tokenizer
    ids = torch.full((len(chunks), length), tokenizer.pad_token_id)
    mask, weights = torch.zeros_like(ids), torch.ones(len(chunks), length)
    for row, chunk in enumerate(chunks):
        marked = [tokenizer.bos_token_id, *chunk.tokens, tokenizer.eos_token_id]
        ids[row, : len(marked)] = torch.tensor(marked)
        mask[row, : len(marked)] = 1
        weights[row, 1 : len(marked) - 1] = torch.tensor(chunk.weights)
    states = list(base.encode_tokens(ids, mask))
    for row, chunk in enumerate(chunks):
        if any(weight != 1.0 for weight in chunk.weights):
            states[row] = _weighted(states[row], weights[row].to(base.device))
    texts, start = [], 0
    for own in read:
        texts.append(torch.cat(states[start : start + len(own)]))
        start += len(own)
    return texts


def side_by_side(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return texts [n_b L, D] as one [B, n L, D], zeros behind shorter ones, and which places are a row's own [B, n L].

    None in place of that where all are, since attention without a mask is faster.
    """
    lengths = [len(text) for text in texts]
    if len(set(lengths)) == 1:
        return torch.stack(list(texts)), None
    places = torch.arange(max(lengths), device=texts[0].device)
    own = places < torch.tensor(lengths, device=texts[0].device).unsqueeze(1)
    return pad_sequence(list(texts), batch_first=True), own


def _weighted(states_LD: Tensor, weights_L: Tensor) -> Tensor:
    states = states_LD.float()
    weighted = states * weights_L.unsqueeze(1)
    before, after = states.mean(), weighted.mean()
    if bool(torch.minimum(before.abs(), after.abs()) > _LEAST_MEAN * states.abs().mean()):
        weighted = weighted * (before / after)
    return weighted.to(states_LD.dtype)
