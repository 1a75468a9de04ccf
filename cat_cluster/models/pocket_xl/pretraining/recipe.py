"""Every number of Pocket-XL's pretraining in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Sizes, steps, batches and rates of all stages; `minutes` are each stage's share of a wall-clock budget."""

    text_length: int = 32
    merges: int = 1_600

    clip_scenes: int = 80_000
    clip_width: int = 160
    clip_heads: int = 4
    clip_layers: int = 3
    first_width: int = 96
    first_heads: int = 3
    first_layers: int = 3
    vision_width: int = 128
    vision_heads: int = 4
    vision_layers: int = 3
    clip_steps: int = 6_500
    clip_batch: int = 96
    clip_rate: float = 1.0e-3
    clip_minutes: float = 95.0

    vae_scenes: int = 12_000
    vae_latent_channels: int = 8  # Pocket-SD's
    vae_steps: int = 1_800
    vae_batch: int = 16
    vae_crop: int = 32
    vae_frame_share: float = 0.2
    vae_rate: float = 1.0e-3
    vae_kl: float = 1.0e-6
    vae_minutes: float = 15.0

    unet_scenes: int = 50_000
    unet_channels: tuple[int, ...] = (40, 96, 112)
    unet_heads: tuple[int, ...] = (2, 3, 4)  # the first level has no attention
    unet_groups: int = 8
    unet_time_width: int = 32
    unet_steps: int = 24_000
    unet_batch: int = 32
    unet_rate: float = 8.0e-4
    unet_ema: float = 0.9995
    unet_minutes: float = 260.0

    classifier_scenes: int = 30_000
    classifier_channels: tuple[int, ...] = (24, 48, 96, 128)
    classifier_decoded: int = 6_000
    classifier_steps: int = 6_000
    classifier_batch: int = 64
    classifier_rate: float = 2.0e-3
    classifier_minutes: float = 30.0

    general_prompts: int = 300
    card_pictures: int = 240
    card_steps: int = 25
    card_groups: int = 16

    @staticmethod
    def tiny() -> Recipe:
        """The same path in seconds, for a test: it learns nothing."""
        return Recipe(
            merges=24,
            clip_scenes=48,
            clip_width=16,
            clip_heads=2,
            clip_layers=2,
            first_width=8,
            first_heads=2,
            first_layers=2,
            vision_width=16,
            vision_heads=2,
            vision_layers=1,
            clip_steps=2,
            clip_batch=8,
            vae_scenes=24,
            vae_steps=5,
            vae_batch=2,
            unet_scenes=30,
            unet_channels=(8, 8, 16),
            unet_time_width=8,
            unet_steps=3,
            unet_batch=4,
            classifier_scenes=24,
            classifier_channels=(8, 8, 8),
            classifier_steps=2,
            classifier_decoded=8,
            classifier_batch=8,
            general_prompts=8,
            card_pictures=4,
            card_steps=2,
            card_groups=1,
        )
