"""What a text encoder reads of a prompt: text in the part that is cut off changes nothing, text before it does."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.text_limit import TextLimit, local_text_limit

SOME = ["sks", "cup,", "photo", "unbelievable", "caf\u00e9", "a", "(blue)", "x-9"]
WORDS = st.lists(st.sampled_from(SOME), max_size=60)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base_model("pocket")


@settings(max_examples=60, deadline=None)
@given(words=WORDS)
def test_the_encoder_sees_what_is_read_and_nothing_of_what_is_cut(base: BaseModel, words: list[str]) -> None:
    limit, prompt = TextLimit(base.tokenizer), " ".join(words)
    read, cut = limit.read(prompt), limit.cut(prompt)
    assert prompt.startswith(read)
    assert prompt == read or prompt.replace(" ", "").replace(",", "") == (read + cut).replace(" ", "").replace(",", "")
    texts = (prompt, prompt.rstrip(", "))
    fits = [len(base.tokenizer(text, verbose=False).input_ids) <= limit.tokens for text in texts]
    assert (read == prompt) == fits[0]
    assert (cut == "") == fits[1]  # a comma at the end says nothing
    if cut:
        # The first word that is cut does not fit; another one in the place of its last letters is not seen.
        first = cut.split()[0].rstrip(",")
        assert len(base.tokenizer(f"{read} {first}", verbose=False).input_ids) > limit.tokens
        other = prompt + " zebra"
        assert torch.equal(base.encode_text([other]), base.encode_text([prompt]))


def test_one_word_that_is_too_long_is_not_read_whole(base: BaseModel) -> None:
    limit = TextLimit(base.tokenizer)
    word = "xq" * 200
    assert (limit.read(word), limit.cut(word)) == ("", word)
    assert (limit.read(""), limit.cut("")) == ("", "")


def test_the_limit_of_a_base_is_found_without_loading_or_downloading_it(base: BaseModel, tmp_path: Path) -> None:
    found = local_text_limit("pocket")
    assert found is not None
    assert found.tokens == base.tokenizer.model_max_length == 32
    by_folder = local_text_limit(str(base.folder))
    assert by_folder is not None
    assert by_folder.read("a cup " * 40) == found.read("a cup " * 40)
    assert local_text_limit("nobody/never-downloaded") is None
    assert local_text_limit(str(tmp_path)) is None


def test_a_limit_and_the_encoder_may_be_used_by_two_threads(base: BaseModel) -> None:
    limit, failures = TextLimit(base.tokenizer), []

    def encode() -> None:
        try:
            for _ in range(300):
                base.tokenizer("a sks cup " * 30, padding="max_length", max_length=32, truncation=True)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=encode)
    thread.start()
    for _ in range(60):
        limit.cut("a sks cup " * 30)
    thread.join()
    assert failures == []
