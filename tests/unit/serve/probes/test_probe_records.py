"""The records of probes in the store: none lost while it is away, and read back by the hour."""

from __future__ import annotations

import asyncio

import pytest

from cat_cluster.errors import EvaluationError, StoreError
from cat_cluster.evaluation.judges import Judge
from cat_cluster.models.base_model import BaseModel
from tests.support.probed_replica import ProbedReplica

pytestmark = pytest.mark.slow


def test_a_store_that_is_away_fails_no_probe_and_loses_no_record(replica: ProbedReplica) -> None:
    prober = replica.prober()

    async def probes() -> list[str]:
        verdicts = []
        for away in (False, True, True, False):
            replica.store.away = away
            replica.now += 1800.0  # the outage goes over an hour's end
            verdicts.append((await prober.canonical(replica.manifest)).verdict)
        return verdicts

    assert asyncio.run(probes()) == ["ok"] * 4
    assert [record.pair for record in replica.history(hours=3)] == [0, 1, 2, 3]
    replica.store.away = True
    with pytest.raises(StoreError):
        replica.history()


def test_the_history_is_that_of_all_replicas_within_its_hours(replica: ProbedReplica) -> None:
    replicas = [replica.prober(replica="a"), replica.prober(replica="ray#b/..")]

    async def probes() -> None:
        for _ in range(6):
            for prober in replicas:
                await prober.canonical(replica.manifest)
                replica.now += 900.0

    asyncio.run(probes())
    replica.now -= 900.0
    keys = sorted(replica.store.list(f"probes/cup/{replica.manifest.revision}/"))
    assert keys[:2] == [f"probes/cup/{replica.manifest.revision}/20270115T12/{name}.json" for name in ("a", "ray-b---")]
    assert len(keys) == 6

    replica.store.listed.clear()
    assert [record.replica for record in replica.history(hours=3)] == ["a", "ray-b---"] * 6
    assert all(prefix.startswith(f"probes/cup/{replica.manifest.revision}/") for prefix in replica.store.listed)
    last = replica.history(hours=0.5)
    assert [record.time for record in last] == [replica.now - 1800.0, replica.now - 900.0, replica.now]
    replica.store.put(keys[0], b"not JSON")
    assert len(replica.history(hours=3)) == 10
    assert replica.history(hours=3) == sorted(replica.history(hours=3), key=lambda record: record.time)


def test_a_restart_continues_its_hour_also_when_its_first_probe_fails(replica: ProbedReplica) -> None:
    def fails(name: str, base: BaseModel) -> Judge:
        raise EvaluationError("no judge")

    asyncio.run(replica.prober().canonical(replica.manifest))
    again = replica.prober()
    again._load_judge = fails
    replica.now += 60.0
    asyncio.run(again.canonical(replica.manifest))
    again._load_judge = lambda name, base: replica.judge
    for _ in range(2):
        replica.now += 60.0
        asyncio.run(again.canonical(replica.manifest))
    assert [record.verdict for record in replica.history()] == ["ok", "error", "ok", "ok"]


def test_a_page_that_could_not_be_read_is_not_overwritten(replica: ProbedReplica) -> None:
    asyncio.run(replica.prober().canonical(replica.manifest))
    again = replica.prober()
    for away in (True, False):
        replica.store.away = away
        replica.now += 60.0
        asyncio.run(again.canonical(replica.manifest))
    assert [record.pair for record in replica.history()] == [0, 0, 1]


def test_a_history_goes_over_midnight(replica: ProbedReplica) -> None:
    replica.now += 12 * 3600.0 - 1.0
    prober = replica.prober()
    asyncio.run(prober.canonical(replica.manifest))
    replica.now += 2.0
    asyncio.run(prober.canonical(replica.manifest))
    assert [record.pair for record in replica.history(hours=1)] == [0, 1]
