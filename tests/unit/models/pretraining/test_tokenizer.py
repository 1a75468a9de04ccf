from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from cat_cluster.models.pocket import world
from cat_cluster.models.pocket.pretraining.captions import scene_caption
from cat_cluster.models.pretraining import tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    rng = np.random.default_rng(0)
    captions = [scene_caption(world.random_scene(rng), rng, rare=0.0) for _ in range(1_000)]
    return tokenizer.train_tokenizer(captions, tmp_path_factory.mktemp("tokenizer"), length=32)


def test_every_word_of_the_world_is_one_token(trained: CLIPTokenizer) -> None:
    text = "a photo of a red cup with blue stripes and eyes on grass"
    assert trained.tokenize(text) == [f"{word}</w>" for word in text.split()]
    ids = trained(text, padding="max_length", max_length=32).input_ids
    assert ids[0] == trained.bos_token_id
    assert ids[len(text.split()) + 1 :] == [trained.eos_token_id] * (32 - len(text.split()) - 1)


def test_stock_loader_reads_the_folder(trained: CLIPTokenizer, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again.model_max_length == 32
    assert again("a sks cup").input_ids == trained("a sks cup").input_ids


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_is_encodable_and_nothing_is_unknown(trained: CLIPTokenizer, text: str) -> None:
    pieces = trained.tokenize(text)
    assert trained.unk_token not in pieces or "<|endoftext|>" in text.lower()
    assert all(0 <= index < len(trained) for index in trained(text).input_ids)


def test_merges_equal_a_plain_recount_of_pairs() -> None:
    vocabulary, merges = tokenizer.learn_merges(["low low lower", "lowest new newer"])
    assert merges[0] == ("l", "o")  # l-o occurs four times, more than any other pair
    assert {"low</w>", "lower</w>", "lowest</w>", "new</w>", "newer</w>"} <= set(vocabulary)
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert len(vocabulary) == 256 + 256 + len({a + b for a, b in merges}) + 2
