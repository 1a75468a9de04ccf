from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from cat_cluster.models.pocket.pretraining.clip import new_clip, tokenize
from cat_cluster.models.pocket.pretraining.pretrain import make_tokenizer
from cat_cluster.models.pocket.pretraining.recipe import Recipe
from cat_cluster.models.pocket.pretraining.scenes import random_scenes
from cat_cluster.models.pocket.pretraining.unknown_words import low_variance_codes, marks, train_words, word_positions
from cat_cluster.models.pretraining.stage import Stage, StageProgress


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return make_tokenizer(Recipe.tiny(), tmp_path_factory.mktemp("tokenizer"), 0)


def test_the_word_is_found_where_it_stands(tokenizer: CLIPTokenizer) -> None:
    plain = ["a cup", "a photo of a red cup on grass", "an orange fish"]
    worded = ["a sks cup", "a photo of a qv red cup on grass", "a brlap orange fish"]
    ids, new = tokenize(tokenizer, plain), tokenize(tokenizer, worded)
    found = word_positions(ids, new, tokenizer)
    for row, word in enumerate(["sks", "qv", "brlap"]):
        assert tokenizer.decode(new[row][found[row]]).strip() == word
    assert not word_positions(ids, ids, tokenizer).any()


def test_codes_are_unit_and_lie_where_plain_states_hardly_vary(tokenizer: CLIPTokenizer) -> None:
    torch.manual_seed(0)
    recipe = Recipe.tiny()
    text = new_clip(recipe, tokenizer).text_model.eval()
    codes = low_variance_codes(text, tokenizer, random_scenes(24, 0), 4, 0)
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(len(tokenizer)))
    ids = tokenize(tokenizer, ["a photo of a red cup on grass", "a fish at night", "a blue car with eyes in snow"])
    with torch.no_grad():
        states = text(input_ids=ids).last_hidden_state.flatten(0, 1)
    along_codes = (states @ codes.T).var(0).mean()
    anywhere = (states @ torch.nn.functional.normalize(torch.randn(500, codes.shape[1]), dim=1).T).var(0).mean()
    assert along_codes < anywhere / 3


@pytest.mark.slow
def test_training_marks_unknown_words_and_leaves_plain_captions(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    recipe = replace(Recipe.tiny(), clip_width=32, words_steps=300, words_batch=16, words_rate=2e-3)
    model = new_clip(recipe, tokenizer).eval()
    plain, worded = "a photo of a red cup on grass", "a photo of a sks red cup on grass"
    ids = tokenize(tokenizer, [plain, worded])
    with torch.no_grad():
        before = model.text_model(input_ids=ids).last_hidden_state
    losses: list[StageProgress] = []
    marked, _ = train_words(recipe, model, tokenizer, Stage("words", tmp_path / "words.pt", "cpu", 0, losses.append))
    with torch.no_grad():
        after = marked.text_model(input_ids=ids).last_hidden_state
    moved = (after - before).norm(dim=-1)
    place = int(word_positions(ids[:1], ids[1:], tokenizer)[0].int().argmax())
    assert losses[-1].loss < losses[60].loss
    assert moved[1][place:].mean() > 2 * moved[0].mean()
    assert moved[1][:place].mean() < 1.5 * moved[0].mean() + 1e-3


def test_marks_equal_a_plain_loop(tokenizer: CLIPTokenizer) -> None:
    plain = ["a cup", "a photo of a red cup on grass", "a fish"]
    worded = ["a sks cup", "a photo of a brlap red cup on grass", "a fish"]
    ids, new = tokenize(tokenizer, plain), tokenize(tokenizer, worded)
    codes = torch.nn.functional.normalize(torch.randn(len(tokenizer), 6), dim=1)
    expected = torch.zeros(*ids.shape, 6)
    for row, word in enumerate(["sks", "brlap", None]):
        if word is not None:
            pieces = tokenizer(word).input_ids[1:-1]
            start = tokenizer(worded[row]).input_ids.index(pieces[0])
            for offset, piece in enumerate(pieces):
                expected[row, start + offset] = codes[piece]
            total = codes[pieces].sum(0)
            expected[row, start + len(pieces) :] = total / total.norm()
    spelt = codes[new] * word_positions(ids, new, tokenizer)[..., None]
    torch.testing.assert_close(marks(spelt), expected)
