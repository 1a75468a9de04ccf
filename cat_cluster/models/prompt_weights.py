"""A prompt and the weights of its words, as AUTOMATIC1111 writes them: `(word:1.2)`, `(word)`, `[word]`, and BREAK.

The rules are those of that program's wiki, "Attention/emphasis". `(a)` multiplies by 1.1, `[a]` divides by 1.1,
`(a:1.2)` multiplies by 1.2, and brackets inside brackets multiply. A bracket that nothing closes reaches to the end;
one that closes nothing, and a number outside round brackets, are text. A backslash makes the bracket, or the backslash,
behind it text; any other backslash is dropped. The word BREAK starts a new chunk, here inside brackets too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cat_cluster.errors import SpecError
from cat_cluster.spec.choices import Weighting

PROMPT_CHUNKS = 4  # read of a prompt where nobody says how many
LARGEST_WEIGHT = 10.0
_ROUND, _SQUARE = 1.1, 1 / 1.1
# Possessive, and a character belongs to one alternative, so that no prompt takes more than linear time.
_PART = re.compile(r"\\[()\[\]\\]?|:\s*+([+-]?[.\d]++)\s*+\)|[()\[\]:]|[^\\()\[\]:]++")
_BREAK = re.compile(r"\bBREAK\b")
_QUOTED = 60  # characters of a text that an error quotes
_REMEDY = r"write a number, as in (word:1.2), or \( and \) for brackets that are text"


@dataclass(frozen=True)
class Prompt:
    """A text for the text encoder: how its words are weighted, and how many chunks of it are read at most.

    A chunk is what the encoder reads at once: L tokens, the marks of start and end with them. negative: guidance starts
    from it; where it is empty, that is from what the base was trained with.
    """

    text: str
    weighting: Weighting = "none"
    chunks: int = 1
    negative: bool = False


@dataclass(frozen=True)
class Piece:
    """Words of one weight; starts_chunk: the text encoder reads them in a chunk of their own, and what follows."""

    text: str
    weight: float = 1.0
    starts_chunk: bool = False


def read_pieces(prompt: str, weighting: Weighting, field: str = "prompt") -> list[Piece]:
    """Return the pieces of a prompt, at least one; without weighting it is text, whatever stands in it.

    Raises SpecError, which begins with the field, for a weight that is no number from 0 to 10.
    """
    if weighting == "none":
        return [Piece(prompt)]
    parts = [(match[0], match[1]) for match in _PART.finditer(prompt)]
    factors, closing = _match_brackets(parts, field)
    rounds, squares, pieces = [1.0], [1.0], _Pieces(field)
    for place, (text, _) in enumerate(parts):
        if place in factors:
            levels = rounds if text == "(" else squares
            levels.append(levels[-1] * factors[place])
        elif place in closing:
            (squares if text == "]" else rounds).pop()
        elif text[0] == "\\":
            pieces.add(text[1:], rounds[-1] * squares[-1])
        else:
            first, *others = _BREAK.split(text)
            pieces.add(first.rstrip() if others else first, rounds[-1] * squares[-1])
            for number, other in enumerate(others, 1):
                stripped = other.lstrip() if number == len(others) else other.strip()
                pieces.add(stripped, rounds[-1] * squares[-1], starts_chunk=True)
    return pieces.done()


def plain_text(prompt: str, weighting: Weighting) -> str:
    """Return the words of a prompt without the syntax of its weights; raises SpecError as read_pieces."""
    return join_pieces(read_pieces(prompt, weighting))


def join_pieces(pieces: Sequence[Piece]) -> str:
    """Return the text of pieces; words of different weights are different words."""
    return pieces[0].text if len(pieces) == 1 else " ".join(text for piece in pieces if (text := piece.text.strip()))


def is_weighted(prompt: str, weighting: Weighting) -> bool:
    """Say whether any word of a prompt has a weight, or a chunk of its own; raises SpecError as read_pieces."""
    return any(piece.weight != 1.0 or piece.starts_chunk for piece in read_pieces(prompt, weighting))


def _match_brackets(parts: Sequence[tuple[str, str | None]], field: str) -> tuple[dict[int, float], set[int]]:
    """Return the factor of each bracket that opens, by its place in `parts`, and the places that close one."""
    factors, closing = dict[int, float](), set[int]()
    rounds, squares = list[int](), list[int]()
    for place, (text, number) in enumerate(parts):
        if text == "(":
            rounds.append(place)
        elif text == "[":
            squares.append(place)
        elif rounds and (text == ")" or number is not None):
            factors[rounds.pop()] = _ROUND if number is None else _number(number, field)
            closing.add(place)
        elif squares and text == "]":
            factors[squares.pop()] = _SQUARE
            closing.add(place)
    factors |= dict.fromkeys(rounds, _ROUND) | dict.fromkeys(squares, _SQUARE)
    return factors, closing


def _number(text: str, field: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SpecError(f"{field}: {text[:_QUOTED]!r} is no weight of words: {_REMEDY}") from None


class _Pieces:
    """Pieces that grow: neighbours of one weight are one."""

    def __init__(self, field: str) -> None:
        self._field = field
        self._found: list[tuple[list[str], float, bool]] = []

    def add(self, text: str, weight: float, *, starts_chunk: bool = False) -> None:
        if text and not 0.0 <= weight <= LARGEST_WEIGHT:
            raise SpecError(
                f"{self._field}: {text[:_QUOTED]!r} has the weight {weight:.4g}, all brackets around it multiplied, "
                f"and may have 0 to {LARGEST_WEIGHT:g}: {_REMEDY}"
            )
        if self._found and self._found[-1][1] == weight and not starts_chunk:
            self._found[-1][0].append(text)
        else:
            self._found.append(([text], weight, starts_chunk))

    def done(self) -> list[Piece]:
        pieces = [Piece("".join(texts), weight, starts) for texts, weight, starts in self._found]
        return [piece for piece in pieces if piece.text or piece.starts_chunk] or [Piece("")]
