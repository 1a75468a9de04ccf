"""Which of a concept's views (crops of its photos) the rows of a step show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cat_cluster.data.keys import keyed_generator

_GOLDEN = 0.6180339887498949  # (sqrt 5 - 1) / 2: its multiples modulo 1 fill [0, 1) evenly, however many there are


def views_of_step(key: Sequence[str | int], step: int, rows: int, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Return the view of each row of a concept in a step, counted from 0; `key` names the concept's draws.

    sizes: (height, width) of each view. All rows of a step show views of one size, so that they share a U-Net call, and
    sizes take turns by their shares of the views. The turn depends on the step alone: adapters of a pack whose photos
    are alike draw the same shape in the same step. Among the views of a size every one is shown equally often.
    """
    by_shape = sorted(set(sizes), key=lambda size: (size[1] / size[0], size))
    views, turns = list(range(len(sizes))), step
    if len(by_shape) > 1:
        ends = np.cumsum([sizes.count(size) for size in by_shape]) / len(sizes)
        chosen = np.searchsorted(ends, np.arange(step + 1) * _GOLDEN % 1.0, side="right")
        views = [view for view in views if sizes[view] == by_shape[chosen[-1]]]
        turns = int((chosen[:-1] == chosen[-1]).sum())  # earlier steps of this size
    return [views[_place(key, turns * rows + row, len(views))] for row in range(rows)]


def _place(key: Sequence[str | int], count: int, views: int) -> int:
    """Walk through a fresh permutation of all views per epoch, so that every photo is seen equally often."""
    epoch, place = divmod(count, views)
    return int(keyed_generator(*key, "epoch", epoch).permutation(views)[place])
