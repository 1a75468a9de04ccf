"""What a text encoder reads of a prompt: text in the part that is cut off changes nothing, text before it does."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.prompt_weights import Prompt
from cat_cluster.models.text_limit import TextLimit, first_words, local_text_limit
from tests.support.texts import states_of

SOME = ["sks", "cup,", "photo", "unbelievable", "caf\u00e9", "a", "(blue)", "x-9"]
WORDS = st.lists(st.sampled_from(SOME), max_size=60)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base_model("pocket")


@settings(max_examples=60, deadline=None)
@given(words=WORDS)
def test_the_encoder_sees_what_is_read_and_nothing_of_what_is_cut(base: BaseModel, words: list[str]) -> None:
    limit, prompt = TextLimit(base.tokenizer), " ".join(words)
    read, cut = limit.split(Prompt(prompt))
    assert prompt.startswith(read)
    assert prompt.endswith(cut)
    assert prompt == read or set(prompt[len(read) : len(prompt) - len(cut)]) <= {" ", ","}
    texts = (prompt, prompt.rstrip(", "))
    fits = [len(base.tokenizer(text, verbose=False).input_ids) <= limit.tokens for text in texts]
    assert (read == prompt) == fits[0]
    assert (cut == "") == fits[1]  # a comma at the end says nothing
    if cut:
        # The first word that is cut does not fit, and what comes behind it is not seen.
        first = prompt[: len(prompt) - len(cut)] + cut.split()[0].rstrip(",")
        assert len(base.tokenizer(first, verbose=False).input_ids) > limit.tokens
        other = prompt + " zebra"
        assert torch.equal(states_of(base, [other]), states_of(base, [prompt]))


@settings(max_examples=60, deadline=None)
@given(words=WORDS, gap=st.sampled_from([" ", "  ", "\n", "\u3000", ", ", " \t"]))
def test_words_that_an_encoder_cannot_reach_need_not_be_looked_at(base: BaseModel, words: list[str], gap: str) -> None:
    prompt = gap.join(words)
    start = first_words(prompt, base.tokenizer.model_max_length)
    assert prompt.startswith(start)
    assert len(start.split()) == min(len(prompt.split()), 32)
    assert torch.equal(states_of(base, [start]), states_of(base, [prompt]))


def test_a_whole_prompt_is_few_words() -> None:
    assert first_words(" a  cup ", 2) == " a  cup"
    assert first_words(" a  cup ", 3) == " a  cup "
    assert first_words("", 1) == ""


def test_one_word_that_is_too_long_is_not_read_whole(base: BaseModel) -> None:
    limit = TextLimit(base.tokenizer)
    word = "xq" * 200
    assert limit.split(Prompt(word)) == ("", word)
    assert limit.split(Prompt("")) == ("", "")


def test_the_limit_of_a_base_is_found_without_loading_or_downloading_it(base: BaseModel, tmp_path: Path) -> None:
    found = local_text_limit("pocket")
    assert found is not None
    assert found.tokens == base.tokenizer.model_max_length == 32
    by_folder = local_text_limit(str(base.folder))
    assert by_folder is not None
    assert by_folder.split(Prompt("a cup " * 40)) == found.split(Prompt("a cup " * 40))
    assert local_text_limit("nobody/never-downloaded") is None
    assert local_text_limit(str(tmp_path)) is None


@pytest.mark.slow
def test_a_limit_and_the_encoder_may_be_used_by_two_threads(base: BaseModel) -> None:
    """A tokenizer has one setting for truncation, which each call changes while another may be at work."""
    limit, text, faults, done = (
        TextLimit(base.tokenizer),
        "acupofsksandmore" * 300 + " a sks cup",
        list[object](),
        threading.Event(),
    )

    def encode() -> None:
        while not done.is_set():
            try:
                ids = base.tokenizer([text], padding="max_length", max_length=32, truncation=True).input_ids[0]
            except RuntimeError as error:
                faults.append(error)
            else:
                faults.extend([len(ids)] if len(ids) != 32 else [])

    thread = threading.Thread(target=encode)
    thread.start()
    cuts = {limit.split(Prompt(text)) for _ in range(25)}
    done.set()
    thread.join()
    assert (len(cuts), faults) == (1, [])
