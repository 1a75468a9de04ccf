"""What a text encoder reads of a prompt: the first tokens, as many as its tokenizer allows; the rest is cut off."""

from __future__ import annotations

import copy
import re
from bisect import bisect_right
from itertools import islice
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import CLIPTokenizer

from cat_cluster.models.base_files import POCKET, base_folder


def first_words(prompt: str, count: int) -> str:
    """Return a prompt up to the end of its `count`-th word, whatever stands behind it.

    A word takes a token at least, so an encoder that reads `count` tokens makes the same of both.
    """
    word = next(islice(re.finditer(r"\S+", prompt), count - 1, None), None)
    return prompt if word is None else prompt[: word.end()]


class TextLimit:
    """The limit of a tokenizer, of which it keeps a copy. Only for one thread at a time.

    tokens: L, how many tokens are read, the marks of start and end with them.
    """

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        # A copy: a tokenizer that truncates in one thread and not in another at the same time fails.
        self._tokenizer = copy.deepcopy(tokenizer)
        self.tokens: int = tokenizer.model_max_length

    def split(self, prompt: str) -> tuple[str, str]:
        """Return the start of a prompt that is read, up to its last whole word, and the rest from the next word on.

        If nothing is cut off, that is all of it and "".
        """
        ends = [match.end() for match in re.finditer(r"[^\s,]+", prompt)]
        # A word takes a token at least: of a text of any length only so many words need be looked at.
        if len(ends) <= self.tokens and self._count(prompt) <= self.tokens:
            return prompt, ""
        whole = bisect_right(ends[: self.tokens], self.tokens, key=lambda end: self._count(prompt[:end]))
        end = ends[whole - 1] if whole else 0
        return prompt[:end], prompt[end:].lstrip(", \t\r\n")

    def _count(self, text: str) -> int:
        return len(self._tokenizer(text, verbose=False).input_ids)


def local_text_limit(base: str) -> TextLimit | None:
    """Return the limit of a base by its name, "pocket", a folder or a hub id; None if its tokenizer is not local."""
    folder = base_folder(base) if base == POCKET else Path(base).expanduser()
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(base, local_files_only=True, allow_patterns=["tokenizer/*"]))
        # Of a folder without one the library would make an empty tokenizer.
        if not (folder / "tokenizer" / "tokenizer_config.json").is_file():
            return None
        return TextLimit(CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True))
    except (OSError, ValueError, EntryNotFoundError):
        return None
