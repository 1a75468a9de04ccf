"""Figures of a model card that every embedded base has: what its VAE keeps, and how well its CLIP finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from cat_cluster.models.pretraining.card import similarity
from cat_cluster.models.pretraining.vae import decode_latents, encode_frames

GROUP = 64  # scenes that a picture's caption is sought among
Features = Callable[[torch.Tensor], torch.Tensor]  # pictures [N, 3, H, W] in [0, 1] to unit features [N, F]


def kept_by_vae(
    vae: AutoencoderKL, judges: Mapping[str, Features], frames: torch.Tensor, owners: torch.Tensor
) -> dict[str, Any]:
    """PSNR on photos of unseen concepts, and the share of their similarity to each other that each judge keeps.

    frames: uint8 [N, 3, H, W]; owners [N]: the concept of each.
    """
    pixels = frames.float() / 255
    decoded = decode_latents(vae, encode_frames(vae, frames))
    psnr = -10 * torch.log10(((decoded - pixels) ** 2).mean((1, 2, 3)))
    pairs = (owners[:, None] == owners[None, :]) & ~torch.eye(len(owners), dtype=torch.bool)
    kept = {}
    for name, features in judges.items():
        original, passed = features(pixels), features(decoded)
        kept[name] = float(similarity(passed, original)[pairs].mean() / similarity(original, original)[pairs].mean())
    return {"psnr_db": float(psnr.mean()), "psnr_db_worst": float(psnr.min()), "similarity_kept": kept}


def retrieval_shares(images_NF: torch.Tensor, captions_NF: torch.Tensor, texts: Sequence[str]) -> dict[str, float]:
    """How often a picture finds its caption among 64, and a caption its picture; equal captions are equally right."""
    to_text, to_image = [], []
    for i in range(0, len(texts), GROUP):
        scores = images_NF[i : i + GROUP] @ captions_NF[i : i + GROUP].T
        names = np.array(texts[i : i + GROUP])
        to_text.append(np.mean(names[scores.argmax(1).numpy()] == names))
        to_image.append(np.mean(names[scores.argmax(0).numpy()] == names))
    return {"caption_of_picture": float(np.mean(to_text)), "picture_of_caption": float(np.mean(to_image))}


def centroid_scores(
    features: Features, known: torch.Tensor, owners: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """Return the cosines [M, K] of photos `wanted` to the centroid of each of the K concepts that own the `known`.

    known, wanted: uint8 [N, 3, H, W] and [M, 3, H, W]; owners [N]: 0 to K - 1.
    """
    photos = features(known.float() / 255)
    centroids = torch.stack([photos[owners == owner].mean(0) for owner in range(int(owners.max()) + 1)])
    return features(wanted.float() / 255) @ functional.normalize(centroids, dim=-1).T


def spread(judges: Mapping[str, Features], pictures: torch.Tensor, count: int) -> dict[str, float]:
    """Mean pairwise 1 - s among pictures of one prompt, of which there are `count` each, one prompt after the other."""
    apart = ~torch.eye(count, dtype=torch.bool)
    found = {}
    for judge, features in judges.items():
        groups = features(pictures).view(len(pictures) // count, count, -1)
        found[judge] = float(np.mean([(1 - similarity(group, group))[apart].mean() for group in groups]))
    return found
