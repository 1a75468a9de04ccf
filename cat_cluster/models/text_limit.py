"""What a text encoder reads of a prompt: chunks of as many tokens as its tokenizer allows; the rest is cut off.

A prompt that is longer than a chunk is cut into several, each between marks of start and end, as AUTOMATIC1111 and
compel do; the encoder reads each alone, and the U-Net all of them, one after the other. A word may lie across two.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import cast

from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import CLIPTokenizer

from cat_cluster.models.base_names import EMBEDDED, base_folder, cached_file
from cat_cluster.models.prompt_weights import Piece, Prompt, join_pieces, read_pieces
from cat_cluster.models.single_file import tokenizer_folder


def first_words(prompt: str, count: int) -> str:
    """Return a prompt up to the end of its `count`-th word, whatever stands behind it.

    A word takes a token at least, so an encoder that reads `count` tokens makes the same of both.
    """
    word = next(islice(re.finditer(r"\S+", prompt), count - 1, None), None)
    return prompt if word is None else prompt[: word.end()]


@dataclass
class Chunk:
    """Tokens that the text encoder reads at once, without the marks of start and end, and the weight of each."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


class TextLimit:
    """The limit of a tokenizer, of which it keeps a copy. Only for one thread at a time.

    tokens: L, how many tokens are read at once, the marks of start and end with them.
    """

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        # A copy: a tokenizer that truncates in one thread and not in another at the same time fails.
        self._tokenizer = copy.deepcopy(tokenizer)
        self.tokens: int = tokenizer.model_max_length

    def chunks(self, prompt: Prompt) -> list[Chunk]:
        """Return the chunks of a prompt that are read, at least one: full ones, but for the last one of each part.

        Raises SpecError for a weight that cannot be.
        """
        room, found = self.tokens - 2, [Chunk()]
        for piece in read_pieces(prompt.text, prompt.weighting):
            if piece.starts_chunk:
                found.append(Chunk())
            # A word takes a token at least: what stands behind so many words only costs time.
            tokens = self._spell(first_words(piece.text, prompt.chunks * self.tokens))
            while tokens and len(found) <= prompt.chunks:
                last = found[-1]
                taken = tokens[: room - len(last.tokens)]
                last.tokens += taken
                last.weights += [piece.weight] * len(taken)
                tokens = tokens[len(taken) :]
                if tokens:
                    found.append(Chunk())
            if len(found) > prompt.chunks:
                return found[: prompt.chunks]
        if len(found) > 1 and not found[-1].tokens:  # behind a BREAK at the end there is nothing
            found.pop()
        return found

    def split(self, prompt: Prompt, *, field: str = "prompt") -> tuple[str, str]:
        """Return the start of a prompt that is read, up to its last whole word, and the rest from the next word on.

        Both are words without the syntax of their weights. If nothing is cut off, that is all of it and "". Raises
        SpecError, which begins with the field, for a weight that cannot be.
        """
        pieces, most = read_pieces(prompt.text, prompt.weighting, field), self.tokens - 2
        begun, used = 1, 0  # chunks so far, and the tokens in the last one
        for number, piece in enumerate(pieces):
            if piece.starts_chunk:
                begun, used = begun + 1, 0
            room = max(0, (prompt.chunks - begun + 1) * most - used)
            count = self.count(first_words(piece.text, room + 1))
            if count > room:
                read, rest = self._split_words(piece.text, room)
                behind = [Piece(rest, piece.weight), *pieces[number + 1 :]]
                return join_pieces([*pieces[:number], Piece(read, piece.weight)]), join_pieces(behind)
            full = max(0, used + count - 1) // most
            begun, used = begun + full, used + count - full * most
        return join_pieces(pieces), ""

    def _split_words(self, text: str, room: int) -> tuple[str, str]:
        """Return the whole words at the start of a text that `room` tokens hold, and the rest from the next one on."""
        # A word takes a token at least: of a text of any length only so many words need be looked at.
        ends = [match.end() for match in islice(re.finditer(r"[^\s,]+", text), room)]
        whole = bisect_right(ends, room, key=lambda end: self.count(text[:end]))
        end = ends[whole - 1] if whole else 0
        return text[:end], text[end:].lstrip(", \t\r\n")

    def count(self, text: str) -> int:
        """Return how many tokens a text takes, without marks."""
        return len(self._spell(text))

    def _spell(self, text: str) -> list[int]:
        if not text or text.isspace():  # between brackets there may be thousands
            return []
        return cast(list[int], self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def local_text_limit(base: str) -> TextLimit | None:
    """Return the limit of a base by its name; None for S3, and for what of the hub is not in the local cache."""
    folder = base_folder(base) if base in EMBEDDED else Path(base).expanduser()
    if not folder.exists():
        folder = cached_file(base) or folder
    try:
        if folder.is_file():
            folder = tokenizer_folder(folder)
        elif not folder.is_dir():
            folder = Path(snapshot_download(base, local_files_only=True, allow_patterns=["tokenizer/*"]))
        # Of a folder without one the library would make an empty tokenizer.
        if not (folder / "tokenizer" / "tokenizer_config.json").is_file():
            return None
        return TextLimit(CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True))
    except (OSError, ValueError, EntryNotFoundError):
        return None
