"""The texts of a step's rows: the base's own, which are kept, and those that adapters change, encoded in each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cat_cluster.lora.bank import LoraBank
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.conditioning import Text
from cat_cluster.models.prompt_weights import Prompt
from cat_cluster.models.prompts import encode_prompts
from cat_cluster.training.teacher import TextEncoder


@dataclass(frozen=True, eq=False)
class RowTexts:
    """What rows read of their prompts: each through its slot's adapter where that trains text encoders.

    bare: gives the base's texts. chunks: those that are read of a prompt, at most. alike: for workers that share a
    step, whose backwards must reach the same parameters in the same order; where no row's text is adapted, one is
    encoded in the same way, which changes nothing of it.
    """

    base: BaseModel
    bank: LoraBank
    bare: TextEncoder
    chunks: int
    alike: bool

    def __call__(self, prompts: Sequence[str], slot_B: Tensor) -> list[Text]:
        """Return the rows' texts; those of an adapter carry its gradient.

        Prompts of a slot that are the same are encoded once, all of them in one call, and in the arithmetic of the
        weights, as texts of the base are.
        """
        rows = list(zip(prompts, slot_B.tolist(), strict=True))
        adapted = [row for row in dict.fromkeys(rows) if self.bank.adapts_text(row[1])]
        if not adapted and self.alike and any(map(self.bank.adapts_text, self.bank.slots)):
            adapted = rows[:1]
        if not adapted:
            return self.bare(prompts)
        slots = [slot for _, slot in adapted]
        encoded = encode_prompts(
            self.base,
            self.base.text_limit,
            [Prompt(prompt, chunks=self.chunks) for prompt, _ in adapted],
            lambda owners: self.bank.text_rows([slots[n] for n in owners]),
        )
        texts = {row: self._empty(text) if row[0] == "" else text for row, text in zip(adapted, encoded, strict=True)}
        return [texts[row] if row in texts else self.bare([row[0]])[0] for row in rows]

    def _empty(self, text: Text) -> Text:
        """Return what is read of the empty prompt: zeros for some bases, which no adapter changes."""
        if not self.base.text_encoders.zeros_without_text:
            return text
        return Text(0.0 * text.states, None if text.pooled is None else 0.0 * text.pooled)
