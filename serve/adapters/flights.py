"""Adapters on their way into host memory or a slot, and who waits for them."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from cat_cluster.registry import Manifest
from serve.adapters.disk_and_host import Key, Tier
from serve.adapters.futures import claim

Wants = Literal["slot", "host"]


@dataclass(eq=False)
class Waiter:
    """Who waits for an adapter: for a lease of its slot, or for its being in host memory."""

    future: Future[Any]
    wants: Wants
    deadline: float


@dataclass(eq=False)
class Flight:
    """An adapter on its way and who waits for it. job: its load; vector: set once it is ready for a slot."""

    key: Key
    manifest: Manifest
    waiters: list[Waiter] = field(default_factory=list)
    job: Future[None] | None = None
    vector: Tensor | None = None
    tier: Tier = "host"

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits."""
        return any(not waiter.future.cancelled() for waiter in self.waiters)

    def claim(self, *kinds: Wants) -> list[Future[Any]]:
        """Take out the waiters of these kinds and return the futures of those that did not cancel."""
        taken = [waiter for waiter in self.waiters if waiter.wants in kinds]
        self.waiters = [waiter for waiter in self.waiters if waiter.wants not in kinds]
        return [waiter.future for waiter in taken if claim(waiter.future)]
