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

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from cat_cluster.data.concepts import Concept, Example
from cat_cluster.data.draws import ConceptMaterial, keyed_generator
from cat_cluster.errors import OutputError
from cat_cluster.files import write_whole
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.conditioning import Sizes, Text
from cat_cluster.models.prompt_weights import Prompt
from cat_cluster.models.prompts import encode_prompts

ENCODE_IMAGES_AT_ONCE = 8


@dataclass(frozen=True)
class LatentCache:
    """VAE moments of image crops, kept in `folder` (None = not kept between runs)."""

    base: BaseModel
    folder: Path | None = None

    def material(self, concept: Concept, *, resolution: int, crops_per_image: int, alpha: float) -> ConceptMaterial:
        """Encode every view of a concept: N = images x crops, moments [N, 2C, H, W] on the CPU in fp32.

        The first crop of an image is its centre square; further ones are squares of 75 to 100% of the shorter
        side, keyed by the image's bytes. The CAT weight is `alpha` (the method may have set it to 0).
        """
        views = [(example, crop) for example in concept.examples for crop in range(crops_per_image)]
        moments: list[Tensor] = []
        for start in range(0, len(views), ENCODE_IMAGES_AT_ONCE):
            moments += self._encode(views[start : start + ENCODE_IMAGES_AT_ONCE], resolution)
        return ConceptMaterial(
            token=concept.token,
            class_noun=concept.class_noun,
            alpha=alpha,
            weight=concept.weight,
            moments_NCHW=torch.stack(moments),
            prompts=tuple(example.prompt for example, _ in views),
            removed_prompts=tuple(example.prior_prompt for example, _ in views),
            sizes=tuple(crop_sizes(example, crop, resolution) for example, crop in views),
        )

    def _encode(self, views: Sequence[tuple[Example, int]], resolution: int) -> list[Tensor]:
        paths = [self._path(example, crop, resolution) for example, crop in views]
        found = [_read(path) for path in paths]
        missing = [i for i, moments in enumerate(found) if moments is None]
        if missing:
            pixels = torch.stack([crop_pixels(views[i][0], views[i][1], resolution) for i in missing])
            encoded = self.base.encode_moments(pixels).float().cpu()
            for i, moments in zip(missing, encoded, strict=True):
                found[i] = kept = moments.clone()
                _write(paths[i], kept)
        return [moments for moments in found if moments is not None]

    def _path(self, example: Example, crop: int, resolution: int) -> Path | None:
        if self.folder is None:
            return None
        key = f"{example.digest} {self.base.fingerprint} {resolution} {crop} {self.base.dtype}"
        return self.folder / "latents" / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"


def crop_pixels(example: Example, crop: int, resolution: int) -> Tensor:
    """Return one square crop as pixels in [-1, 1], [3, resolution, resolution]. Crop 0 is the centre square."""
    left, top, side = _square(example, crop)
    square = example.image.crop((left, top, left + side, top + side))
    square = square.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(square, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1.0


def crop_sizes(example: Example, crop: int, resolution: int) -> Sizes:
    """Return what an SDXL base is told of a crop: the photo's own size, and where in the scaled photo the crop is."""
    left, top, side = _square(example, crop)
    width, height = example.image.size
    scale = resolution / side
    return Sizes(height, width, round(top * scale), round(left * scale), resolution, resolution)


def _square(example: Example, crop: int) -> tuple[int, int, int]:
    """Return left, top and side of a crop, in the photo's pixels."""
    width, height = example.image.size
    side, x, y = min(width, height), 0.5, 0.5
    if crop > 0:
        scale, x, y = keyed_generator(example.digest, "crop", crop).random(3).tolist()
        side = max(1, round(side * (0.75 + 0.25 * scale)))
    return round((width - side) * x), round((height - side) * y), side


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
        if self.most is not None and len(self.texts) > self.most:
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
