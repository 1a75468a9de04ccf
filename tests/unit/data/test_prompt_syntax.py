"""Other tools' prompt syntax is named in a note; ordinary prompts are not, and no prompt takes long."""

from __future__ import annotations

import time

import pytest

from cat_cluster.data.prompt_syntax import syntax_notes, take_tags


@pytest.mark.parametrize("tag", ["<lora:cup:0.8>", "<LoRA:my cup_v2:1>", "<lyco:cup:0.5:0.2>", "<hypernet:x:1>"])
def test_an_adapter_in_the_prompt_is_told_where_it_is_named(tag: str) -> None:
    for texts in ((f"a sks cup {tag} in snow", ""), ("a sks cup", f"red{tag}")):
        [note] = syntax_notes(*texts)
        assert note.startswith(f"{tag!r} is drawn as text: ")
        assert "`model`" in note
        assert "<lora:ID:0.8>" in note


@pytest.mark.parametrize(
    ("prompt", "drawn", "named"),
    [
        ("a sks cup <lora:cup:0.8> in snow", "a sks cup in snow", ["cup:0.8"]),
        ("<lora:cup><LyCO: mug :1 >a cup", "a cup", ["cup", "mug :1"]),
        ("a cup <lora:cup:1>, red", "a cup , red", ["cup:1"]),
        (" two  spaces  and no tag ", " two  spaces  and no tag ", []),
        ("<hypernet:x:1> <lora cup> lora:cup:1", "<hypernet:x:1> <lora cup> lora:cup:1", []),
        ("a <lora:> cup", "a cup", [""]),
        ("<lora:a<lora:b>", "<lora:a", ["b"]),
        ("", "", []),
    ],
)
def test_adapters_are_taken_out_of_a_prompt(prompt: str, drawn: str, named: list[str]) -> None:
    assert take_tags(prompt) == (drawn, named)


@pytest.mark.parametrize(
    "weight",
    ["(word:1.2)", "(a red cup: 0.7)", "(x:.5)", "((word))", "(((a, b)))", "[[word]]", "[cat:dog:0.5]", "(x:1)"],
)
def test_a_weight_of_words_is_told_to_be_text(weight: str) -> None:
    for texts in ((f"a {weight} cup", ""), ("a cup", f"{weight}, red")):
        [note] = syntax_notes(*texts)
        assert note.startswith(f"{weight!r} is drawn as text")
        assert "words have weights with `weighting` a1111, or --weighting" in note


def test_a_break_is_told_to_be_a_word() -> None:
    for texts in (("a red BREAK cup", ""), ("a cup", "red\nBREAK\nblue"), ("a BREAK cup BREAK", "BREAK")):
        assert list(syntax_notes(*texts)) == [
            "'BREAK' is drawn as a word: it starts a new chunk with `weighting` a1111, or --weighting"
        ]
        assert list(syntax_notes(*texts, "a1111")) == []
    assert list(syntax_notes("break, Break, BREAKFAST, OUTBREAK, BREAK_1", "")) == []


def test_where_words_have_weights_only_what_weighs_nothing_is_told() -> None:
    for prompt in ("(word:1.2) ((a)) [[b]] \\(c\\)", "a cup AND", "[a], (b|c), android, And, [a: 5 b]"):
        found = list(syntax_notes(prompt, "", "a1111"))
        assert (found == []) is ("AND" not in prompt), found
    for other in ("[cat:dog:0.5]", "[a|b]", "[[x:.5]", "[dog:10]", "AND"):
        for texts in ((f"a {other} cup", ""), ("a cup", f"{other}, red")):
            [note] = syntax_notes(*texts, "a1111")
            assert note.startswith(f"{other!r} is drawn as words: a prompt is one, and the same at each step")
    [tag] = syntax_notes("a <hypernet:x:1> (cup:1.2)", "", "a1111")
    assert tag.startswith("'<hypernet:x:1>' is drawn as text")


@pytest.mark.parametrize(
    "prompt",
    ["", "a sks cup", "a cup (blue) on a table", "a [red] cup", "16:9, f:1.8", "a cup :) (yes", "<b> a cup </b>", "()",
     "a (cup, at 5:30 pm) now", "lora:cup:0.8", "> < a:1) ]"],
)  # fmt: skip
def test_ordinary_text_is_not_taken_for_syntax(prompt: str) -> None:
    assert list(syntax_notes(prompt, prompt)) == []


def test_both_kinds_are_told_and_few_are_quoted() -> None:
    tags = " ".join(f"<lora:{'long' * 30}{number}:1>" for number in range(9))
    weights = " ".join(f"(word{number}:1.1)" for number in range(9))
    adapters, words = syntax_notes(f"{tags} {weights}")
    assert "'<lora:long" in adapters
    assert "'(word0:1.1)', '(word1:1.1)', '(word2:1.1)' (and 6 more) is" in words
    assert len(adapters) < 600


@pytest.mark.parametrize(
    "piece", ["(", "[", "(:", ":", "(1", ":1", "<lora:", ": ", "(a)", "(a:1)", "(:1)", "[[]]", "()"]
)
def test_no_prompt_takes_more_than_linear_time(piece: str) -> None:
    started = time.process_time()
    take_tags((piece * 32_000)[:32_000])
    take_tags((f"{piece} <lora:cup> " * 32_000)[:32_000])
    for end in ("", ")", "]", "x)", "1x)"):
        list(syntax_notes((piece * 32_000)[:32_000] + end, f"(:{'1' * 32_000}{end}"))
        list(syntax_notes((piece * 32_000)[:32_000] + end, f"[:{'1 ' * 16_000}{end}", "a1111"))
    assert time.process_time() - started < 2.0
