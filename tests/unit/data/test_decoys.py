"""Decoys: odd words that are never a token, and other tokens where they are no prompt of the other concept."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from transformers import CLIPTokenizer

from cat_cluster.data.decoys import WORDS, odd_words, with_decoys
from cat_cluster.data.draws import ConceptMaterial
from cat_cluster.errors import BaseModelError
from cat_cluster.models.base_names import base_folder
from tests.support.texts import square_sizes


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(base_folder("pocket") / "tokenizer", local_files_only=True)


@pytest.fixture
def spell(tokenizer: CLIPTokenizer):  # type: ignore[no-untyped-def]
    return lambda text: tokenizer(text, add_special_tokens=False).input_ids


def concept(token: str, noun: str, prompts: Sequence[str], *, crops: int = 1) -> ConceptMaterial:
    views = [prompt for prompt in prompts for _ in range(crops)]
    moments = torch.zeros(len(views), 8, 4, 4)
    return ConceptMaterial(token, noun, 1.0, 1.0, tuple(moments), tuple(views), tuple(views), square_sizes(len(views)))


def test_words_are_odd_ones_of_two_to_five_letters_and_a_function_of_their_key(spell, tokenizer) -> None:  # type: ignore[no-untyped-def]
    words = odd_words(0, "mug", "sks", spell=spell, never=())
    assert words == odd_words(0, "mug", "sks", spell=spell, never=())
    assert len(set(words)) == WORDS
    assert all(re.fullmatch("[a-z]{2,5}", word) for word in words)
    assert {len(word) for word in words} == {2, 3, 4, 5}
    assert all(len(tokenizer.tokenize(word)) > 1 for word in words)
    for key in ((1, "mug", "sks"), (0, "tea", "sks"), (0, "mug", "zwx")):
        assert len(set(words) & set(odd_words(*key, spell=spell, never=()))) <= 2


@pytest.mark.parametrize("case", [str.lower, str.upper, str.title])
def test_a_decoy_is_never_a_token_nor_a_word_of_the_captions_or_of_the_evaluation(spell, case) -> None:  # type: ignore[no-untyped-def]
    """The words that would be drawn are taught, written in any case; others are drawn in their place."""
    drawn = odd_words(0, "mug", "sks", spell=spell, never=())[:5]
    caption, other, noun, beside, judged = map(case, drawn)
    mug = concept("sks", f"{noun} cup", (f"a {caption} sks mug",))
    fish = concept(other, "fish", (f"a fish {beside}",))
    found, _ = with_decoys((mug, fish), seed=0, draw_key="mug", spell=spell, never=(judged,))
    words = set(found.decoys[0].odd_words)
    assert len(words) == WORDS
    assert words.isdisjoint({*drawn, "sks"})


def test_a_word_that_the_text_encoder_reads_as_the_token_is_no_decoy() -> None:
    """An encoder that knows the first two letters alone: the rest of a word makes it no other word."""

    def spell(word: str) -> list[int]:
        return [ord(letter) for letter in word.lower()[:2]]

    words = odd_words(0, "mug", "sks", spell=spell, never=("sks", "cup"))
    assert len({word[:2] for word in words}) == WORDS
    taken = odd_words(0, "mug", "sks", spell=spell, never=(f"{words[0][:2]}zzz",))
    assert words[0][:2] not in {word[:2] for word in taken}


@pytest.mark.parametrize("known", [[7], [7, 7]])
def test_a_tokenizer_that_tells_no_words_apart_is_refused(known: list[int]) -> None:
    with pytest.raises(BaseModelError, match="decoy_fraction: the base model's tokenizer tells only"):
        odd_words(0, "mug", "sks", spell=lambda word: known, never=())


def test_the_words_of_a_caption_are_those_of_each_of_its_crops(spell) -> None:  # type: ignore[no-untyped-def]
    captions = ("a photo of a sks cup", "SKS, a cup in  snow", "a cup,sks , not asks")
    (found,) = with_decoys((concept("sks", "cup", captions, crops=2),), seed=0, draw_key="mug", spell=spell, never=())
    words = odd_words(0, "mug", "sks", spell=spell, never=())
    assert len(found.decoys) == 6
    assert {word for decoys in found.decoys for word in decoys.odd_words} <= set(words)
    assert {decoys.other_tokens for decoys in found.decoys} == {()}
    assert found.decoys[0] == found.decoys[1]


@pytest.mark.parametrize("captions", [1, 2, 6, 32, 50])
def test_there_are_few_decoys_however_many_captions(spell, captions: int) -> None:  # type: ignore[no-untyped-def]
    prompts = tuple(f"a sks cup number {n}" for n in range(captions))
    others = tuple(concept(token, noun, (f"a {token} {noun}",)) for token, noun in (("zwx", "fish"), ("ohwx", "car")))
    found, *_ = with_decoys((concept("sks", "cup", prompts), *others), seed=0, draw_key="m", spell=spell, never=())
    assert all(decoys.odd_words and decoys.other_tokens for decoys in found.decoys)
    odd, tokens = (
        {
            (prompt, word)
            for prompt, decoys in zip(found.prompts, found.decoys, strict=True)
            for word in getattr(decoys, kind)
        }
        for kind in ("odd_words", "other_tokens")
    )
    assert 0.8 * WORDS <= len(odd) <= max(WORDS, captions)
    assert len(tokens) <= max(WORDS, captions)
    assert len({word for _, word in odd}) >= 0.8 * WORDS, "captions have words of their own"
    assert {word for _, word in tokens} <= {"zwx", "ohwx"}
    assert captions > 2 * WORDS or len({word for _, word in tokens}) == 2


def test_another_token_is_a_decoy_only_where_the_prompt_asks_for_no_taught_concept(spell) -> None:  # type: ignore[no-untyped-def]
    concepts = (
        concept("sks", "cup", ("a photo of a sks cup", "sks on a table")),
        concept("zwx", "tea cup", ("a photo of a zwx tea cup",)),
        concept("ohwx", "Fish", ("a photo of a ohwx fish",)),
    )
    cup, tea_cup, fish = with_decoys(concepts, seed=0, draw_key="tea", spell=spell, never=())
    assert set(cup.decoys[0].other_tokens) == {"ohwx"}, "a zwx cup is what zwx is asked for by"
    assert cup.decoys[1].other_tokens == (), "so is a zwx on a table, whose caption names no cup"
    assert tea_cup.decoys[0].other_tokens == ("ohwx",)
    assert set(fish.decoys[0].other_tokens) == {"sks", "zwx"}
    in_cup = (concept("sks", "cup", ("sks fish in a cup",)), concept("zwx", "fish", ("zwx fish in a cup",)))
    assert with_decoys(in_cup, seed=0, draw_key="tea", spell=spell, never=())[0].decoys[0].other_tokens == ()


def test_an_adapters_decoys_are_its_own_settings_and_photos_alone(spell) -> None:  # type: ignore[no-untyped-def]
    """Nothing of another adapter is asked for, and the order of concepts decides nothing of the odd words."""
    pair = (concept("sks", "cup", ("a sks cup",)), concept("zwx", "fish", ("a zwx fish",)))
    there = with_decoys(pair, seed=3, draw_key="tea", spell=spell, never=())
    back = with_decoys(pair[::-1], seed=3, draw_key="tea", spell=spell, never=())
    assert there[0].decoys == back[1].decoys
    assert there[1].decoys == back[0].decoys
