"""What a driver and its workers send each other: events come in, and each pack's newest order goes out.

An actor keeps them. It holds bytes: to unpickle them its process would have to import torch and the rest.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cat_cluster.spec.job import ResolvedAdapter
from cat_cluster.spec.sections import MonitoringSpec


@dataclass(frozen=True)
class OrderedAdapter:
    """An adapter that workers are to train, for an attempt of a run.

    name: of one adapter in all of a driver's packs, where several runs may have an adapter of the same id, and a later
    attempt of a run is another one.
    """

    name: str
    resolved: ResolvedAdapter
    revision: str
    run_id: str
    attempt: int
    monitoring: MonitoringSpec


@dataclass(frozen=True)
class Order:
    """What the workers of a pack are to train from now on.

    number: counts a pack's orders from 1, the newest holds; last: nothing comes after these adapters.
    """

    number: int
    adapters: tuple[OrderedAdapter, ...]
    last: bool


class _Actor:
    def __init__(self) -> None:
        self._events: list[bytes] = []
        self._orders: dict[int, tuple[int, int, bytes]] = {}

    def put(self, event: bytes) -> None:
        self._events.append(event)

    def take(self) -> list[bytes]:
        events, self._events = self._events, []
        return events

    def give(self, pack: int, number: int, adapters: int, order: bytes) -> None:
        self._orders[pack] = (number, adapters, order)

    def newer(self, pack: int, number: int) -> bytes | None:
        """Return the order of a pack, None unless it is newer than the one of that number."""
        newest, _, order = self._orders.get(pack, (0, 0, b""))  # workers that are being stopped may ask yet
        return order if newest > number else None

    def adapters(self, pack: int) -> int:
        return self._orders[pack][1]

    def forget(self, pack: int) -> None:
        self._orders.pop(pack, None)


@dataclass(frozen=True, eq=False)
class Messages:
    """A handle on the messages of one driver; it may be sent to any worker."""

    actor: Any

    @classmethod
    def start(cls) -> Messages:
        """Start the actor on the driver's node; it ends with the driver."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return cls(ray.remote(_Actor).options(num_cpus=0, scheduling_strategy=here).remote())

    def put(self, kind: str, *values: Any, wait: bool = False) -> None:
        """Append an event for the driver: its kind and its values. wait: until it is there."""
        reference = self.actor.put.remote(pickle.dumps((kind, *values)))
        if wait:
            ray.get(reference)

    def take(self) -> list[tuple[Any, ...]]:
        """Return all events (kind, *values) since the last call, oldest first."""
        return [pickle.loads(event) for event in ray.get(self.actor.take.remote())]

    def give(self, pack: int, order: Order) -> None:
        """Give the workers of a pack an order in place of the one before; it is there when this returns."""
        ray.get(self.actor.give.remote(pack, order.number, len(order.adapters), pickle.dumps(order)))

    def adapters(self, pack: int) -> int:
        """Return how many adapters a pack was last told to train."""
        found: int = ray.get(self.actor.adapters.remote(pack))
        return found

    def forget(self, pack: int) -> None:
        """Keep nothing of a pack whose task has ended."""
        self.actor.forget.remote(pack)


class OrderReader:
    """Reads the orders of a pack for its workers, which never wait for an answer but for the first."""

    def __init__(self, messages: Messages, pack: int) -> None:
        self._actor, self._pack = messages.actor, pack
        self._newest: Order = pickle.loads(ray.get(self._actor.newer.remote(pack, 0)))
        self._asked = self._ask()

    def newest(self) -> Order:
        """Return the newest order that has arrived here."""
        if ray.wait([self._asked], timeout=0)[0]:
            order = ray.get(self._asked)
            if order is not None:
                self._newest = pickle.loads(order)
            self._asked = self._ask()
        return self._newest

    def _ask(self) -> Any:
        return self._actor.newer.remote(self._pack, self._newest.number)
