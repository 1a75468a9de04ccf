"""Where workers and tasks leave word for the driver: an actor that keeps events until it asks."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class _QueueActor:
    """Keeps events as bytes: its process need not know what is in them, and so imports neither torch nor the rest."""

    def __init__(self) -> None:
        self._events: list[bytes] = []

    def put(self, event: bytes) -> None:
        """Take an event."""
        self._events.append(event)

    def take(self) -> list[bytes]:
        """Give all events since the last time."""
        events, self._events = self._events, []
        return events


@dataclass(frozen=True, eq=False)
class EventQueue:
    """A handle on the mailbox of one driver; it may be sent to any worker."""

    mailbox: Any

    @classmethod
    def start(cls) -> EventQueue:
        """Start a mailbox beside the driver; it ends with it."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return cls(ray.remote(_QueueActor).options(num_cpus=0, scheduling_strategy=here).remote())

    def tell(self, *event: Any, wait: bool = False) -> None:
        """Leave an event: what kind it is, then what it says. wait: until it is there."""
        reference = self.mailbox.put.remote(pickle.dumps(event))
        if wait:
            ray.get(reference)

    def take(self) -> list[tuple[Any, ...]]:
        """Return all events since the last time, in the order they came."""
        return [pickle.loads(event) for event in ray.get(self.mailbox.take.remote())]
