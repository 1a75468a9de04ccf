"""VAE and text-encoder caches: what the frozen parts say of an image or a prompt is computed once.

Content-addressed: the key names the image's bytes, the base model, the size and the crop, so a hit equals a
recomputation and a changed photo or base can never be served a stale entry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from cat_cluster.data.concepts import Concept, Example
from cat_cluster.data.crops import Size, bucket_of, crop_mask, crop_pixels, crop_sizes
from cat_cluster.data.draws import ConceptMaterial
from cat_cluster.errors import OutputError
from cat_cluster.files import write_whole
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.conditioning import Text
from cat_cluster.models.prompt_weights import Prompt
from cat_cluster.models.prompts import encode_prompts

ENCODE_IMAGES_AT_ONCE = 8


class _View(NamedTuple):
    """A crop of a photo, at the size that it is trained at."""

    example: Example
    crop: int
    size: Size


@dataclass(frozen=True)
class LatentCache:
    """VAE moments of image crops, kept in `folder` (None = not kept between runs)."""

    base: BaseModel
    folder: Path | None = None

    def material(
        self, concept: Concept, *, resolution: int, crops_per_image: int, alpha: float, bucket_step: int | None = None
    ) -> ConceptMaterial:
        """Encode every view of a concept: N = images x crops, on the CPU in fp32.

        Crops are squares of `resolution` or, with bucket_step, of the bucket of their photo. The CAT weight is `alpha`
        (the method may have set it to 0).
        """
        views = [
            _View(example, crop, _size(example, resolution, bucket_step))
            for example in concept.examples
            for crop in range(crops_per_image)
        ]
        return ConceptMaterial(
            token=concept.token,
            class_noun=concept.class_noun,
            alpha=alpha,
            weight=concept.weight,
            moments=self._encode(views),
            prompts=tuple(view.example.prompt for view in views),
            removed_prompts=tuple(view.example.prior_prompt for view in views),
            sizes=tuple(crop_sizes(*view) for view in views),
            masks=self._masks(views),
        )

    def _masks(self, views: Sequence[_View]) -> tuple[Tensor | None, ...]:
        masks = tuple(crop_mask(*view, self.base.pixels_per_latent) for view in views)
        return () if all(mask is None for mask in masks) else masks

    def _encode(self, views: Sequence[_View]) -> tuple[Tensor, ...]:
        paths = [self._path(view) for view in views]
        found = [_read(path) for path in paths]
        missing: dict[Size, list[int]] = {}
        for i, moments in enumerate(found):
            if moments is None:
                missing.setdefault(views[i].size, []).append(i)
        for alike in missing.values():
            for start in range(0, len(alike), ENCODE_IMAGES_AT_ONCE):
                chunk = alike[start : start + ENCODE_IMAGES_AT_ONCE]
                pixels = torch.stack([crop_pixels(*views[i]) for i in chunk])
                for i, moments in zip(chunk, self.base.encode_moments(pixels).float().cpu(), strict=True):
                    found[i] = kept = moments.clone()
                    _write(paths[i], kept)
        return tuple(moments for moments in found if moments is not None)

    def _path(self, view: _View) -> Path | None:
        if self.folder is None:
            return None
        width, height = view.size
        # Squares are called by one side, as they were before there were others.
        size = width if width == height else f"{width}x{height}"
        key = f"{view.example.digest} {self.base.fingerprint} {size} {view.crop} {self.base.dtype}"
        return self.folder / "latents" / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"


def _size(example: Example, resolution: int, bucket_step: int | None) -> Size:
    if bucket_step is None:
        return Size.square(resolution)
    return bucket_of(Size(*example.image.size), resolution, bucket_step)


@dataclass(frozen=True)
class TextCache:
    """What the base model's own encoders make of texts, each prompt encoded once.

    The empty prompt is what guidance starts from where there is no negative prompt. chunks: those that are read of a
    prompt, at most. most: texts that are kept, those that were asked for last; None keeps all.
    """

    base: BaseModel
    chunks: int = 1
    most: int | None = None
    texts: dict[str, Text] = field(default_factory=dict)

    def __call__(self, prompts: Sequence[str]) -> list[Text]:
        """Return the texts of `prompts`; those of one chunk as the stock pipeline encodes them."""
        return [self._text(prompt) for prompt in prompts]

    def _text(self, prompt: str) -> Text:
        text = self.texts.pop(prompt, None)
        if text is None:
            # Each alone: the rounding of a batch depends on its size, and a resumed run meets others together.
            read = Prompt(prompt, chunks=self.chunks, negative=prompt == "")
            [text] = encode_prompts(self.base, self.base.text_limit, [read])
        self.texts[prompt] = text
        while self.most is not None and len(self.texts) > self.most:
            del self.texts[next(iter(self.texts))]
        return text


def _read(path: Path | None) -> Tensor | None:
    if path is None or not path.exists():
        return None
    try:
        return load_file(path)["moments"]
    except (SafetensorError, KeyError, OSError):
        return None  # a damaged entry is as good as none: it is computed again and replaced


def _write(path: Path | None, moments: Tensor) -> None:
    if path is None:
        return
    # A cache that cannot be written costs a second encoding, never the job.
    with suppress(OutputError):
        write_whole(path, save({"moments": moments.contiguous()}))
