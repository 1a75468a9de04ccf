"""Whose turn it is: the rules by example, against a slow oracle, and over time."""

from __future__ import annotations

import random
from collections import Counter
from datetime import timedelta
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_cluster.runs.fair_share import FairShare
from cat_cluster.runs.queue import QueueEntry
from tests.support.queued_runs import NOON, entry_of

SEEDS = st.integers(0, 2**32)
OWNERS = ("ann", "bob", "cid")


def owners_of(share: FairShare, *waiting: tuple[QueueEntry, int]) -> str:
    """The first letters of the owners in the order of their turns."""
    return "".join(entry.owner[0] for entry in share.order(waiting))


def numbers_of(share: FairShare, *waiting: tuple[QueueEntry, int]) -> list[int]:
    """The numbers of the entries in the order of their turns."""
    return [int(entry.run_id.removeprefix("run-"), 16) for entry in share.order(waiting)]


def test_a_run_of_fifty_leaves_every_other_slot_to_a_later_run_of_one() -> None:
    large, small = (entry_of(1, owner="ann"), 50), (entry_of(2, owner="bob"), 1)
    assert owners_of(FairShare(), small, large)[:4] == "abaa"
    share = FairShare()
    share.take("ann")
    assert owners_of(share, small, large)[:4] == "baaa"
    share.give_back("ann")
    assert owners_of(share, small, large)[:4] == "baaa", "ann had the last turn"


def test_priority_goes_before_shares_and_shares_before_deadlines() -> None:
    share = FairShare()
    share.take("ann")
    urgent = entry_of(3, owner="ann", priority=1)
    dated = entry_of(2, owner="ann", deadline=NOON)
    other = entry_of(4, owner="bob", priority=-1)
    last = entry_of(5, owner="bob")
    assert numbers_of(share, (dated, 1), (other, 1), (urgent, 1), (last, 1)) == [3, 5, 2, 4]


def test_an_owners_own_runs_go_by_deadline_and_then_as_they_were_submitted() -> None:
    hour = timedelta(hours=1)
    deadlines = {1: None, 2: NOON + hour, 3: None, 4: NOON, 5: NOON + hour}
    waiting = [(entry_of(number, deadline=deadline), 2) for number, deadline in deadlines.items()]
    assert numbers_of(FairShare(), *waiting) == [4, 4, 2, 2, 5, 5, 1, 1, 3, 3]


def test_an_owner_at_the_limit_is_passed_over_and_holds_up_nobody() -> None:
    share = FairShare({"ann": 2, "cid": 0})
    waiting = [(entry_of(1, owner="ann", priority=9), 5), (entry_of(2, owner="cid"), 1), (entry_of(3, owner="bob"), 3)]
    assert owners_of(share, *waiting) == "aabbb"
    share.take("ann")
    assert owners_of(share, *waiting) == "abbb"
    share.take("ann")
    assert owners_of(share, *waiting) == "bbb"
    share.give_back("ann")
    assert owners_of(share, *waiting) == "abbb"


def test_looking_ahead_takes_nothing() -> None:
    share = FairShare({"ann": 1})
    waiting = [(entry_of(1, owner="ann"), 2), (entry_of(2, owner="bob"), 2)]
    assert owners_of(share, *waiting) == owners_of(share, *waiting) == "abb"
    assert (share.held("ann"), share.held("bob")) == (0, 0)
    with pytest.raises(ValueError, match="ann holds no slot"):
        share.give_back("ann")


def drawn_waiting(draw: random.Random, entries: int) -> list[tuple[QueueEntry, int]]:
    waiting = []
    for number in range(entries):
        deadline = draw.choice([None, None, NOON, NOON + timedelta(hours=draw.randrange(3))])
        changes = {"owner": draw.choice(OWNERS), "priority": draw.choice([-1, 0, 0, 0, 7]), "deadline": deadline}
        waiting.append((entry_of(number, **changes), draw.randrange(4)))
    return waiting


def slow_order(
    waiting: list[tuple[QueueEntry, int]], turns: list[str], left: Counter[str], limits: dict[str, int]
) -> list[QueueEntry]:
    """The rules as they are told, adapter by adapter. turns: whose each turn was; left: how many slots came back."""
    adapters = [entry for entry, count in waiting for _ in range(count)]
    turns, ordered = list(turns), []

    def held(owner: str) -> int:
        return turns.count(owner) - left[owner]

    def since_last_turn(owner: str) -> float:
        return turns[::-1].index(owner) if owner in turns else float("inf")

    while True:
        adapters_left = [one for one in adapters if one.owner not in limits or held(one.owner) < limits[one.owner]]
        if not adapters_left:
            return ordered
        highest = max(one.priority for one in adapters_left)
        best = [one for one in adapters_left if one.priority == highest]
        heads = {}
        for owner in {one.owner for one in best}:
            own = [one for one in best if one.owner == owner]
            dated = [one for one in own if one.deadline is not None]
            soonest = [one for one in dated if one.deadline == min(other.deadline for other in dated)]
            heads[owner] = min(soonest or own, key=lambda one: one.key)
        fewest = min(held(owner) for owner in heads)
        heads = {owner: head for owner, head in heads.items() if held(owner) == fewest}
        longest = max(since_last_turn(owner) for owner in heads)
        heads = {owner: head for owner, head in heads.items() if since_last_turn(owner) == longest}
        chosen = min(heads.values(), key=lambda one: one.key)
        adapters.remove(chosen)
        turns.append(chosen.owner)
        ordered.append(chosen)


@settings(max_examples=150, deadline=None)
@given(seed=SEEDS)
def test_the_order_is_that_of_the_rules_as_they_are_told(seed: int) -> None:
    draw = random.Random(seed)
    limits = {owner: draw.randrange(6) for owner in OWNERS if draw.random() < 0.4}
    share, turns, left = FairShare(limits), [], Counter()
    for _ in range(draw.randrange(12)):
        owner = draw.choice(OWNERS)
        if share.held(owner) and draw.random() < 0.5:
            share.give_back(owner)
            left[owner] += 1
        else:
            share.take(owner)
            turns.append(owner)
    waiting = drawn_waiting(draw, draw.randrange(9))
    expected = slow_order(waiting, turns, left, limits)
    assert list(share.order(waiting)) == expected
    draw.shuffle(waiting)
    assert list(share.order(waiting)) == expected


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS)
def test_one_owners_runs_go_as_they_were_submitted(seed: int) -> None:
    draw = random.Random(seed)
    waiting = [(entry_of(number), draw.randrange(1, 4)) for number in range(6)]
    expected = [number for number, (_, adapters) in enumerate(waiting) for _ in range(adapters)]
    draw.shuffle(waiting)
    assert numbers_of(FairShare(), *waiting) == expected


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_over_time_no_owner_starves_and_every_limit_holds(seed: int) -> None:
    """Owners submit without end, adapters train as long as they like, whole runs come and go; one priority.

    Who waits and holds no slot is passed by at most once by each other owner. No slot is free that somebody may take.
    """
    draw = random.Random(seed)
    owners = [f"owner-{number}" for number in range(draw.randrange(2, 6))]
    limits = {owner: draw.randrange(1, 4) for owner in owners if draw.random() < 0.3}
    share, slots, number = FairShare(limits), draw.randrange(1, 7), 0
    training: list[str] = []
    waiting: dict[QueueEntry, int] = {}
    passed_by: Counter[str] = Counter()
    for _ in range(60):
        for owner in owners:
            if draw.random() < 0.5:
                number += 1
                deadline = draw.choice([None, NOON - timedelta(hours=number)])
                waiting[entry_of(number, owner=owner, deadline=deadline)] = draw.choice([1, 1, 20])
        for owner in [owner for owner in training if draw.random() < 0.3]:
            training.remove(owner)
            share.give_back(owner)
        for entry in islice(share.order(waiting.items()), slots - len(training)):
            share.take(entry.owner)
            training.append(entry.owner)
            waiting[entry] -= 1
            passed_by[entry.owner] = 0
            for owner in {one.owner for one, left in waiting.items() if left} - set(training):
                passed_by[owner] += 1
                assert passed_by[owner] < len(owners)
        held = Counter(training)
        assert held == Counter({owner: share.held(owner) for owner in owners})
        assert all(held[owner] <= limit for owner, limit in limits.items())
        may_go_on = [one for one, left in waiting.items() if left and held[one.owner] < limits.get(one.owner, slots)]
        assert len(training) == slots or not may_go_on
