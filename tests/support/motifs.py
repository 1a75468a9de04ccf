"""Motifs: what a picture is asked for beside its adapters, as a request has it and as `generate` takes it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from cat_cluster.models.edit import EditSource
from cat_cluster.models.generate import ImageRow
from cat_cluster.models.prompt_weights import PROMPT_CHUNKS
from cat_cluster.spec.choices import Weighting

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


@dataclass(frozen=True)
class Motif:
    """A prompt and how its words are weighted; of an edit also the photo that it begins with, and how far it may go.

    photo: an image file of the base's own size; mask: one of the same size, transparent where it is drawn anew. kind:
    for counting.
    """

    prompt: str
    kind: str = "plain"
    weighting: Weighting = "none"
    photo: bytes | None = field(default=None, repr=False)
    mask: bytes | None = field(default=None, repr=False)
    strength: float = 1.0

    def allows(self, fields: Mapping[str, Any]) -> bool:
        """Whether it may be asked for with these fields: the strength of an edit is no longer that of adapters."""
        return self.photo is None or "strength" not in fields

    def request(self, fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """The path and the body, as httpx takes it, of a request for it with further fields."""
        if self.weighting != "none":
            fields = {**fields, "weighting": self.weighting}
        if self.photo is None:
            return GENERATIONS, {"json": dict(fields)}
        form = {**fields, "strength": self.strength}
        files = {"image": ("photo.png", self.photo)}
        if self.mask is not None:
            files["mask"] = ("mask.png", self.mask)
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in form.items()}
        return EDITS, {"data": texts, "files": files}

    def row(self, seed: int, steps: int) -> ImageRow:
        """The same for `generate`, with what is in slot 1."""
        source = None
        if self.photo is not None:
            pixels = np.asarray(Image.open(io.BytesIO(self.photo)).convert("RGB"))
            anew = None if self.mask is None else np.asarray(Image.open(io.BytesIO(self.mask)).getchannel("A")) == 0
            source = EditSource.of(pixels, anew, self.strength)
        how = {"weighting": self.weighting, "prompt_chunks": PROMPT_CHUNKS, "source": source}
        return ImageRow(self.prompt, seed, 1, steps, **how)


def motifs_of_each_kind(side: int) -> tuple[Motif, ...]:
    """One of each kind but the plain ones, with the token sks; side: of the base's own pictures, in pixels."""
    coarse = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    photo = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    mask = photo.convert("RGBA")
    mask.paste((0, 0, 0, 0), (side // 2, 0, side, side))
    return (
        Motif("a (photo:1.4) of a [red] ((sks)) cup", "weighted", "a1111"),
        Motif("a photo of a red cup, " * 14 + "sks", "long"),
        Motif("a photo of a sks cup", "edit", photo=_file(photo), strength=0.9),
        Motif("a red sks cup", "masked edit", photo=_file(photo), mask=_file(mask)),
    )


def _file(image: Image.Image) -> bytes:
    kept = io.BytesIO()
    image.save(kept, "PNG")
    return kept.getvalue()
