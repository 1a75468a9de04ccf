"""Decoys: captions with another odd word where the token stood, on which an adapter is to stay the base model.

Without them an adapter may learn that any odd word brings its concept. The words are drawn once per concept and not in
every step, so that a run encodes few new texts and keeps few of them.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from cat_cluster.data.concepts import replace_token
from cat_cluster.data.draws import ConceptMaterial, Decoys
from cat_cluster.data.keys import keyed_generator
from cat_cluster.errors import BaseModelError
from cat_cluster.spec.fields import words

WORDS = 32  # of a concept; no more decoys of it are encoded, unless it has more captions
SHORTEST, LONGEST = 2, 5  # letters of a word
_TRIES = 100 * WORDS
Spell = Callable[[str], Sequence[int]]


def with_decoys(
    concepts: Sequence[ConceptMaterial], *, seed: int, draw_key: str, spell: Spell, never: Collection[str]
) -> tuple[ConceptMaterial, ...]:
    """Return the concepts of one adapter with the decoys of each view.

    seed, draw_key: with the concept's token the key of its words. spell: the ids that the base's tokenizer makes of a
    word. never: words that are no decoys, beside the adapter's tokens and the words of its captions and class nouns.
    Another token of the adapter is a decoy of a caption too, where the caption names a class noun that is not the
    other's: else "a zwx cup" would be held to the base for one concept and taught for the other.
    Raises BaseModelError where the tokenizer tells too few words apart.
    """
    taught = {prompt for concept in concepts for prompt in concept.prompts}
    texts = [*never, *taught, *(text for concept in concepts for text in (concept.token, concept.class_noun))]
    taken = {word for text in texts for word in words(text)}
    found = []
    for concept in concepts:
        captions = list(dict.fromkeys(concept.prompts))
        odd = odd_words(seed, draw_key, concept.token, spell=spell, never=taken)
        decoys = {}
        for place, caption in enumerate(captions):
            named = [other.token for other in concepts if _contrasts(caption, concept, other)]
            others = _part(named, place, len(captions))
            untaught = (word for word in others if replace_token(caption, concept.token, word) not in taught)
            decoys[caption] = Decoys(tuple(_part(odd, place, len(captions))), tuple(untaught))
        found.append(replace(concept, decoys=tuple(decoys[caption] for caption in concept.prompts)))
    return tuple(found)


def odd_words(*key: str | int, spell: Spell, never: Collection[str]) -> tuple[str, ...]:
    """Return 32 words of 2 to 5 random letters, a function of `key` but for those that are passed over.

    A word that the tokenizer has as one piece is passed over, for it may mean something; and one that the text encoder
    cannot tell from a word of `never`, such as a token, or from one before.
    """
    taken = {tuple(spell(word)) for word in never}
    letters, generator = string.ascii_lowercase, keyed_generator(*key, "decoys")
    found: list[str] = []
    for _ in range(_TRIES):
        length = int(generator.integers(SHORTEST, LONGEST + 1))
        word = "".join(letters[i] for i in generator.integers(len(letters), size=length))
        pieces = tuple(spell(word))
        if len(pieces) > 1 and pieces not in taken:
            found.append(word)
            taken.add(pieces)
        if len(found) == WORDS:
            return tuple(found)
    raise BaseModelError(
        f"training.decoy_fraction: the base model's tokenizer tells only {len(found)} of {WORDS} random words apart; "
        "set it to 0 with this base"
    )


def _contrasts(caption: str, concept: ConceptMaterial, other: ConceptMaterial) -> bool:
    """Whether a caption of `concept` with the other's token is no prompt that the other concept is asked for by."""
    own = set(words(concept.class_noun))
    return own <= set(words(caption)) and own.isdisjoint(words(other.class_noun))


def _part(items: Sequence[str], place: int, captions: int) -> list[str]:
    """The items of one caption: all captions together have as many as WORDS, and each has one at least."""
    size = min(len(items), max(1, WORDS // captions))
    return [items[(place * size + i) % len(items)] for i in range(size)]
