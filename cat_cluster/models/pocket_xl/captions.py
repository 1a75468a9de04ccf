"""Captions of Pocket-XL's scenes: true of the scene, in a few plain forms, with parts left out at random."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cat_cluster.models.pocket_xl.emojis import Emoji
from cat_cluster.models.pocket_xl.world import Scene, Thing

PREFIXES = ("a photo of ", "a picture of ", "")
JOINS = (" beside ", " next to ", " and ")


def scene_caption(scene: Scene, emojis: Sequence[Emoji], rng: np.random.Generator, *, full: bool = False) -> str:
    """A caption that is true of the scene and leaves out some of it at random.

    With `full` it has one form, each thing's own name, and all that has a word.
    """

    def says(share: float) -> bool:
        return full or rng.random() < share

    things = list(scene.things)
    if len(things) == 2 and not full and rng.random() < 0.5:  # "beside" has no left and right
        things.reverse()
    phrases = [_phrase(thing, emojis[thing.index], rng, full=full) for thing in things]
    join = JOINS[0] if full else JOINS[int(rng.choice(3, p=(0.5, 0.2, 0.3)))]
    text = join.join(phrases)
    if says(0.85):
        text += f" {scene.place}"
    return PREFIXES[0 if full else int(rng.choice(3, p=(0.5, 0.2, 0.3)))] + text


def with_article(phrase: str) -> str:
    """`phrase` after "a" or "an"."""
    return (
        f"an {phrase}" if phrase[0] in "aeiou" and not phrase.startswith(("uni", "eu", "one", "u ")) else f"a {phrase}"
    )


def _phrase(thing: Thing, emoji: Emoji, rng: np.random.Generator, *, full: bool) -> str:
    name, way = emoji.name, rng.random()
    if not full and emoji.others and way < 0.15:
        name = emoji.others[int(rng.integers(len(emoji.others)))]
    elif not full and emoji.kind is not None and way > 0.93:
        name = emoji.kind
    words = [
        thing.bulk if full or rng.random() < 0.8 else "",
        thing.colour if full or rng.random() < 0.9 else "",
        name,
    ]
    return with_article(" ".join(word for word in words if word))
