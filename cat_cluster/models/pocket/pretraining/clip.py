"""Training of Pocket-SD's CLIP, whose text half is the text encoder and whose whole is the judge."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from cat_cluster.models.pocket import world
from cat_cluster.models.pocket.classifier import LABELS
from cat_cluster.models.pocket.clip import text_transformer
from cat_cluster.models.pocket.pretraining.captions import scene_caption
from cat_cluster.models.pocket.pretraining.recipe import Recipe
from cat_cluster.models.pocket.pretraining.scenes import (
    label_indices,
    masked_cross_entropy,
    random_scenes,
    render,
    scene_labels,
)
from cat_cluster.models.pretraining.clip import (
    augment,
    contrast,
    image_features,
    text_features,
    tokenize,
    trim_padding,
)
from cat_cluster.models.pretraining.stage import (
    Stage,
    StageProgress,
    half_precision,
    learning_rate_at,
    optimise,
    run_stage,
    update_average,
)


def new_clip(recipe: Recipe, tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP for 64 px pictures and the world's vocabulary."""
    shared = {
        "hidden_size": recipe.clip_width,
        "intermediate_size": 4 * recipe.clip_width,
        "num_attention_heads": recipe.clip_heads,
        "projection_dim": recipe.clip_width,
        "hidden_act": "quick_gelu",
    }
    text = {
        **shared,
        "vocab_size": len(tokenizer),
        "num_hidden_layers": recipe.clip_text_layers,
        "max_position_embeddings": recipe.text_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**shared, "num_hidden_layers": recipe.clip_vision_layers, "image_size": world.SIZE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=recipe.clip_width))


def train_clip(
    recipe: Recipe,
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    stage: Stage,
) -> tuple[CLIPModel, StageProgress]:
    """Train the vision half against the frozen text half: InfoNCE, and linear heads that ask for every attribute.

    Contrast alone is content with colour and place; the heads make the judge see shape, pattern and eyes as well.
    """
    device, seed = stage.device, stage.seed
    torch.manual_seed(seed)
    scenes = random_scenes(recipe.scenes, seed)
    frames = render(scenes)
    truth = label_indices([scene_labels(scene) for scene in scenes])
    groups = [torch.nonzero(truth["place"] == place)[:, 0].numpy() for place in range(len(world.PLACES))]
    model = model.to(device).train()
    model.text_model.requires_grad_(False)
    model.set_attn_implementation("eager")  # twice as fast as the fused kernel on a CPU at this size
    heads = nn.ModuleDict({name: nn.Linear(recipe.clip_width, len(of)) for name, of in LABELS.items()}).to(device)
    average = copy.deepcopy(model)
    parts = nn.ModuleList([model, heads])
    trained = [parameter for parameter in parts.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=recipe.clip_rate, betas=(0.9, 0.98), weight_decay=0.02)

    def step(index: int, progress: float) -> torch.Tensor:
        rng = np.random.default_rng([seed, 1, index])
        rows = _batch_rows(groups, len(frames), recipe.clip_batch, rng)
        texts = [scene_caption(scenes[row], rng, rare=0.3) for row in rows]
        pixels = augment(frames[rows].float() / 255, rng).to(device)
        with half_precision(device):
            images = image_features(model, pixels)
            captions = text_features(model, trim_padding(tokenize(tokenizer, texts), tokenizer).to(device))
            loss = contrast(model.logit_scale, images, captions, texts)
        for name, head in heads.items():
            loss = loss + 0.5 * masked_cross_entropy(head(images * 10), truth[name][rows].to(device))
        optimise(loss, parts, optimiser, learning_rate_at(progress, recipe.clip_rate, warm_up=0.05))
        update_average(average, model, 0.995, index)
        return loss

    state = {"model": model, "average": average, "heads": heads, "optimiser": optimiser}
    ended = run_stage(stage, recipe.clip_steps, state, step)
    return average.eval(), ended


def _batch_rows(groups: list[np.ndarray], count: int, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Half of a batch from one place: negatives that the place cannot tell apart."""
    place = groups[int(rng.integers(len(groups)))]
    near = rng.choice(place, size=batch // 2) if len(place) else rng.integers(count, size=batch // 2)
    return np.concatenate([near, rng.integers(count, size=batch - batch // 2)])


def text_encoder(model: CLIPModel) -> CLIPTextModel:
    """The text half, as the diffusers pipeline takes it (a copy)."""
    encoder = CLIPTextModel(model.config.text_config)
    text_transformer(encoder).load_state_dict(text_transformer(model.text_model).state_dict())
    return encoder.eval()
