"""Pocket-XL's two text encoders: the text halves of two CLIPs that see the same pictures. The second is the judge's."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from cat_cluster.models.pocket.clip import text_transformer
from cat_cluster.models.pocket_xl.captions import scene_caption
from cat_cluster.models.pocket_xl.emojis import Emoji
from cat_cluster.models.pocket_xl.pretraining.albums import Album, make_album
from cat_cluster.models.pocket_xl.pretraining.recipe import Recipe
from cat_cluster.models.pocket_xl.world import SIZE
from cat_cluster.models.pretraining.clip import augment, contrast, image_features, text_features, tokenize, trim_padding
from cat_cluster.models.pretraining.stage import (
    Stage,
    StageProgress,
    Stateful,
    half_precision,
    learning_rate_at,
    optimise,
    run_stage,
    update_average,
)

_KIN = 4  # pictures of one thing in a batch: its size, colour and place must then be told, too


class TextTowers(nn.Module):
    """Two text encoders and one pair of eyes: `judge` is a whole CLIP, `first` a text half that learns beside it."""

    def __init__(self, judge: CLIPModel, first: CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.judge = judge
        self.first = first
        self.first_scale = nn.Parameter(judge.logit_scale.detach().clone())


def new_towers(recipe: Recipe, vocabulary: CLIPTokenizer) -> TextTowers:
    """Untrained encoders for the vocabulary, and eyes for 64 px pictures."""
    vision = {
        "hidden_size": recipe.vision_width,
        "intermediate_size": 4 * recipe.vision_width,
        "num_attention_heads": recipe.vision_heads,
        "num_hidden_layers": recipe.vision_layers,
        "image_size": SIZE,
        "patch_size": 8,
        "projection_dim": recipe.clip_width,
    }
    second = _text_config(recipe, vocabulary, recipe.clip_width, recipe.clip_heads, recipe.clip_layers)
    first = _text_config(recipe, vocabulary, recipe.first_width, recipe.first_heads, recipe.first_layers)
    return TextTowers(
        CLIPModel(CLIPConfig(text_config=second, vision_config=vision, projection_dim=recipe.clip_width)),
        CLIPTextModelWithProjection(CLIPTextConfig(**first)),
    )


def _text_config(recipe: Recipe, vocabulary: CLIPTokenizer, width: int, heads: int, layers: int) -> dict[str, object]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "projection_dim": recipe.clip_width,
        "hidden_act": "quick_gelu",
        "vocab_size": len(vocabulary),
        "max_position_embeddings": recipe.text_length,
        "bos_token_id": vocabulary.bos_token_id,
        "eos_token_id": vocabulary.eos_token_id,
        "pad_token_id": vocabulary.pad_token_id,
    }


def train_towers(
    recipe: Recipe, emojis: Sequence[Emoji], tokenizer: CLIPTokenizer, stage: Stage
) -> tuple[TextTowers, StageProgress]:
    """Train both text halves against the same eyes: InfoNCE of pictures and captions, and nothing else."""
    device, seed = stage.device, stage.seed
    torch.manual_seed(seed)
    album = make_album(emojis, recipe.clip_scenes, seed + 1, (SIZE, SIZE))
    shown = _shown_in(album)
    towers = new_towers(recipe, tokenizer).to(device).train()
    for model in (towers.judge, towers.first):
        model.set_attn_implementation("eager")  # twice as fast as the fused kernel on a CPU at this size
    average = copy.deepcopy(towers)
    optimiser = torch.optim.AdamW(towers.parameters(), lr=recipe.clip_rate, betas=(0.9, 0.98), weight_decay=0.02)

    def step(index: int, progress: float) -> torch.Tensor:
        rng = np.random.default_rng([seed, 1, index])
        rows = batch_rows(shown, album, recipe.clip_batch, rng)
        texts = [scene_caption(album.scenes[row], emojis, rng) for row in rows]
        pixels = augment(torch.stack([album.frames[row] for row in rows]).float() / 255, rng).to(device)
        ids = trim_padding(tokenize(tokenizer, texts), tokenizer).to(device)
        with half_precision(device):
            images = image_features(towers.judge, pixels)
            second = text_features(towers.judge, ids)
            first = functional.normalize(towers.first(ids).text_embeds.float(), dim=-1)
        loss = contrast(towers.judge.logit_scale, images, second, texts)
        loss = loss + contrast(towers.first_scale, images, first, texts)
        optimise(loss, towers, optimiser, learning_rate_at(progress, recipe.clip_rate, warm_up=0.05))
        update_average(average, towers, 0.998, index)
        return loss

    state: dict[str, Stateful] = {"towers": towers, "average": average, "optimiser": optimiser}
    ended = run_stage(stage, recipe.clip_steps, state, step)
    return average.eval(), ended


def batch_rows(shown: dict[int, np.ndarray], album: Album, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Half of a batch in fours with a thing in common: negatives that the thing's name cannot tell apart."""
    fours = batch // (2 * _KIN)
    seeds = rng.integers(len(album.scenes), size=fours)
    kin = [rng.choice(shown[album.scenes[row].things[0].index], size=_KIN) for row in seeds]
    rest = rng.integers(len(album.scenes), size=batch - fours * _KIN)
    return np.concatenate([*kin, rest])


def _shown_in(album: Album) -> dict[int, np.ndarray]:
    """Picture -> the rows that show it."""
    rows: dict[int, list[int]] = {}
    for row, scene in enumerate(album.scenes):
        for thing in scene.things:
            rows.setdefault(thing.index, []).append(row)
    return {index: np.array(found) for index, found in rows.items()}


def save_towers(towers: TextTowers, folder: Path) -> None:
    """Save both, fp32."""
    towers.judge.save_pretrained(folder / "judge")
    towers.first.save_pretrained(folder / "first")


def load_towers(folder: Path) -> TextTowers:
    """What `save_towers` wrote."""
    judge = CLIPModel.from_pretrained(folder / "judge")
    return TextTowers(judge, CLIPTextModelWithProjection.from_pretrained(folder / "first")).eval()


def text_encoders(towers: TextTowers) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Both text encoders as the diffusers pipeline takes them (copies): the second has a projection."""
    # Of configs copies, too: saving half of a model notes its type there.
    first = CLIPTextModel(copy.deepcopy(towers.first.config))
    _copy(towers.first.text_model, first)
    second = CLIPTextModelWithProjection(copy.deepcopy(towers.judge.config.text_config))
    _copy(towers.judge.text_model, second.text_model)
    second.text_projection.load_state_dict(towers.judge.text_projection.state_dict())
    return first.eval(), second.eval()


def _copy(source: nn.Module, target: nn.Module) -> None:
    text_transformer(target).load_state_dict(text_transformer(source).state_dict())


@torch.no_grad()
def encode_texts(
    encoders: Sequence[nn.Module], tokenizers: Sequence[CLIPTokenizer], texts: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text states [N, L, D1 + D2] and pooled text [N, P] as the stock pipeline makes them.

    The states are those before each encoder's last layer; the pooled text is the second's projection.
    """
    states = []
    for encoder, tokenizer in zip(encoders, tokenizers, strict=True):
        ids = tokenize(tokenizer, texts).to(next(encoder.parameters()).device)
        found = encoder(ids, output_hidden_states=True)
        states.append(found.hidden_states[-2])
    pooled: torch.Tensor = found.text_embeds
    return torch.cat(states, dim=-1), pooled
