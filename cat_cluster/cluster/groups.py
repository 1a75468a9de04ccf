"""Which adapters wait and which train together: a group takes in adapters of its kind as long as it has places.

Here is only decided; the driver starts the groups' workers and tells them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass, field

from cat_cluster.cluster.messages import Order
from cat_cluster.cluster.work import Work


@dataclass(eq=False)
class Group:
    """A group of workers and the adapters that it trains in one forward, at most `places` at once.

    kind: what all of them share, None as long as it has had none; is_open: whether others may come in. leaving:
    adapters that train no more, by the first order without them: workers that start again may go by an older one until
    they have said that they follow it. empty_since: by the clock of `time.monotonic`, None while it has adapters.
    """

    number: int
    kind: Hashable = None
    places: int = 0
    is_open: bool = True
    works: dict[str, Work] = field(default_factory=dict)
    since: dict[str, float] = field(default_factory=dict)
    leaving: dict[str, int] = field(default_factory=dict)
    orders: int = 0
    empty_since: float | None = field(default_factory=time.monotonic)
    _told: object = None

    def take(self, work: Work) -> None:
        """Take an adapter in."""
        self.works[work.name] = work
        self.since[work.name] = time.perf_counter()
        self.empty_since = None

    def end(self, name: str) -> Work:
        """Let an adapter go that trains no more, and return it."""
        self.leaving[name] = self.orders + 1
        work = self.works.pop(name)
        if not self.works:
            self.empty_since = time.monotonic()
        return work

    def forget(self, order: int) -> list[str]:
        """Return the adapters that the workers have forgotten, now that they follow an order."""
        forgotten = [name for name, first in self.leaving.items() if first <= order]
        for name in forgotten:
            del self.leaving[name]
            del self.since[name]
        return forgotten

    def seconds(self, name: str) -> float:
        """How long an adapter has been in the group."""
        return time.perf_counter() - self.since[name]

    def order(self) -> Order | None:
        """Return what the workers are to be told; None where they know."""
        told = (tuple(self.works), self.is_open)
        if told == self._told:
            return None
        self._told = told
        self.orders += 1
        return Order(self.orders, tuple(one.ordered() for one in self.works.values()), last=not self.is_open)


class Groups:
    """The groups of a driver and what waits for them.

    most: groups at once. keep: of those, so many stay open when nothing waits for them; None: a group ends as soon as
    nothing of its kind waits and its adapters have ended.
    """

    def __init__(self, most: int, keep: int | None = None) -> None:
        self.most = most
        self.running: dict[int, Group] = {}
        self._keep = keep
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

    @property
    def slots(self) -> tuple[int, int]:
        """How many places running groups have, and how many of them are taken."""
        groups = self.running.values()
        return sum(max(one.places, len(one.works)) for one in groups), sum(len(one.works) for one in groups)

    def wait(self, kind: Hashable, places: int, works: Iterable[Work]) -> None:
        """Have adapters of a kind wait for a place, in their order; places: of a group of this kind."""
        self._places[kind] = places
        self._waiting.setdefault(kind, deque()).extend(works)

    def set_places(self, kind: Hashable, places: int) -> None:
        """Have groups of a kind, those that run too, train so many adapters at once."""
        self._places[kind] = places
        for group in self.running.values():
            if group.kind == kind:
                group.places = places

    def wait_apart(self, *sets: list[Work]) -> None:
        """Have each set of adapters wait for a group of its own, before all others."""
        self._apart.extendleft(reversed(sets))

    def wait_alone(self, work: Work) -> None:
        """Have an adapter wait until nothing else is at work."""
        self._alone.append(work)

    def has(self, kind: Hashable) -> bool:
        """Whether adapters of a kind wait or train."""
        trains = any(group.works and group.kind == kind for group in self.running.values())
        return trains or bool(self._waiting.get(kind))

    def has_place(self, kind: Hashable) -> bool:
        """Whether one more adapter of a kind would begin at once, and so would all that wait."""
        open_groups = [group for group in self.running.values() if group.is_open]
        waiting = {other: len(queue) for other, queue in self._waiting.items()}
        waiting[kind] = waiting.get(kind, 0) + 1
        needed = 0  # groups without adapters yet
        for other, count in waiting.items():
            free = sum(group.places - len(group.works) for group in open_groups if group.works and group.kind == other)
            needed += -(-max(0, count - free) // self._places.get(other, 1))
        empty = self.most - len(self.running) + sum(not group.works for group in open_groups)
        return needed <= max(0, empty - len(self._apart))

    def next(self, *, busy: bool) -> Group | None:
        """Return a group to start now, with its adapters; busy: whether anything else than groups is at work."""
        others = any(group.works for group in self.running.values())
        if self._alone and not (busy or others or self._apart or any(self._waiting.values())):
            return self._start([self._alone.popleft()])
        if len(self.running) >= self.most:
            return None
        if self._apart:
            return self._start(self._apart.popleft())
        for kind, queue in self._waiting.items():
            if queue and not any(group.is_open and not group.works for group in self.running.values()):
                groups = min(self.most - len(self.running), -(-len(queue) // self._places[kind]))
                size = min(self._places[kind], -(-len(queue) // groups))
                return self._start([queue.popleft() for _ in range(size)], kind)
        if len(self.running) < (self._keep or 0):
            return self._start([], None)
        return None

    def fill(self) -> list[tuple[Group, list[Work]]]:
        """Give waiting adapters the free places of open groups, and groups without any; return who came where."""
        came = []
        for kind, queue in self._waiting.items():
            open_groups = [group for group in self.running.values() if group.is_open]
            same = [group for group in open_groups if group.kind == kind and group.works]
            for group in [*same, *(group for group in open_groups if not group.works)]:
                group.kind, group.places = kind, self._places[kind]
                newcomers = [queue.popleft() for _ in range(min(len(queue), group.places - len(group.works)))]
                for work in newcomers:
                    group.take(work)
                if newcomers:
                    came.append((group, newcomers))
        return came

    def close_empty(self, seconds: float) -> None:
        """Close groups, but for those that are kept, which have had no adapter for so long."""
        empty = [group for group in self.running.values() if group.is_open and group.empty_since is not None]
        spare = len([group for group in self.running.values() if group.is_open]) - (self._keep or 0)
        for group in empty[: max(0, spare)]:
            assert group.empty_since is not None
            if time.monotonic() - group.empty_since >= seconds:
                group.is_open = False

    def orders(self) -> list[tuple[Group, Order]]:
        """Return the orders that running groups have not been given yet."""
        if self._keep is None:
            for group in self.running.values():
                group.is_open = group.is_open and bool(self._waiting.get(group.kind))
        found = [(group, group.order()) for group in self.running.values()]
        return [(group, order) for group, order in found if order is not None]

    def is_needed(self, name: str) -> bool:
        """Whether workers may still look for the checkpoints of an adapter."""
        return any(name in group.works or name in group.leaving for group in self.running.values())

    def drop(self, names: Collection[str]) -> None:
        """Let adapters go wherever they wait or train."""
        for queue in self._waiting.values():
            _remove(queue, names)
        _remove(self._alone, names)
        self._apart = deque(kept for one in self._apart if (kept := [w for w in one if w.name not in names]))
        for group in self.running.values():
            for name in [name for name in group.works if name in names]:
                group.end(name)

    def _start(self, works: list[Work], kind: Hashable = None) -> Group:
        group = Group(self._started, kind, self._places.get(kind, 0), is_open=kind is not None or not works)
        self._started += 1
        for work in works:
            group.take(work)
        self.running[group.number] = group
        return group


def _remove(queue: deque[Work], names: Collection[str]) -> None:
    kept = [work for work in queue if work.name not in names]
    queue.clear()
    queue.extend(kept)
