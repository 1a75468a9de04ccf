"""Token leaks: does concept i show up when the prompt has concept j's token, no token, or a decoy?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cat_cluster.data.concepts import Concept
from cat_cluster.evaluation.metrics import Array, leak_matrix, paired_similarity
from cat_cluster.evaluation.prompts import decoy, fill

NO_TOKEN = "none"


@dataclass(frozen=True)
class Trigger:
    """One column of the leak matrix: a label, and the word put before the class noun (None = no word)."""

    label: str
    word: str | None


@dataclass(frozen=True)
class LeakMatrix:
    """values[i][j]: how much closer trigger j brings concept i's prompts to its photos than in the base model."""

    tokens: tuple[str, ...]
    triggers: tuple[str, ...]
    values: Array

    @property
    def decoy_gain(self) -> float:
        """What a rare word that was never taught brings of a concept, in identity similarity; mean over concepts."""
        return float(self.values[:, -1].mean())

    def to_json(self) -> dict[str, Any]:
        """Rows by token, columns in the order of `triggers`; the last is the decoy word."""
        return {"tokens": list(self.tokens), "triggers": list(self.triggers), "values": self.values.tolist()}


@dataclass(frozen=True)
class DecoyScores:
    """How far the adapter moves each image of a decoy from the base's of the same seed: 0 where it does not answer."""

    token: str
    word: str
    seeds: tuple[int, ...]
    drifts: tuple[float, ...]


@dataclass(frozen=True)
class LeakPrompts:
    """The prompts of one cell: concept `row`, trigger `column`, and the seed of each image."""

    row: int
    column: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]


def triggers_of(concepts: Sequence[Concept]) -> tuple[Trigger, ...]:
    """Return every token, no token, and one decoy: works with one concept as with many."""
    tokens = [concept.token for concept in concepts]
    stray = decoy(tokens)
    return (*(Trigger(token, token) for token in tokens), Trigger(NO_TOKEN, None), Trigger(f"decoy {stray}", stray))


def leak_prompts(
    concepts: Sequence[Concept],
    pairs: Mapping[str, Sequence[tuple[str, int]]],
) -> tuple[LeakPrompts, ...]:
    """Return all cells; `pairs` gives each token its (template, seed) list.

    The seeds are those of the main images, so the cells "own token" and "none" cost no further image.
    """
    return tuple(
        LeakPrompts(
            row,
            column,
            tuple(fill(template, concept.class_noun, trigger.word) for template, _ in pairs[concept.token]),
            tuple(seed for _, seed in pairs[concept.token]),
        )
        for row, concept in enumerate(concepts)
        for column, trigger in enumerate(triggers_of(concepts))
    )


def measure_leaks(
    concepts: Sequence[Concept],
    adapted: Mapping[tuple[int, int], Array],
    base: Mapping[tuple[int, int], Array],
    photos: Sequence[Array],
) -> LeakMatrix:
    """Return the leak matrix from feature rows per cell (row, column)."""
    triggers = triggers_of(concepts)
    cells = [[(row, column) for column in range(len(triggers))] for row in range(len(concepts))]
    values = leak_matrix(
        [[adapted[cell] for cell in row] for row in cells],
        [[base[cell] for cell in row] for row in cells],
        photos,
    )
    return LeakMatrix(
        tuple(concept.token for concept in concepts), tuple(trigger.label for trigger in triggers), values
    )


def measure_decoys(
    concepts: Sequence[Concept],
    cells: Sequence[LeakPrompts],
    adapted: Mapping[tuple[int, int], Array],
    base: Mapping[tuple[int, int], Array],
) -> tuple[DecoyScores, ...]:
    """Return the drift on the decoy's prompts for each concept, from the feature rows of the leak matrix.

    drift_n = 1 - s(base(y_decoy)_n, f(y_decoy)_n)
    """
    *others, stray = triggers_of(concepts)
    column = len(others)
    return tuple(
        DecoyScores(
            concepts[cell.row].token,
            str(stray.word),
            cell.seeds,
            tuple((1.0 - paired_similarity(base[cell.row, column], adapted[cell.row, column])).tolist()),
        )
        for cell in cells
        if cell.column == column
    )
