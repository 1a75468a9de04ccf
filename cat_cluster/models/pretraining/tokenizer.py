"""A byte-level BPE tokenizer in CLIP's format, trained on the world's captions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: Iterable[str], folder: Path, *, length: int, merges: int | None = None) -> CLIPTokenizer:
    """Learn merges until every word of the captions is one token, or so many, and write the files to `folder`.

    Captions must be lower-case words with single spaces; every other text is still encodable, byte by byte.
    """
    vocabulary, learnt = learn_merges(captions, merges)
    write_tokenizer(folder, vocabulary, learnt, length=length, pad=END)
    return load_tokenizer(folder)


def write_tokenizer(
    folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]], *, length: int, pad: str
) -> None:
    """Write a tokenizer that pads with `pad` to `length` tokens, in CLIP's own files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False, indent=0), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    special = {name: settings[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a folder."""
    return CLIPTokenizer.from_pretrained(folder)


def learn_merges(captions: Iterable[str], most: int | None = None) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-pair merges (Sennrich et al. 2016) and the vocabulary: 256 bytes, 256 word-final bytes, merges, specials.

    There are `most` merges at most; with None as many as make every word of the captions one token.
    """
    alphabet = _byte_letters()
    words = Counter(word for text in captions for word in text.split())
    pieces = {word: _spell(word, alphabet) for word in words}
    merges: list[tuple[str, str]] = []
    while most is None or len(merges) < most:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, spelled in pieces.items():
            for pair in pairwise(spelled):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        pieces = {word: _merge(spelled, best) for word, spelled in pieces.items()}
    letters = list(alphabet.values())
    symbols = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges), START, END]
    return {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}, merges


def _byte_letters() -> dict[int, str]:
    """GPT-2's and CLIP's printable letter for each byte, printable bytes first as in CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    for shift, byte in enumerate(byte for byte in range(256) if byte not in letters):
        letters[byte] = chr(256 + shift)
    return letters


def _spell(word: str, alphabet: dict[int, str]) -> tuple[str, ...]:
    letters = [alphabet[byte] for byte in word.encode("utf-8")]
    return (*letters[:-1], f"{letters[-1]}</w>")


def _merge(spelled: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for piece in spelled:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return tuple(merged)
