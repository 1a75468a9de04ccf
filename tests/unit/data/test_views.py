"""Which photo a row shows: each equally often, those of one size together, and the sizes in turns."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_cluster.data.views import views_of_step

SQUARE, UPRIGHT, WIDE = (8, 8), (10, 6), (6, 10)
KEY = (0, "mug", "sks")


@given(
    sizes=st.lists(st.sampled_from([SQUARE, UPRIGHT, WIDE]), min_size=1, max_size=12),
    rows=st.integers(1, 6),
)
@settings(max_examples=40, deadline=None)
def test_each_photo_is_shown_equally_often_and_a_step_has_photos_of_one_size(
    sizes: list[tuple[int, int]], rows: int
) -> None:
    steps = 240
    shown: Counter[int] = Counter()
    for step in range(steps):
        views = views_of_step(KEY, step, rows, sizes)
        assert len(views) == rows
        assert len({sizes[view] for view in views}) == 1
        shown.update(views)
    wanted = steps * rows / len(sizes)
    for view in range(len(sizes)):
        own = sizes.count(sizes[view])  # a size is due up to some steps early or late, and its photos share that
        assert abs(shown[view] - wanted) <= 4 * rows / own + 1


def test_photos_of_one_size_are_walked_through_without_repeats() -> None:
    for sizes in ([SQUARE] * 6, [SQUARE, WIDE] * 6):
        steps = [views_of_step(KEY, step, 2, sizes) for step in range(60)]
        of_size = [view for views in steps if sizes[views[0]] == SQUARE for view in views]
        for start in range(0, len(of_size) - 5, 6):
            assert len(set(of_size[start : start + 6])) == 6


def test_adapters_with_like_photos_draw_the_same_shape_in_the_same_step() -> None:
    """So the rows of a pack share calls: with an upright and a wide photo each, every step has one size, not two."""
    one, other = [UPRIGHT, WIDE], [WIDE, WIDE, UPRIGHT, UPRIGHT]
    for step in range(50):
        first = one[views_of_step((0, "mug", "sks"), step, 3, one)[0]]
        second = other[views_of_step((0, "tea", "zwx"), step, 4, other)[0]]
        assert first == second
    assert {one[views_of_step(KEY, step, 1, one)[0]] for step in range(4)} == {UPRIGHT, WIDE}


@pytest.mark.parametrize("other", [(1, "mug", "sks"), (0, "tea", "sks"), (0, "mug", "zwx")])
def test_another_key_is_another_walk(other: tuple[int | str, ...]) -> None:
    sizes = [SQUARE] * 8
    assert [views_of_step(KEY, step, 4, sizes) for step in range(4)] != [
        views_of_step(other, step, 4, sizes) for step in range(4)
    ]
