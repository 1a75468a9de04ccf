"""What both bases' CLIPs share: tokens, features, the contrastive loss, and the judge's files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer

# The judge takes pixels in [0, 1] normalised with these, as a CLIPImageProcessor config says beside the weights.
IMAGE_MEAN = 0.5
IMAGE_STD = 0.5


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Token ids [N, L], padded and cut to the model's length exactly as the stock pipeline does."""
    batch = tokenizer(
        list(texts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return torch.as_tensor(batch["input_ids"])


def trim_padding(ids: torch.Tensor, tokenizer: CLIPTokenizer) -> torch.Tensor:
    """The ids without the columns where all are padding: causal attention lets nothing that is pooled see them."""
    return ids[:, : int((ids == tokenizer.eos_token_id).int().argmax(1).max()) + 1]


def image_features(model: CLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    """Normalised features [N, D] of pixels [N, 3, S, S] in [0, 1], with gradient."""
    pooled = model.vision_model(pixel_values=(pixels - IMAGE_MEAN) / IMAGE_STD).pooler_output
    return functional.normalize(model.visual_projection(pooled).float(), dim=-1)


def text_features(model: CLIPModel, ids: torch.Tensor) -> torch.Tensor:
    """Normalised features [N, D] of token ids [N, L], with gradient."""
    pooled = model.text_model(input_ids=ids).pooler_output
    return functional.normalize(model.text_projection(pooled).float(), dim=-1)


@torch.no_grad()
def embed_images(model: CLIPModel, pixels: torch.Tensor, batch: int = 128) -> torch.Tensor:
    """Normalised image features [N, D] of pixels [N, 3, S, S] in [0, 1]."""
    device = next(model.parameters()).device
    return torch.cat(
        [image_features(model, pixels[i : i + batch].to(device)).cpu() for i in range(0, len(pixels), batch)]
    )


@torch.no_grad()
def embed_texts(model: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str], batch: int = 1024) -> torch.Tensor:
    """Normalised text features [N, D]."""
    device = next(model.parameters()).device
    ids = tokenize(tokenizer, texts).to(device)
    return torch.cat([text_features(model, ids[i : i + batch]).cpu() for i in range(0, len(ids), batch)])


def contrast(
    logit_scale: torch.Tensor, images: torch.Tensor, captions: torch.Tensor, texts: Sequence[str]
) -> torch.Tensor:
    """InfoNCE both ways (Radford et al. 2021), equal captions masked out of the negatives.

    `images` and `captions` are unit rows [N, D]; `logit_scale` is the logarithm of the inverse temperature.
    """
    logits = images @ captions.T * logit_scale.exp().clamp(max=100)
    names = np.array(texts)
    equal = torch.from_numpy(names[:, None] == names[None, :]).to(images.device)
    equal.fill_diagonal_(False)
    logits = logits.masked_fill(equal, -1e4)
    target = torch.arange(len(texts), device=images.device)
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def augment(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A third each as they are, slightly blurred, and noisy: generated pictures are never pixel-perfect."""
    kind = torch.from_numpy(rng.integers(3, size=(len(pixels), 1, 1, 1)))
    blurred = functional.avg_pool2d(functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = torch.from_numpy(rng.standard_normal(tuple(pixels.shape), dtype=np.float32)) * 0.03
    return torch.where(kind == 1, blurred, torch.where(kind == 2, pixels + noise, pixels)).clamp(0, 1)


def save_judge(model: CLIPModel, folder: Path) -> None:
    """Write all of the CLIP but its text half, fp16, and how pictures are normalised; the base ships the text half."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.half().contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith("text_model.") and tensor.is_floating_point()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(model.config.to_json_string(use_diff=False), encoding="utf-8")
    side = model.config.vision_config.image_size
    pixels = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [IMAGE_MEAN] * 3,
        "image_std": [IMAGE_STD] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2) + "\n", encoding="utf-8")
