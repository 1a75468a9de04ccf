"""A replica whose adapter is probed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cat_cluster.evaluation.judges import Judge, load_judge
from cat_cluster.models.base_model import load_base_model
from tests.support.probed_replica import FailingStore, ProbedEngine, ProbedReplica, measured_reference, publish


@pytest.fixture(scope="module")
def engine() -> Iterator[ProbedEngine]:
    found = ProbedEngine(load_base_model("pocket"))
    yield found
    found.bank.detach()


@pytest.fixture(scope="module")
def judge(engine: ProbedEngine) -> Judge:
    return load_judge("pocket", engine.base)


@pytest.fixture(scope="module")
def reference(engine: ProbedEngine, judge: Judge) -> dict[str, Any]:
    return measured_reference(engine, judge)


@pytest.fixture
def replica(engine: ProbedEngine, judge: Judge, reference: dict[str, Any], tmp_path: Path) -> ProbedReplica:
    store = FailingStore(tmp_path / "storage")
    return ProbedReplica(engine, judge, store, publish(store, engine, reference))
