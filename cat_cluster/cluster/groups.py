"""Which adapters wait and which train together: a group takes in adapters of its kind as long as it has places.

Here is only decided; the driver starts the groups' workers and tells them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from cat_cluster.cluster.messages import Order
from cat_cluster.cluster.work import Work


@dataclass(eq=False)
class Group:
    """A group of workers and the adapters that it trains in one forward, at most `places` at once.

    kind: what all of them share; None where nobody else may come in. leaving: adapters that train no more, by the first
    order without them: workers that start again may go by an older one until they have said that they follow it.
    """

    number: int
    kind: Hashable
    places: int
    works: dict[str, Work] = field(default_factory=dict)
    since: dict[str, float] = field(default_factory=dict)
    leaving: dict[str, int] = field(default_factory=dict)
    orders: int = 0
    _told: object = None

    def take(self, adapter: Work) -> None:
        """Take an adapter in."""
        self.works[adapter.name] = adapter
        self.since[adapter.name] = time.perf_counter()

    def end(self, name: str) -> Work:
        """Let an adapter go that trains no more, and return it."""
        self.leaving[name] = self.orders + 1
        return self.works.pop(name)

    def forget(self, order: int) -> list[str]:
        """Return the adapters that the workers have forgotten, now that they follow an order."""
        forgotten = [name for name, first in self.leaving.items() if first <= order]
        for name in forgotten:
            del self.leaving[name]
        return forgotten

    def seconds(self, name: str) -> float:
        """How long an adapter has been in the group."""
        return time.perf_counter() - self.since[name]

    def order(self, *, last: bool) -> Order | None:
        """Return what the workers are to be told; None where they know."""
        told = (tuple(self.works), last)
        if told == self._told:
            return None
        self._told = told
        self.orders += 1
        if last:
            self.kind = None
        return Order(self.orders, tuple(one.ordered() for one in self.works.values()), last)


class Groups:
    """The groups of a driver and what waits for them. most: groups at once."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.running: dict[int, Group] = {}
        self._waiting: dict[Hashable, deque[Work]] = {}
        self._places: dict[Hashable, int] = {}
        self._apart: deque[list[Work]] = deque()
        self._alone: deque[Work] = deque()
        self._started = 0

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing trains."""
        return not (self.running or self._apart or self._alone or any(self._waiting.values()))

    @property
    def to_come(self) -> int:
        """How many groups would be started if all that waits went at once."""
        return len(self._apart) + sum(-(-len(queue) // self._places[kind]) for kind, queue in self._waiting.items())

    def wait(self, kind: Hashable, places: int, adapters: Iterable[Work]) -> None:
        """Have adapters of a kind wait for a place, in their order; places: of a group of this kind."""
        self._places[kind] = places
        self._waiting.setdefault(kind, deque()).extend(adapters)

    def wait_apart(self, *sets: list[Work]) -> None:
        """Have each set of adapters wait for a group of its own, before all others."""
        self._apart.extendleft(reversed(sets))

    def wait_alone(self, adapter: Work) -> None:
        """Have an adapter wait until nothing else is at work."""
        self._alone.append(adapter)

    def next(self, *, busy: bool) -> Group | None:
        """Return a group to start now, with its adapters; busy: whether anything else than groups is at work."""
        if self._alone and not busy and not (self.running or self._apart or any(self._waiting.values())):
            return self._start(None, [self._alone.popleft()])
        if len(self.running) >= self.most:
            return None
        if self._apart:
            return self._start(None, self._apart.popleft())
        for kind, queue in self._waiting.items():
            if queue:
                groups = min(self.most - len(self.running), -(-len(queue) // self._places[kind]))
                size = min(self._places[kind], -(-len(queue) // groups))
                return self._start(kind, [queue.popleft() for _ in range(size)])
        return None

    def fill(self) -> list[tuple[Group, list[Work]]]:
        """Give waiting adapters the free places of running groups; return who came where."""
        came = []
        for group in self.running.values():
            queue = self._waiting.get(group.kind, deque())
            newcomers = [queue.popleft() for _ in range(min(len(queue), group.places - len(group.works)))]
            for adapter in newcomers:
                group.take(adapter)
            if newcomers:
                came.append((group, newcomers))
        return came

    def orders(self) -> list[tuple[Group, Order]]:
        """Return the orders that running groups have not been given yet."""
        found = [(one, one.order(last=not self._waiting.get(one.kind))) for one in self.running.values()]
        return [(group, order) for group, order in found if order is not None]

    def is_needed(self, name: str) -> bool:
        """Whether workers may still look for the checkpoints of an adapter."""
        return any(name in group.works or name in group.leaving for group in self.running.values())

    def _start(self, kind: Hashable, adapters: list[Work]) -> Group:
        group = Group(self._started, kind, self._places.get(kind, 0))
        self._started += 1
        for adapter in adapters:
            group.take(adapter)
        self.running[group.number] = group
        return group
