"""Sample grids: what an adapter draws while it is trained, beside what the base model draws of the same seeds."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from cat_cluster.evaluation.grid import Column, Grid, Picture, draw_grids
from cat_cluster.evaluation.judges import is_pocket
from cat_cluster.evaluation.prompts import evaluation_prompts, fill
from cat_cluster.lora.bank import LoraBank
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.generate import ImageRow, generate, image_array

WITHOUT, WITH = "Without the token", "With the token"


class SampleGrids:
    """Draws the adapters of a bank on the same prompts and seeds each time; the base's images are made once."""

    def __init__(
        self,
        base: BaseModel,
        bank: LoraBank,
        *,
        seed: int = 1000,
        steps: int = 16,
        guidance: float = 4.0,
        count: int = 3,
    ) -> None:
        """count: images per arm and concept, each with a default evaluation prompt and a seed, `seed` onwards.

        steps: denoising steps. Raises ValueError when count is less than 1.
        """
        if count < 1:
            raise ValueError(f"count is {count}; a sample grid has at least 1 image per arm")
        self._base, self._bank = base, bank
        self._steps, self._guidance = steps, guidance
        templates = evaluation_prompts("default", pocket=is_pocket(base))
        self._prompts = tuple(templates[i % len(templates)] for i in range(count))
        self._seeds = tuple(range(seed, seed + count))
        self._base_pictures: dict[ImageRow, Picture] = {}

    def draw(self, slot: int, concepts: Sequence[tuple[str, str]], title: str) -> Image.Image:
        """Return base without token | adapter without token | adapter with it, one grid per (token, class noun).

        The adapter is the one in `slot`, at its present weights. A picture of a diverged adapter is black.
        """
        rows = {
            (concept, arm): self._rows(arm_slot, noun, trigger)
            for concept, (token, noun) in enumerate(concepts)
            for arm, arm_slot, trigger in (("base", 0, None), ("without", slot, None), ("with", slot, token))
        }
        pictures = self._pictures([row for arm in rows.values() for row in arm])
        grids = []
        for concept, (token, noun) in enumerate(concepts):
            arms = (
                (WITHOUT, "Base model", noun, "base"),
                (WITHOUT, "Adapter", noun, "without"),
                (WITH, "Adapter", f"{token} {noun}", "with"),
            )
            columns = tuple(
                Column(block, name, subject, tuple(pictures[row] for row in rows[concept, arm]))
                for block, name, subject, arm in arms
            )
            prompts = tuple(fill(template, noun, None) for template in self._prompts)
            grids.append(Grid(prompts, self._seeds, columns))
        return draw_grids(grids, title, rows=len(self._seeds))

    def _rows(self, slot: int, noun: str, trigger: str | None) -> list[ImageRow]:
        return [
            ImageRow(fill(template, noun, trigger), seed, slot, self._steps, self._guidance)
            for template, seed in zip(self._prompts, self._seeds, strict=True)
        ]

    def _pictures(self, rows: Sequence[ImageRow]) -> dict[ImageRow, Picture]:
        missing = [row for row in dict.fromkeys(rows) if row not in self._base_pictures]
        images = generate(self._base, self._bank, missing).nan_to_num(nan=0.0)
        made = dict(zip(missing, image_array(images), strict=True))
        self._base_pictures.update({row: picture for row, picture in made.items() if row.slot == 0})
        return {**self._base_pictures, **made}
