"""What the U-Net reads of a row beside its latents and timestep: the text and, in SDXL, pooled text and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True, eq=False)
class Text:
    """A prompt as the text encoders read it: states [n L, D] of n chunks and, in SDXL, the pooled text [P]."""

    states: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def isfinite(self) -> Tensor:
        """Return whether each of its numbers is finite."""
        finite = self.states.isfinite().flatten()
        return finite if self.pooled is None else torch.cat([finite, self.pooled.isfinite()])


class Sizes(NamedTuple):
    """SDXL's micro-conditioning, in pixels and in the order of diffusers' time ids (arXiv 2307.01952, section 2.2).

    original: of the picture before it was scaled; crop: where the crop begins in the scaled picture; target: of the
    crop. A picture that is drawn is its own original, whole.
    """

    original_height: int
    original_width: int
    crop_top: int
    crop_left: int
    target_height: int
    target_width: int

    @classmethod
    def drawn(cls, height: int, width: int) -> Sizes:
        """Return the sizes of a picture that is drawn, as the stock pipeline has them."""
        return cls(height, width, 0, 0, height, width)


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The conditioning of B rows: states [B, n L, D]; own_text [B, n L]: the places that are a row's own text.

    own_text is None where all are, since attention without a mask is faster. pooled [B, P] and sizes [B, 6] are SDXL's,
    None in other families.
    """

    states: Tensor
    own_text: Tensor | None = None
    pooled: Tensor | None = None
    sizes: Tensor | None = None

    @classmethod
    def of(cls, texts: Sequence[Text], sizes: Sequence[Sizes]) -> Conditioning:
        """Put the rows' texts side by side, zeros behind shorter ones; their sizes count where texts are pooled."""
        states, own_text = _side_by_side([text.states for text in texts])
        pooled = [text.pooled for text in texts if text.pooled is not None]
        if not pooled:
            return cls(states, own_text)
        told = torch.tensor(list(sizes), dtype=torch.float32, device=states.device)
        return cls(states, own_text, torch.stack(pooled), told)

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> Conditioning:
        """Return some of the rows."""
        states, *others = (None if part is None else part[rows] for part in self._parts)
        assert states is not None
        return Conditioning(states, *others)

    @property
    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.states, self.own_text, self.pooled, self.sizes

    def arguments(self) -> dict[str, Any]:
        """Return what the U-Net is called with, by diffusers' names."""
        found: dict[str, Any] = {"encoder_hidden_states": self.states}
        if self.own_text is not None:
            found["encoder_attention_mask"] = self.own_text
        if self.pooled is not None:
            found["added_cond_kwargs"] = {"text_embeds": self.pooled, "time_ids": self.sizes}
        return found


def _side_by_side(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    lengths = [len(text) for text in texts]
    if len(set(lengths)) == 1:
        return torch.stack(list(texts)), None
    places = torch.arange(max(lengths), device=texts[0].device)
    own = places < torch.tensor(lengths, device=texts[0].device).unsqueeze(1)
    return pad_sequence(list(texts), batch_first=True), own
