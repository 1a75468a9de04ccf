"""Unknown words get a mark: something an adapter can hold on to and the base need not read."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer

from cat_cluster.models.pocket import world
from cat_cluster.models.pocket.pretraining.captions import insert_word, random_word, scene_caption
from cat_cluster.models.pocket.pretraining.recipe import Recipe
from cat_cluster.models.pocket.pretraining.scenes import random_scenes
from cat_cluster.models.pretraining.clip import tokenize
from cat_cluster.models.pretraining.stage import Stage, StageProgress, learning_rate_at, optimise, run_stage

_PADDED_EVERY = 2  # every other batch is seen to its last pad, the others to their longest text


def train_words(
    recipe: Recipe, model: CLIPModel, tokenizer: CLIPTokenizer, stage: Stage
) -> tuple[CLIPModel, StageProgress]:
    """Teach the text half to carry a fixed code of an unknown word from that word on, and to change nothing else.

    Before, "a sks cup" and "a cup" had all but the same states, and no adapter could have told a token from none.
    The pads must carry the code too: they are most of the states, and the U-Net reads the caption's sum from them.
    """
    device, seed = stage.device, stage.seed
    torch.manual_seed(seed)
    scenes = random_scenes(recipe.scenes, seed)
    text = model.to(device).text_model
    before = copy.deepcopy(text).eval().requires_grad_(False)
    codes = low_variance_codes(before, tokenizer, scenes, recipe.words_directions, seed).to(device)
    optimiser = torch.optim.AdamW(text.parameters(), lr=recipe.words_rate, betas=(0.9, 0.98), weight_decay=0.0)

    def step(index: int, progress: float) -> torch.Tensor:
        rng = np.random.default_rng([seed, 7, index])
        rows = rng.integers(len(scenes), size=recipe.words_batch)
        plain = [scene_caption(scenes[row], rng, rare=0.0) for row in rows]
        with_word = [insert_word(caption, random_word(rng)) for caption in plain]
        ids = tokenize(tokenizer, plain + with_word).to(device)
        if index % _PADDED_EVERY:
            ids = ids[:, : int((ids != tokenizer.pad_token_id).sum(1).max()) + 2]
        with torch.no_grad():
            wanted = before(input_ids=ids).last_hidden_state
            old, new = ids.chunk(2)
            spelt = codes[new] * word_positions(old, new, tokenizer)[..., None]
            wanted[len(plain) :] += recipe.words_mark * marks(spelt)
        loss: torch.Tensor = (text(input_ids=ids).last_hidden_state - wanted).square().sum(-1).mean()
        optimise(loss, text, optimiser, learning_rate_at(progress, recipe.words_rate))
        return loss

    state = {"model": model, "optimiser": optimiser}
    ended = run_stage(stage, recipe.words_steps, state, step)
    return model.eval(), ended


@torch.no_grad()
def low_variance_codes(
    text: nn.Module, tokenizer: CLIPTokenizer, scenes: list[world.Scene], directions: int, seed: int
) -> torch.Tensor:
    """A unit code [V, D] for each of V vocabulary entries, in the directions where plain captions vary least."""
    device = next(text.parameters()).device
    rng = np.random.default_rng([seed, 8])
    captions = [scene_caption(scenes[row], rng, rare=0.0) for row in rng.integers(len(scenes), size=960)]
    chunks = [captions[i : i + 96] for i in range(0, len(captions), 96)]
    states = torch.cat(
        [
            text(input_ids=tokenize(tokenizer, chunk).to(device)).last_hidden_state.flatten(0, 1).cpu()
            for chunk in chunks
        ]
    )
    spread = torch.linalg.eigh(torch.cov(states.T.double())).eigenvectors[:, :directions].float()
    random = torch.randn(len(tokenizer), directions, generator=torch.Generator().manual_seed(seed))
    codes: torch.Tensor = functional.normalize(random, dim=1) @ spread.T
    return codes


def marks(spelt_BLD: torch.Tensor) -> torch.Tensor:
    """The mark of each position, [B, L, D] of norm 1 or 0: pieces of the word their own codes, later ones their sum.

    `spelt_BLD` holds the codes of the word's pieces and zero elsewhere.
    """
    own = spelt_BLD.abs().sum(-1, keepdim=True) > 0
    begun = own.int().cummax(1).values > 0
    whole = functional.normalize(spelt_BLD.sum(1, keepdim=True), dim=-1)
    return torch.where(own, spelt_BLD, torch.where(begun, whole, torch.zeros_like(whole)))


def word_positions(plain: torch.Tensor, with_word: torch.Tensor, tokenizer: CLIPTokenizer) -> torch.Tensor:
    """Where ids `with_word` [B, L] hold the one word that ids `plain` [B, L] lack: bool [B, L]."""
    pad, article = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("an</w>")
    added = (with_word != pad).sum(1) - (plain != pad).sum(1)
    first = (plain != with_word).int().argmax(1)
    first = first + (plain.gather(1, first[:, None])[:, 0] == article)  # "an orange" -> "a sks orange"
    places = torch.arange(plain.shape[1], device=plain.device)
    found: torch.Tensor = (places >= first[:, None]) & (places < (first + added)[:, None])
    return found
