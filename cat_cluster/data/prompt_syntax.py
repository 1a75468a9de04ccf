"""Prompt syntax of other tools: adapters named in a prompt, and what is drawn as text, such as words' weights."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cat_cluster.spec.choices import Weighting

# Each is possessive and begins at the first of its brackets, so that no prompt takes more than linear time.
_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*+>", re.IGNORECASE)
_ADAPTER_TAG = re.compile(r"<(?:lora|lyco):([^<>]*+)>", re.IGNORECASE)
_GROUP = re.compile(r"(?<!\()\(++[^()]*+\)++|(?<!\[)\[++[^\[\]]*+\]++")
_WEIGHT = re.compile(r"\(\(.*\)\)|\[\[.*\]\]|.*:\s*+(?:\d++(?:\.\d*+)?|\.\d++)\s*+[)\]]++", re.DOTALL)
# What changes between steps, or draws several prompts as one: nothing that a weight could mean.
_EDIT = re.compile(r"(?<!\[)\[++[^\[\]]*+\]")
_CHANGE = re.compile(r".*(?:\|.*|:\s*+(?:\d++(?:\.\d*+)?|\.\d++)\s*+)\]", re.DOTALL)
_AND = re.compile(r"\bAND\b")
_BREAK = re.compile(r"\bBREAK\b")
_SHOWN, _QUOTED = 3, 60  # pieces that a note quotes, and characters of each


def take_tags(prompt: str) -> tuple[str, list[str]]:
    """Return a prompt without the tags that name adapters, and what these hold: `cup:0.8` of `<lora:cup:0.8>`.

    As in AUTOMATIC1111 the tags are no text; the spaces beside one are those of one word.
    """
    parts, tags, end = [], [], 0
    for match in _ADAPTER_TAG.finditer(prompt):
        parts.append(prompt[end : match.start()])
        tags.append(match[1].strip())
        end = match.end()
    if not tags:
        return prompt, tags
    text = ""
    for part in (*parts, prompt[end:]):
        text += part.lstrip() if not text or text[-1].isspace() else part
    return text.rstrip(), tags


def syntax_notes(prompt: str, negative_prompt: str = "", weighting: Weighting = "none") -> Iterator[str]:
    """Yield a note for each kind of syntax in the prompts that AUTOMATIC1111 and others obey and the encoder reads.

    These are `<lora:name:0.8>` and its like, and `(words:1.2)`, `((words))`, `[from:to:0.5]` and `BREAK`; where words
    are weighted, what would change between steps, `[from:to:0.5]` and `[a|b]`, and `AND`.
    """
    texts = (prompt, negative_prompt)
    tags = [match[0] for text in texts for match in _TAG.finditer(text)]
    if tags:
        yield (
            f"{_shown(tags)} is drawn as text: the prompt, not the negative one, names adapters, as <lora:ID:0.8>, or "
            "`model` or --adapter does; there are no hypernetworks"
        )
    if weighting == "a1111":
        changes = [match[0] for text in texts for match in _EDIT.finditer(text) if _CHANGE.fullmatch(match[0])]
        changes += [match[0] for text in texts for match in _AND.finditer(text)]
        if changes:
            yield f"{_shown(changes)} is drawn as words: a prompt is one, and the same at each step"
        return
    weights = [match[0] for text in texts for match in _GROUP.finditer(text) if _WEIGHT.fullmatch(match[0])]
    if weights:
        yield (
            f"{_shown(weights)} is drawn as text, brackets and numbers too: words have weights with `weighting` a1111, "
            "or --weighting"
        )
    if any(_BREAK.search(text) for text in texts):
        yield "'BREAK' is drawn as a word: it starts a new chunk with `weighting` a1111, or --weighting"


def _shown(pieces: list[str]) -> str:
    kept = list(dict.fromkeys(piece if len(piece) <= _QUOTED else f"{piece[:_QUOTED]}..." for piece in pieces))
    more = f" (and {len(kept) - _SHOWN} more)" if len(kept) > _SHOWN else ""
    return ", ".join(map(repr, kept[:_SHOWN])) + more
