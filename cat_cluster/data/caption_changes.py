"""Captions that change from row to row: cut down to token and class noun, tags left out, tags in another order.

A caption's tags are what its commas part. One that holds the token, or a word of the class noun, is always there, and
where it was; so are the first `keep_tags` tags.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cat_cluster.data.concepts import Concept, has_token
from cat_cluster.spec.fields import words
from cat_cluster.spec.sections import TrainingSpec


def changed_caption(
    caption: str, token: str, class_noun: str, training: TrainingSpec, generator: np.random.Generator
) -> str:
    """Return a row's caption, a function of what the generator draws; where nothing changes, to the byte.

    Of a smaller share what is left out is a part of what a larger one leaves out, and in the same order.
    """
    if generator.random() < training.caption_dropout:
        return f"{token} {class_noun}"
    if not training.changes_tags:
        return caption
    tags = _tags(caption)
    movable = _movable(tags, token, class_noun, training.keep_tags)
    left_out = {place for place in movable if generator.random() < training.tag_dropout}
    order = generator.permutation(len(movable)) if training.shuffle_tags else range(len(movable))
    moved = {place: movable[int(source)] for place, source in zip(movable, order, strict=True)}
    sources = [moved.get(place, place) for place in range(len(tags))]
    if sources == list(range(len(tags))) and not left_out:
        return caption
    return ", ".join(tags[source] for source in sources if source not in left_out)


def longest_first(
    caption: str, token: str, class_noun: str, training: TrainingSpec, length: Callable[[str], int]
) -> str:
    """Return the caption with its longest tags first, where they may move; itself where tags keep their order.

    No order has a word further behind.
    """
    if not training.shuffle_tags:
        return caption
    tags = _tags(caption)
    movable = _movable(tags, token, class_noun, training.keep_tags)
    moved = dict(zip(movable, sorted((tags[place] for place in movable), key=length, reverse=True), strict=True))
    return ", ".join(moved.get(place, tag) for place, tag in enumerate(tags))


def tag_warnings(adapter_id: str, concepts: Sequence[Concept], training: TrainingSpec) -> tuple[str, ...]:
    """Return a warning for each concept whose captions have no tags that these settings could change."""
    if not training.changes_tags:
        return ()
    least = 1 if training.tag_dropout else 2  # one alone has no other order
    names = " and ".join(name for name in ("tag_dropout", "shuffle_tags") if getattr(training, name))
    return tuple(
        f"adapter {adapter_id}, token {one.token}: training.{names} changes nothing: no caption has tags, parted by "
        "commas, beside what holds the token or the class noun"
        for one in concepts
        if all(
            len(_movable(_tags(example.prompt), one.token, one.class_noun, training.keep_tags)) < least
            for example in one.examples
        )
    )


def _tags(caption: str) -> list[str]:
    return [tag for part in caption.split(",") if (tag := part.strip())]


def _movable(tags: Sequence[str], token: str, class_noun: str, keep: int) -> list[int]:
    noun = set(words(class_noun))
    return [
        place
        for place, tag in enumerate(tags)
        if place >= keep and not has_token(tag, token) and noun.isdisjoint(words(tag))
    ]
