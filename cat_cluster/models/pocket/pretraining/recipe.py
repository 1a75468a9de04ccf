"""Every number of Pocket-SD's pretraining in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Sizes, steps, batches and rates of all stages; `minutes` are each stage's share of a wall-clock budget."""

    scenes: int = 18_000
    text_length: int = 32

    text_steps: int = 650
    text_batch: int = 96
    text_minutes: float = 3.0

    words_steps: int = 2_180
    words_batch: int = 48
    words_rate: float = 1.0e-3
    words_mark: float = 5.0
    words_directions: int = 24
    words_minutes: float = 7.0

    clip_width: int = 128
    clip_text_layers: int = 3
    clip_vision_layers: int = 4
    clip_heads: int = 4
    clip_steps: int = 3_607
    clip_batch: int = 96
    clip_rate: float = 1.0e-3
    clip_minutes: float = 36.0

    vae_channels: tuple[int, ...] = (32, 64, 64)
    vae_latent_channels: int = 8
    vae_steps: int = 5_423
    vae_batch: int = 16
    vae_crop: int = 32
    vae_frame_share: float = 0.2
    vae_rate: float = 2.0e-3
    vae_kl: float = 1.0e-6
    vae_minutes: float = 22.0

    unet_channels: tuple[int, ...] = (64, 128)
    unet_head_dim: int = 4
    unet_groups: int = 8
    unet_steps: int = 4_285
    unet_batch: int = 48
    unet_rate: float = 8.0e-4
    unet_ema: float = 0.998
    unet_unknown_words: float = 0.3
    unet_minutes: float = 85.0

    classifier_channels: tuple[int, ...] = (24, 48, 96)
    classifier_decoded: int = 3_000
    classifier_steps: int = 1_907
    classifier_batch: int = 64
    classifier_rate: float = 2.0e-3
    classifier_minutes: float = 9.0

    general_prompts: int = 200
    card_pictures: int = 240
    card_steps: int = 25
    card_groups: int = 16

    @staticmethod
    def tiny() -> Recipe:
        """The same path in seconds, for a test: it learns nothing."""
        return Recipe(
            scenes=24,
            text_steps=2,
            text_batch=8,
            words_steps=2,
            words_batch=4,
            words_directions=4,
            clip_width=16,
            clip_text_layers=1,
            clip_vision_layers=1,
            clip_heads=2,
            clip_steps=2,
            clip_batch=8,
            vae_channels=(8, 8, 8),
            vae_steps=5,
            vae_batch=2,
            unet_channels=(8, 16),
            unet_steps=2,
            unet_batch=4,
            classifier_channels=(8, 8, 8),
            classifier_steps=2,
            classifier_decoded=8,
            classifier_batch=8,
            general_prompts=8,
            card_pictures=4,
            card_steps=2,
            card_groups=1,
        )
