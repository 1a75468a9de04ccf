"""Ending tasks without waiting for them; Ray is stood in for, as only the clock and its answers matter."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from cat_cluster.cluster import given_up
from cat_cluster.cluster.given_up import CANCEL_SECONDS, GivenUp


class Ray:
    """Tasks that end only when a test says so, and what was asked of them; waiting takes the clock's time."""

    def __init__(self) -> None:
        self.now, self.ended, self.forced = 100.0, set[str](), list[str]()
        self.interrupted: list[str] = []

    def monotonic(self) -> float:
        return self.now

    def cancel(self, task: str, *, recursive: bool = True, force: bool = False) -> None:
        assert force or not recursive
        (self.forced if force else self.interrupted).append(task)

    def wait(self, tasks: Sequence[str], *, num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        left = [task for task in tasks if task not in self.ended]
        self.now += timeout if left else 0.0
        return [task for task in tasks if task in self.ended], left


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    found = Ray()
    monkeypatch.setattr(given_up, "ray", found)
    monkeypatch.setattr(given_up, "time", SimpleNamespace(monotonic=found.monotonic))
    return found


def test_a_task_is_interrupted_at_once_and_ended_by_force_when_its_time_is_over(ray: Ray) -> None:
    tasks: Any = GivenUp()
    tasks.add(["quick", "slow"])
    assert ray.interrupted == ["quick", "slow"]
    assert ray.now == 100.0, "nobody waits"
    ray.ended.add("quick")
    ray.now += CANCEL_SECONDS - 0.1
    tasks.look()
    assert ray.forced == []
    ray.now += 0.2
    tasks.look()
    tasks.look()
    assert ray.forced == ["slow"]


def test_at_the_end_it_is_waited_for_as_long_as_tasks_may_take(ray: Ray) -> None:
    tasks: Any = GivenUp()
    tasks.wait()
    tasks.add(["slow"])
    ray.now += 4.0
    tasks.wait()
    assert (ray.now, ray.forced) == (100.0 + CANCEL_SECONDS, ["slow"])
