"""Training of the text encoder: the text half of the CLIP, alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer

from cat_cluster.models.pocket.classifier import LABELS
from cat_cluster.models.pocket.pretraining.captions import caption_labels, insert_word, random_word, scene_caption
from cat_cluster.models.pocket.pretraining.clip import new_clip
from cat_cluster.models.pocket.pretraining.recipe import Recipe
from cat_cluster.models.pocket.pretraining.scenes import label_indices, random_scenes
from cat_cluster.models.pretraining.clip import tokenize, trim_padding
from cat_cluster.models.pretraining.stage import Stage, StageProgress, learning_rate_at, optimise, run_stage


def train_text(
    recipe: Recipe,
    tokenizer: CLIPTokenizer,
    stage: Stage,
) -> tuple[CLIPModel, StageProgress]:
    """Train the text half alone: its pooled output must tell what a caption says, and ignore unknown words.

    It comes first and stays frozen from then on, so that the U-Net need not wait for the judge's eyes.
    """
    device, seed = stage.device, stage.seed
    torch.manual_seed(seed)
    scenes = random_scenes(recipe.scenes, seed)
    model = new_clip(recipe, tokenizer).to(device)
    text = model.text_model
    heads = nn.ModuleDict(
        {name: nn.Linear(recipe.clip_width, len(names) + 1) for name, names in LABELS.items()}  # + "says nothing"
    ).to(device)
    parts = nn.ModuleList([text, heads])
    optimiser = torch.optim.AdamW(parts.parameters(), lr=recipe.clip_rate, betas=(0.9, 0.98), weight_decay=0.02)

    def step(index: int, progress: float) -> torch.Tensor:
        rng = np.random.default_rng([seed, 0, index])
        texts = [scene_caption(scenes[row], rng, rare=0.0) for row in rng.integers(len(scenes), size=recipe.text_batch)]
        with_word = [insert_word(caption, random_word(rng)) for caption in texts]
        ids = trim_padding(tokenize(tokenizer, texts + with_word), tokenizer).to(device)
        pooled = text(input_ids=ids).pooler_output
        said = label_indices([caption_labels(caption) for caption in texts])
        plain, marked = pooled.chunk(2)
        loss = 4 * (1 - functional.cosine_similarity(plain, marked, dim=-1)).mean()
        for name, head in heads.items():
            target = torch.where(said[name] < 0, len(LABELS[name]), said[name]).repeat(2).to(device)
            loss = loss + functional.cross_entropy(head(pooled), target)
        optimise(loss, parts, optimiser, learning_rate_at(progress, recipe.clip_rate, warm_up=0.05))
        return loss

    state = {"model": model, "heads": heads, "optimiser": optimiser}
    ended = run_stage(stage, recipe.text_steps, state, step)
    return model.eval(), ended
