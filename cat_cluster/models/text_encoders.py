"""The frozen text encoders of a base: one, or the two of SDXL, each of which reads the whole prompt.

What is encoded while a bank's text rows are bound is adapted; gradients then reach the bank's parameters alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from cat_cluster.models.conditioning import Text
from cat_cluster.models.network import TEXT_ENCODER_NAMES

TextModel: TypeAlias = CLIPTextModel | CLIPTextModelWithProjection


class States(NamedTuple):
    """What the encoders make of B chunks: of each encoder [B, L, D_i], and the pooled text [B, P], None without one."""

    of_encoders: tuple[Tensor, ...]
    pooled: Tensor | None


@dataclass(frozen=True, eq=False)
class TextEncoders:
    """Tokenizers and models, in the order in which their states stand beside each other.

    Their tokenizers spell alike; they differ in the token that pads. With one encoder its last states are read, behind
    the final norm; with two the last but one of each, and the pooled text is the second one's projection (SDXL).
    zeros_without_text: where there is no negative prompt, guidance starts from zeros instead of what the encoders make
    of "".
    """

    tokenizers: tuple[CLIPTokenizer, ...]
    models: tuple[TextModel, ...]
    zeros_without_text: bool = False

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return cast(torch.device, self.models[0].device)

    @property
    def unread(self) -> tuple[str, ...]:
        """What paths of layers begin with, in a base's `network`, from which nothing is read: see the class."""
        before_pooled = list(zip(TEXT_ENCODER_NAMES, self.models, strict=False))[:-1]
        return tuple(
            f"{name}.text_model.encoder.layers.{model.config.num_hidden_layers - 1}." for name, model in before_pooled
        )

    def encode(self, prompts: Sequence[str]) -> list[Text]:
        """Encode prompts as the stock pipeline does: padded and truncated to L tokens, a Text of one chunk each."""
        read = [
            tokenizer(
                list(prompts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            for tokenizer in self.tokenizers
        ]
        states, pooled = self._read([one.input_ids for one in read], read[0].attention_mask)
        joined = torch.cat(states, dim=-1)
        return [Text(joined[row], None if pooled is None else pooled[row]) for row in range(len(joined))]

    def encode_chunks(self, chunks: Sequence[Sequence[int]]) -> States:
        """Encode chunks of tokens that have no marks of start and end yet, each at most L - 2."""
        length = self.tokenizers[0].model_max_length
        mask = torch.zeros(len(chunks), length, dtype=torch.long)
        ids = [torch.full_like(mask, cast(int, tokenizer.pad_token_id)) for tokenizer in self.tokenizers]
        for row, tokens in enumerate(chunks):
            mask[row, : len(tokens) + 2] = 1
            for own, tokenizer in zip(ids, self.tokenizers, strict=True):
                marked = [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id]
                own[row, : len(marked)] = torch.tensor(marked)
        return self._read(ids, mask)

    def zeros(self) -> Text:
        """Return the text whose numbers are all zero, of one chunk."""
        length, like = self.tokenizers[0].model_max_length, next(self.models[0].parameters())
        states = like.new_zeros((length, sum(model.config.hidden_size for model in self.models)))
        return Text(states, like.new_zeros(self.models[-1].config.projection_dim) if len(self.models) > 1 else None)

    def _read(self, ids: Sequence[Tensor], mask: Tensor) -> States:
        """ids: of each encoder [B, L] with all marks and padding; mask [B, L]: 1, of padding 0."""
        if len(self.models) == 1:
            model = self.models[0]
            # A few checkpoints ask for the mask in their config, and the stock pipeline obeys.
            masked = getattr(model.config, "use_attention_mask", False)
            states = model(ids[0].to(self.device), attention_mask=mask.to(self.device) if masked else None)[0]
            return States((states,), None)
        outputs = [
            model(own.to(self.device), output_hidden_states=True) for model, own in zip(self.models, ids, strict=True)
        ]
        return States(tuple(output.hidden_states[-2] for output in outputs), outputs[-1].text_embeds)
