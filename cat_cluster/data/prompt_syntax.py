"""Prompt syntax of other tools that is drawn as text here: adapters named in a prompt, weights of words."""

from __future__ import annotations

import re
from collections.abc import Iterator

# Each is possessive and begins at the first of its brackets, so that no prompt takes more than linear time.
_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*+>", re.IGNORECASE)
_GROUP = re.compile(r"(?<!\()\(++[^()]*+\)++|(?<!\[)\[++[^\[\]]*+\]++")
_WEIGHT = re.compile(r"\(\(.*\)\)|\[\[.*\]\]|.*:\s*+(?:\d++(?:\.\d*+)?|\.\d++)\s*+[)\]]++", re.DOTALL)
_SHOWN, _QUOTED = 3, 60  # pieces that a note quotes, and characters of each


def syntax_notes(prompt: str, negative_prompt: str = "") -> Iterator[str]:
    """Yield a note for each kind of syntax in the prompts that AUTOMATIC1111 and others obey and the encoder reads.

    These are `<lora:name:0.8>` and its like, and `(words:1.2)`, `((words))` and `[from:to:0.5]`.
    """
    texts = (prompt, negative_prompt)
    tags = [match[0] for text in texts for match in _TAG.finditer(text)]
    if tags:
        yield (
            f"{_shown(tags)} is drawn as text: an adapter is named outside of the prompt, as `model` or --adapter, and "
            "how much of it is applied as `strength`"
        )
    weights = [match[0] for text in texts for match in _GROUP.finditer(text) if _WEIGHT.fullmatch(match[0])]
    if weights:
        yield f"{_shown(weights)} is drawn as text, brackets and numbers too: words have no weights here"


def _shown(pieces: list[str]) -> str:
    kept = list(dict.fromkeys(piece if len(piece) <= _QUOTED else f"{piece[:_QUOTED]}..." for piece in pieces))
    more = f" (and {len(kept) - _SHOWN} more)" if len(kept) > _SHOWN else ""
    return ", ".join(map(repr, kept[:_SHOWN])) + more
