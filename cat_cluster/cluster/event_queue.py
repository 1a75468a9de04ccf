"""The event queue from workers and tasks to the driver: an actor that keeps events until the driver takes them."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class _QueueActor:
    """Keeps events as bytes: to unpickle them its process would have to import torch and the rest."""

    def __init__(self) -> None:
        self._events: list[bytes] = []

    def put(self, event: bytes) -> None:
        """Append an event."""
        self._events.append(event)

    def take(self) -> list[bytes]:
        """Return and forget all events."""
        events, self._events = self._events, []
        return events


@dataclass(frozen=True, eq=False)
class EventQueue:
    """A handle on the event queue of one driver; it may be sent to any worker."""

    actor: Any

    @classmethod
    def start(cls) -> EventQueue:
        """Start the actor on the driver's node; it ends with the driver."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return cls(ray.remote(_QueueActor).options(num_cpus=0, scheduling_strategy=here).remote())

    def put(self, kind: str, *values: Any, wait: bool = False) -> None:
        """Append an event: its kind and its values. wait: until the queue has it."""
        reference = self.actor.put.remote(pickle.dumps((kind, *values)))
        if wait:
            ray.get(reference)

    def take(self) -> list[tuple[Any, ...]]:
        """Return all events (kind, *values) since the last call, oldest first."""
        return [pickle.loads(event) for event in ray.get(self.actor.take.remote())]
