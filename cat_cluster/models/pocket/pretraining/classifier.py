"""Training of the independent judge, a small classifier that sees rendered scenes only."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL

from cat_cluster.models.pocket.classifier import LABELS, Classifier
from cat_cluster.models.pocket.pretraining.recipe import Recipe
from cat_cluster.models.pocket.pretraining.scenes import (
    label_indices,
    masked_cross_entropy,
    random_scenes,
    render,
    scene_labels,
)
from cat_cluster.models.pretraining.classifier import SEED_SHIFT, shifted, through_vae
from cat_cluster.models.pretraining.stage import (
    Stage,
    StageProgress,
    Stateful,
    half_precision,
    learning_rate_at,
    optimise,
    run_stage,
)


def train_classifier(
    recipe: Recipe,
    vae: AutoencoderKL,
    stage: Stage,
) -> tuple[Classifier, StageProgress]:
    """Train on rendered scenes: as drawn, through the VAE, shifted, blurred and noisy."""
    device, seed = stage.device, stage.seed + SEED_SHIFT
    torch.manual_seed(seed)
    scenes = random_scenes(recipe.scenes, seed)
    frames = render(scenes)
    decoded = through_vae(vae, frames[: recipe.classifier_decoded], seed)
    truth = label_indices([scene_labels(scene) for scene in scenes])
    model = Classifier(recipe.classifier_channels).to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.classifier_rate, weight_decay=0.02)

    def step(index: int, progress: float) -> torch.Tensor:
        rng = np.random.default_rng([seed, 5, index])
        model.train()
        whole = rng.integers(len(frames), size=recipe.classifier_batch // 2)
        passed = rng.integers(len(decoded), size=recipe.classifier_batch // 2)
        pixels = shifted(torch.cat([frames[whole], decoded[passed]]).float() / 255, rng).to(device)
        rows = np.concatenate([whole, passed])
        with half_precision(device):
            logits = model(pixels.contiguous(memory_format=torch.channels_last))
        loss = torch.zeros((), device=device)
        for name in LABELS:
            loss = loss + masked_cross_entropy(logits[name].float(), truth[name][rows].to(device))
        optimise(loss, model, optimiser, learning_rate_at(progress, recipe.classifier_rate))
        return loss

    state: dict[str, Stateful] = {"model": model, "optimiser": optimiser}
    ended = run_stage(stage, recipe.classifier_steps, state, step)
    model.eval().centre.zero_()
    model.centre.copy_(model.features((frames[:2048].float() / 255).to(device)).mean(0))
    return model, ended
