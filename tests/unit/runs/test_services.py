"""What a training service tells of itself: few writes, a heartbeat, and nothing of one that has ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cat_cluster.errors import SpecError, StoreError
from cat_cluster.runs import services
from cat_cluster.runs.progress import timestamp
from cat_cluster.runs.services import (
    GroupRecord,
    PlacedAdapter,
    ServiceRecord,
    ServiceWriter,
    check_service_name,
    read_services,
)
from cat_cluster.store import LocalStore
from tests.support.counted_stores import CountingStore

CUP = PlacedAdapter(run_id="run-000000000001", adapter="cup", steps=40)


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(tmp_path)


def record(name: str = "default", **changes: object) -> ServiceRecord:
    now = timestamp()
    return ServiceRecord.model_validate(
        {"name": name, "host": "here", "started": now, "updated": now, "workers": 1, **changes}
    )


def until(holds: Callable[[], bool]) -> None:
    for _ in range(1000):
        if holds():
            return
        time.sleep(0.005)
    raise AssertionError("it never came to hold")


def test_a_change_is_written_once_and_nothing_else(store: CountingStore) -> None:
    with ServiceWriter(store, record(), interval=0.01) as writer:
        until(lambda: len(read_services(store)) == 1)
        writer.show((GroupRecord(number=0, slots=4, base="pocket", resolution=64, adapters=(CUP,)),), (), 3)
        until(lambda: read_services(store)[0].waiting == 3)
        [told] = read_services(store)
        assert told.groups[0].adapters == (CUP,)
        before = store.calls["put"]
        time.sleep(0.1)
        assert store.calls["put"] == before == 2
    assert read_services(store) == [], "a service that has ended is none"


def test_a_service_without_news_is_heard_of(store: CountingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "HEARTBEAT_SECONDS", 0.05)
    with ServiceWriter(store, record(), interval=0.01):
        until(lambda: store.calls["put"] >= 4)


def test_one_that_is_killed_is_silent_after_a_minute() -> None:
    now = datetime.now(UTC)
    heard = record(updated=(now - timedelta(seconds=59)).isoformat())
    assert heard.is_alive(now)
    assert not heard.is_alive(now + timedelta(seconds=1))


def test_an_outage_of_the_store_costs_nothing_but_the_time(tmp_path: Path) -> None:
    away = threading.Event()

    class Store(LocalStore):
        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
            if away.is_set():
                raise StoreError("away")
            super().put(key, data, if_absent=if_absent)

    store = Store(tmp_path)
    away.set()
    with ServiceWriter(store, record(), interval=0.01) as writer:
        writer.show((), (CUP,), 0)
        time.sleep(0.05)
        assert read_services(store) == []
        away.clear()
        until(lambda: len(read_services(store)) == 1)
        assert read_services(store)[0].measuring == (CUP,)


def test_a_record_that_cannot_be_read_hides_no_other(store: CountingStore) -> None:
    store.put("services/damaged.json", b"{")
    store.put("services/night.json", record("night").model_dump_json().encode())
    assert [one.name for one in read_services(store)] == ["night"]


@pytest.mark.parametrize("name", ["", ".", "-a", "a/b", "a b", "x" * 64])
def test_a_name_that_is_none_is_refused_by_its_option(name: str) -> None:
    with pytest.raises(SpecError, match="--name"):
        check_service_name(name)
    assert check_service_name("gpu-2.night") == "gpu-2.night"
