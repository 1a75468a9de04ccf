"""Weights of words: AUTOMATIC1111's own examples, a slow reading character by character, and what is refused."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_cluster.errors import SpecError
from cat_cluster.models.prompt_weights import Piece, is_weighted, plain_text, read_pieces

# What that program's parser documents.
DOCUMENTED = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    "\\(literal\\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.573),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641),
        (".", 1.1),
    ],
    "(a:1.1)": [("a", 1.1)],
    "(a)": [("a", 1.1)],
    "((a))": [("a", 1.21)],
    "[a]": [("a", 1 / 1.1)],
    "[[a] b": [("a", 1 / 1.21), (" b", 1 / 1.1)],
    "a) b] c:1.2)": [("a) b] c:1.2)", 1.0)],
    "[a:1.5]": [("a:1.5", 1 / 1.1)],
    "( a : 0.5 ) b": [(" a ", 0.5), (" b", 1.0)],
    "a \\\\(b\\)": [("a \\", 1.0), ("b)", 1.1)],
    "c:\\dir": [("c:dir", 1.0)],
    "(a:0)": [("a", 0.0)],
    "": [("", 1.0)],
    "()": [("", 1.0)],
}


@pytest.mark.parametrize("prompt", DOCUMENTED)
def test_pieces_are_those_of_the_documented_examples(prompt: str) -> None:
    found = read_pieces(prompt, "a1111")
    assert [piece.text for piece in found] == [text for text, _ in DOCUMENTED[prompt]]
    assert [piece.weight for piece in found] == pytest.approx([weight for _, weight in DOCUMENTED[prompt]])
    assert not any(piece.starts_chunk for piece in found)


def test_break_starts_a_chunk() -> None:
    assert read_pieces("a cup BREAK  on grass\nBREAK", "a1111") == [
        Piece("a cup"),
        Piece("on grass", starts_chunk=True),
        Piece("", starts_chunk=True),
    ]
    assert read_pieces("BREAKFAST, a break", "a1111") == [Piece("BREAKFAST, a break")]
    inside = read_pieces("(a BREAK b:1.5) c", "a1111")
    assert inside == [Piece("a", 1.5), Piece("b", 1.5, starts_chunk=True), Piece(" c")]


@dataclass
class Slow:
    """A reading character by character, where a bracket that closes goes through everything behind its opening."""

    prompt: str
    characters: list[list[object]] = field(default_factory=list)  # [character or BREAK, weight]
    open: dict[str, list[int]] = field(default_factory=lambda: {"(": [], "[": []})

    def multiply(self, start: int, factor: float) -> None:
        for entry in self.characters[start:]:
            entry[1] *= factor  # type: ignore[operator]

    def number_at(self, colon: int) -> tuple[str, int] | None:
        """The number between a colon and a closing bracket, and where that bracket ends."""
        at, number = colon + 1, ""
        while self.prompt[at : at + 1] == " ":
            at += 1
        while self.prompt[at : at + 1] and self.prompt[at] in "+-.0123456789":
            if self.prompt[at] in "+-" and number:
                return None
            number, at = number + self.prompt[at], at + 1
        while self.prompt[at : at + 1] == " ":
            at += 1
        return (number, at + 1) if number.strip("+-") and self.prompt[at : at + 1] == ")" else None

    def read(self) -> list[list[object]]:
        at = 0
        while at < len(self.prompt):
            at = self.step(at)
        for bracket, factor in (("(", 1.1), ("[", 1 / 1.1)):
            for start in self.open[bracket]:
                self.multiply(start, factor)
        return self.characters

    def step(self, at: int) -> int:
        character, following = self.prompt[at], self.prompt[at + 1 : at + 2]
        if character == "\\":
            if following and following in "()[]\\":
                self.characters.append([following, 1.0])
                return at + 2
            return at + 1
        if character in self.open:
            self.open[character].append(len(self.characters))
            return at + 1
        number = self.number_at(at) if character == ":" else None
        if number is not None and self.open["("]:
            self.multiply(self.open["("].pop(), float(number[0]))
            return number[1]
        if character == ")" and self.open["("]:
            self.multiply(self.open["("].pop(), 1.1)
        elif character == "]" and self.open["["]:
            self.multiply(self.open["["].pop(), 1 / 1.1)
        else:
            taken = self.prompt[at : number[1] if number is not None else at + 1]
            self.characters += [[one, 1.0] for one in taken]
            return at + len(taken)
        return at + 1


@settings(max_examples=600, deadline=None)
@given(prompt=st.text(alphabet="()[]\\: ab.15", max_size=24))
def test_every_prompt_is_read_as_character_by_character(prompt: str) -> None:
    try:
        expected = Slow(prompt).read()
    except ValueError:  # 1.1.5 is no number
        expected = [["x", -1.0]]
    if any(not 0.0 <= weight <= 10.0 for _, weight in expected):  # type: ignore[operator]
        with pytest.raises(SpecError, match=r"^prompt: '.*write a number"):
            read_pieces(prompt, "a1111")
        return
    found = read_pieces(prompt, "a1111")
    assert "".join(piece.text for piece in found) == "".join(str(one) for one, _ in expected)
    weights = [piece.weight for piece in found for _ in piece.text]
    assert weights == pytest.approx([weight for _, weight in expected])
    assert all(one.weight != other.weight for one, other in pairwise(found))


@pytest.mark.parametrize("prompt", ["a (sks:1.2) cup BREAK b", "((a))", "\\(a\\)", "(a:99)", "(a:1.2.3)"])
def test_without_weighting_all_is_text(prompt: str) -> None:
    assert read_pieces(prompt, "none") == [Piece(prompt)]
    assert plain_text(prompt, "none") == prompt
    assert not is_weighted(prompt, "none")


def test_the_words_are_there_without_the_syntax() -> None:
    assert plain_text("a (sks:1.2)cup, [[snow]] \\(x\\)", "a1111").split() == ["a", "sks", "cup,", "snow", "(x)"]
    assert [is_weighted(prompt, "a1111") for prompt in ("a cup", "(a:1)", "a \\(b\\)", "[a]", "a BREAK b")] == [
        False,
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a (cup:10.5)", "'cup' has the weight 10.5,"),
        ("a (cup:-1)", "'cup' has the weight -1,"),
        ("((a cup:4) b:4)", "'a cup' has the weight 16,"),
        (f"{'(' * 25}cup", "'cup' has the weight 10.83,"),
        (f"{'(' * 30_000}cup", "'cup' has the weight inf,"),
        (f"{'(' * 30_000}(cup:0)", "'cup' has the weight nan,"),
        (f"(cup:{'1' * 400})", "'cup' has the weight inf,"),
        ("(at 10:30)", "'at 10' has the weight 30,"),
        ("(a:1.2.3)", "'1.2.3' is no weight"),
    ],
)
def test_a_weight_that_cannot_be_is_refused_by_field_with_the_remedy(prompt: str, named: str) -> None:
    for text in ("prompt", "negative_prompt"):
        with pytest.raises(SpecError) as caught:
            read_pieces(prompt, "a1111", text)
        assert str(caught.value).startswith(f"{text}: {named}")
        assert str(caught.value).endswith("(word:1.2), or \\( and \\) for brackets that are text")
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "piece",
    ["(", "[", "(:", ":", "(1", ":1", "\\", ": ", "(a)", "(a:1)", "[[]]", "()", " ", "BREAK ", "( )[ ]", "(a[b)c]"],
)
def test_no_prompt_takes_more_than_linear_time(piece: str) -> None:
    started = time.process_time()
    for end in ("", ")", "]", ":1)", f":{' ' * 32_000}1{' ' * 32_000}x)", f":{'1' * 32_000}x"):
        with suppress(SpecError):
            read_pieces((piece * 32_000)[:32_000] + end, "a1111")
    assert time.process_time() - started < 2.0
