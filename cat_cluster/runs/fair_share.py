"""Whose turn it is: the order in which adapters of waiting runs take slots."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime

from cat_cluster.runs.queue import QueueEntry


class FairShare:
    """The slots that each owner holds, and the order that follows for the adapters that wait.

    1. An adapter of higher priority goes first.
    2. Within a priority the next slot is for the owner who holds the fewest; of owners who hold as many, for the one
       whose last turn is longest ago; of those who never had one, for the one whose next run was submitted first.
    3. Of an owner's own runs of that priority, those with a deadline go first, the earliest first; then, and where
       deadlines are equal, in the order of submission.

    So a deadline never takes a slot from another owner: a priority does. An owner who holds as many slots as their
    limit is passed over, and the next one takes the slot. Within a priority an owner who holds none waits for at most
    one turn of each other owner.

    limits: the most slots that an owner holds at once; one who is not named may hold any number. This knows no store
    and no clock: whoever gives out slots says so with `take` and `give_back`.
    """

    def __init__(self, limits: Mapping[str, int] | None = None) -> None:
        self._limits = dict(limits or {})
        self._held: Counter[str] = Counter()
        self._last_turn: Counter[str] = Counter()  # 0: none yet
        self._turn = 0

    def held(self, owner: str) -> int:
        """Return how many slots an owner holds."""
        return self._held[owner]

    def take(self, owner: str) -> None:
        """Note that an adapter of the owner has taken a slot."""
        self._turn += 1
        self._held[owner] += 1
        self._last_turn[owner] = self._turn

    def give_back(self, owner: str) -> None:
        """Note that an adapter of the owner has left its slot; ValueError if the owner holds none."""
        if self._held[owner] == 0:
            raise ValueError(f"{owner} holds no slot")
        self._held[owner] -= 1

    def order(self, waiting: Iterable[tuple[QueueEntry, int]]) -> Iterator[QueueEntry]:
        """Yield adapters' entries in the order of their turns, as if each took a slot and none was given back.

        waiting: each entry with how many of its adapters wait; it comes once for each, but for those that a limit holds
        back. Each adapter costs a look at every owner, so take no more of them than there are free slots.
        """
        ahead = FairShare(self._limits)
        ahead._held, ahead._last_turn, ahead._turn = self._held.copy(), self._last_turn.copy(), self._turn
        by_priority: defaultdict[int, defaultdict[str, deque[QueueEntry]]] = defaultdict(lambda: defaultdict(deque))
        for entry, adapters in sorted(waiting, key=lambda pair: _place(pair[0])):
            by_priority[entry.priority][entry.owner].extend([entry] * adapters)
        for _, queues in sorted(by_priority.items(), reverse=True):
            while (owner := ahead._next_owner(queues)) is not None:
                ahead.take(owner)
                yield queues[owner].popleft()

    def _next_owner(self, queues: Mapping[str, deque[QueueEntry]]) -> str | None:
        """Return the owner whose turn it is of those who wait and are below their limit."""
        turns = [
            (self._held[owner], self._last_turn[owner], queue[0].key, owner)
            for owner, queue in queues.items()
            if queue and self._held[owner] < self._limits.get(owner, self._held[owner] + 1)
        ]
        return min(turns)[-1] if turns else None


def _place(entry: QueueEntry) -> tuple[bool, datetime, str]:
    """The place of a run among its owner's runs of the same priority."""
    return entry.deadline is None, entry.deadline or entry.submitted, entry.key
