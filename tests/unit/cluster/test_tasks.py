"""How the tasks beside the training are started; what they do is tested on a real Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cat_cluster.cluster import tasks


def test_ray_tries_no_task_again_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that it may try again it starts without end when memory runs out."""
    given: list[dict[str, Any]] = []

    def options(**named: Any) -> Any:
        given.append(named)
        return SimpleNamespace(remote=lambda *_: 3)

    monkeypatch.setattr(tasks.ray, "remote", lambda _: SimpleNamespace(options=options))
    monkeypatch.setattr(tasks.ray, "get", lambda size: size)
    adapter: Any = SimpleNamespace(resolved=SimpleNamespace(id="cup"), revision="r-0123456789ab")
    assert tasks.pack_size_on_ray([adapter, adapter], "auto", on_gpus=True, side_by_side=1) == 3
    messages: Any = None
    work: Any = SimpleNamespace(adapter_id="cup", ordered=lambda: None)
    tasks.evaluate_on_ray(work, storage="file:///s", seconds=1.0, messages=messages, on_gpus=False)
    assert [(one["max_retries"], one["num_gpus"]) for one in given] == [(0, 1), (0, 0)]
