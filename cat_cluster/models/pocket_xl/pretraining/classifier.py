"""Training of Pocket-XL's independent judge: which pictures stand in a scene, and in which place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from cat_cluster.models.pocket.classifier import Classifier
from cat_cluster.models.pocket.places import PLACES
from cat_cluster.models.pocket_xl.emojis import Emoji
from cat_cluster.models.pocket_xl.pretraining.albums import Album, draw_rows, make_album
from cat_cluster.models.pocket_xl.pretraining.recipe import Recipe
from cat_cluster.models.pocket_xl.world import SIZE
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
    recipe: Recipe, emojis: Sequence[Emoji], vae: AutoencoderKL, stage: Stage
) -> tuple[Classifier, StageProgress]:
    """Train on drawn scenes of all shapes: as drawn, through the VAE, shifted, blurred and noisy.

    The target of a scene with two things is half of each: the two of them are then the likeliest.
    """
    device, seed = stage.device, stage.seed + SEED_SHIFT
    torch.manual_seed(seed)
    album = make_album(emojis, recipe.classifier_scenes, seed)
    decoded = _decoded(vae, album, recipe.classifier_decoded, seed)
    model = Classifier(recipe.classifier_channels, labels(emojis)).to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.classifier_rate, weight_decay=0.02)
    drawn = Album(album.scenes, album.frames).rows
    passed = Album(album.scenes[: len(decoded)], decoded).rows

    def step(index: int, progress: float) -> torch.Tensor:
        rng = np.random.default_rng([seed, 5, index])
        model.train()
        again = index % 2 == 1 and len(passed) > 0
        rows = draw_rows(passed if again else drawn, rng, recipe.classifier_batch)
        frames = torch.stack([(decoded if again else album.frames)[row] for row in rows])
        pixels = shifted(frames.float() / 255, rng).to(device)
        with half_precision(device):
            logits = model(pixels.contiguous(memory_format=torch.channels_last))
        things, places = targets(album, rows, len(emojis))
        loss = functional.cross_entropy(logits["object"].float(), things.to(device))
        loss = loss + functional.cross_entropy(logits["place"].float(), places.to(device))
        optimise(loss, model, optimiser, learning_rate_at(progress, recipe.classifier_rate))
        return loss

    state: dict[str, Stateful] = {"model": model, "optimiser": optimiser}
    ended = run_stage(stage, recipe.classifier_steps, state, step)
    model.eval().centre.zero_()
    square = torch.stack([album.frames[row] for row in album.rows[SIZE, SIZE][:2048]])
    model.centre.copy_(model.features((square.float() / 255).to(device)).mean(0))
    return model, ended


def labels(emojis: Sequence[Emoji]) -> dict[str, tuple[str, ...]]:
    """What the heads name: every picture, and every place."""
    return {"object": tuple(emoji.name for emoji in emojis), "place": PLACES}


def targets(album: Album, rows: np.ndarray, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of scenes: the share of each of `count` pictures [N, count], and the place's number [N]."""
    things = torch.zeros(len(rows), count)
    for at, row in enumerate(rows):
        shown = album.scenes[row].things
        for thing in shown:
            things[at, thing.index] += 1 / len(shown)
    return things, torch.tensor([PLACES.index(album.scenes[row].place) for row in rows])


def _decoded(vae: AutoencoderKL, album: Album, count: int, seed: int) -> list[torch.Tensor]:
    """The first `count` frames, as a U-Net would paint them."""
    first = Album(album.scenes[:count], album.frames[:count])
    found: dict[int, torch.Tensor] = {}
    for rows in first.rows.values():
        passed = through_vae(vae, torch.stack([first.frames[row] for row in rows]), seed)
        found.update(zip(map(int, rows), passed, strict=True))
    return [found[row] for row in range(len(first.scenes))]
