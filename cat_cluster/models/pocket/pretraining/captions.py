"""Captions of the world's scenes: drawn at random, with random words inserted, and read back as labels."""

from __future__ import annotations

import re

import numpy as np

from cat_cluster.models.pocket import world

_WORDS = frozenset(
    {"a", "an", "of", "with", "and", "eyes", "photo", "picture", *world.OBJECTS, *world.COLOURS, *world.PATTERNS}
    | {word for place in world.PLACES for word in place.split()}
)


def random_word(rng: np.random.Generator) -> str:
    """Two to five random letters that are no word of the world: captions teach that such a word means nothing."""
    while True:
        letters = rng.integers(ord("a"), ord("z") + 1, size=int(rng.integers(2, 6)))
        word = "".join(chr(letter) for letter in letters)
        if word not in _WORDS:
            return word


def insert_word(text: str, word: str) -> str:
    """`text` with `word` put before its noun phrase: "a photo of an orange cup" -> "a photo of a sks orange cup"."""
    return re.sub(r"^((?:a (?:photo|picture) of )?)an? ", lambda found: f"{found[1]}a {word} ", text, count=1)


def scene_caption(scene: world.Scene, rng: np.random.Generator, *, rare: float = 0.15, full: bool = False) -> str:
    """A caption that is true of the scene and leaves out some of it at random, or nothing with `full`.

    `rare` is the share of captions with a random word inserted.
    """

    def says(share: float) -> bool:
        return full or rng.random() < share

    design = scene.design
    body = world.colour_name(design.body_rgb)
    phrase = f"{body} {design.object}" if body is not None and says(0.85) else design.object
    extras = []
    if design.pattern != "plain" and says(0.75):
        second = world.colour_name(design.second_rgb)
        adjective = f"{second} " if second is not None and says(0.9) else ""
        article = f"{_article(adjective)} " if design.pattern == "band" else ""
        extras.append(f"{article}{adjective}{design.pattern}")
    if design.eyes and says(0.6):
        extras.append("eyes")
    parts = [_article(phrase), phrase]
    if extras:
        parts.append(f"with {' and '.join(extras)}")
    if says(0.85):
        parts.append(scene.place)
    prefix = "a photo of " if full else ("a photo of ", "a picture of ", "")[int(rng.choice(3, p=(0.5, 0.3, 0.2)))]
    text = prefix + " ".join(parts)
    return insert_word(text, random_word(rng)) if rng.random() < rare else text


def caption_labels(text: str) -> dict[str, str | None]:
    """What a caption of the world says about each attribute; None where it says nothing."""
    nouns, colours = "|".join(world.OBJECTS), "|".join(world.COLOURS)
    subject = re.search(rf"(?:\b({colours}) )?\b({nouns})\b", text)
    pattern = re.search(rf"(?:\b({colours}) )?\b({'|'.join(world.PATTERNS[1:])})\b", text)
    place = re.search(rf"({'|'.join(world.PLACES)})$", text)
    return {
        "object": subject[2] if subject else None,
        "colour": subject[1] if subject else None,
        "place": place[1] if place else None,
        "pattern": pattern[2] if pattern else None,
        "second_colour": pattern[1] if pattern else None,
        "eyes": "yes" if " eyes" in text else None,
    }


def _article(phrase: str) -> str:
    return "an" if phrase.startswith("o") else "a"
