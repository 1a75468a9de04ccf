"""Who trains with whom: adapters wait for a place in a group of their kind, and come in as others end."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from cat_cluster.cluster.groups import Group, Groups


def adapters(*names: str) -> list[Any]:
    return [SimpleNamespace(name=name, ordered=partial(SimpleNamespace, name=name)) for name in names]


def numbered(kind: str, count: int) -> list[Any]:
    return adapters(*(f"{kind}{n}" for n in range(count)))


def names(group: Group | None) -> list[str]:
    assert group is not None
    return list(group.works)


def started(groups: Groups) -> list[list[str]]:
    """Start all that can be started now."""
    found = []
    while (group := groups.next(busy=False)) is not None:
        found.append(names(group))
    return found


@pytest.mark.parametrize(
    ("most", "places", "count", "sizes"),
    [(1, 8, 5, [5]), (1, 8, 9, [8]), (2, 8, 9, [5, 4]), (4, 8, 9, [5, 4]), (3, 2, 5, [2, 2, 1]), (2, 2, 9, [2, 2])],
)
def test_groups_are_as_few_as_hold_all_and_as_even_as_can_be(
    most: int, places: int, count: int, sizes: list[int]
) -> None:
    groups = Groups(most)
    groups.wait("a", places, numbered("a", count))
    assert groups.to_come == -(-count // places)
    assert [len(one) for one in started(groups)] == sizes


def test_a_free_place_goes_to_the_next_of_the_kind() -> None:
    groups = Groups(most=1)
    groups.wait("a", 2, numbered("a", 4))
    groups.wait("b", 2, numbered("b", 1))
    group = groups.next(busy=False)
    assert group is not None
    assert names(group) == ["a0", "a1"]
    assert groups.fill() == []
    group.end("a0")
    [(filled, newcomers)] = groups.fill()
    assert filled is group
    assert [one.name for one in newcomers] == ["a2"]
    assert names(group) == ["a1", "a2"]
    assert groups.next(busy=False) is None, "there is one group at a time"


def test_workers_are_told_once_of_each_change_and_at_last_that_nothing_more_comes() -> None:
    groups = Groups(most=1)
    groups.wait("a", 2, numbered("a", 3))
    group = groups.next(busy=False)
    assert group is not None

    def told() -> list[tuple[int, list[str], bool]]:
        return [(one.number, [adapter.name for adapter in one.adapters], one.last) for _, one in groups.orders()]

    assert told() == [(1, ["a0", "a1"], False)]
    assert told() == []
    group.end("a1")
    groups.fill()
    assert told() == [(2, ["a0", "a2"], True)]
    groups.wait("a", 2, numbered("late", 1))
    assert groups.fill() == [], "its workers were told that nothing more comes"
    group.end("a0")
    assert told() == [(3, ["a2"], True)]


def test_checkpoints_are_needed_until_workers_follow_an_order_without_the_adapter() -> None:
    groups = Groups(most=1)
    groups.wait("a", 3, numbered("a", 3))
    group = groups.next(busy=False)
    assert group is not None
    groups.orders()
    group.end("a0")
    groups.orders()
    group.end("a1")
    assert group.forget(1) == []
    assert [groups.is_needed(f"a{n}") for n in range(3)] == [True, True, True]
    assert group.forget(2) == ["a0"]
    assert [groups.is_needed(f"a{n}") for n in range(3)] == [False, True, True]
    assert group.forget(3) == ["a1"]
    assert not groups.is_needed("a1")


def test_halves_train_first_and_by_themselves_and_who_needs_all_memory_last() -> None:
    groups = Groups(most=2)
    groups.wait("a", 4, numbered("a", 4))
    groups.wait_apart(adapters("x"), adapters("y", "z"))
    [alone] = adapters("large")
    groups.wait_alone(alone)
    assert started(groups) == [["x"], ["y", "z"]]
    assert groups.fill() == []
    assert [order.last for _, order in groups.orders()] == [True, True]
    groups.running.clear()
    assert started(groups) == [["a0", "a1", "a2", "a3"]]
    groups.running.clear()
    assert groups.next(busy=True) is None
    assert started(groups) == [["large"]]
    groups.running.clear()
    assert groups.idle


@pytest.mark.parametrize("seed", range(20))
def test_every_adapter_trains_once_and_no_group_has_more_than_its_places(seed: int) -> None:
    """Whatever ends when: as a loop over all of them would have it."""
    rng = random.Random(seed)
    groups = Groups(rng.randint(1, 4))
    places = {kind: rng.randint(1, 5) for kind in "abc"}
    waiting = {kind: [f"{kind}{n}" for n in range(rng.randint(1, 12))] for kind in places}
    for kind, ids in waiting.items():
        groups.wait(kind, places[kind], adapters(*ids))
    ended: list[str] = []
    while not groups.idle:
        while groups.next(busy=False) is not None:
            pass
        groups.fill()
        assert 1 <= len(groups.running) <= groups.most
        for group, order in groups.orders():
            if order.last and not order.adapters:
                del groups.running[group.number]
        for group in groups.running.values():
            [kind] = {name[0] for name in group.works}
            assert len(group.works) <= places[kind]
            for name in rng.sample(list(group.works), rng.randint(0, len(group.works))):
                group.end(name)
                ended.append(name)
    every: Sequence[str] = [name for ids in waiting.values() for name in ids]
    assert sorted(ended) == sorted(every)


def test_a_place_is_free_only_where_all_that_wait_have_one_too() -> None:
    groups = Groups(most=1, keep=1)
    assert started(groups) == [[]]
    assert groups.has_place("a")
    groups.wait("a", 2, adapters("a0"))
    assert groups.has_place("a"), "the group has two places"
    assert not groups.has_place("b"), "the only group will be one of a's"
    groups.wait("a", 2, adapters("a1"))
    assert not groups.has_place("a")
    groups.fill()
    [group] = groups.running.values()
    assert names(group) == ["a0", "a1"]
    group.end("a0")
    assert groups.has_place("a")
    groups.wait("b", 2, adapters("b0"))
    assert not groups.has_place("a"), "b would wait for ever as long as others of a come"
