"""The training services of a storage: everybody sees what is free, and who trains in their own runs alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2

from cat_cluster.runs.services import SERVICES, GroupRecord, PlacedAdapter, ServiceRecord
from cat_cluster.store import LocalStore
from tests.support.training_http import KEYS, RUNS, photos_zip, send, training_service

PATH = "/v1/train-services"
NOBODYS = {"run": None, "adapter": None}


def http(url: str, key: str) -> httpx2.Client:
    return httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=30)


def tell(store: LocalStore, name: str, silent_s: float, *groups: GroupRecord, measuring: int = 0) -> None:
    at = (datetime.now(UTC) - timedelta(seconds=silent_s)).isoformat()
    others = tuple(PlacedAdapter(run_id="run-00000000000b", adapter="pot", steps=40) for _ in range(measuring))
    record = ServiceRecord(
        name=name, host="gpu-7", started=at, updated=at, workers=2, groups=groups, measuring=others, waiting=3
    )
    store.put(f"{SERVICES}{name}.json", record.model_dump_json().encode())


def test_a_caller_sees_the_slots_and_of_adapters_their_own(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with training_service(tmp_path, KEYS) as live, http(live.url, "ann") as ann, http(live.url, "bob") as bob:
        file = send(ann, photos_zip()).json()
        concept = {"token": "sks", "class_noun": "cup", "images": file["id"]}
        body = {"name": "cups", "adapters": [{"id": "my-cup", "concepts": [concept]}]}
        run = ann.post(RUNS, json=body).json()["id"]
        own = PlacedAdapter(run_id=run, adapter="my-cup", steps=40)
        other = PlacedAdapter(run_id="run-00000000000a", adapter="secret", steps=40)
        shared = GroupRecord(number=0, slots=4, base="pocket", resolution=64, adapters=(own, other))
        foreign = GroupRecord(number=1, slots=2, base="s3://secret/base", resolution=512, adapters=(other,))
        tell(store, "night", 0.0, shared, foreign, measuring=1)
        [seen] = ann.get(PATH).json()["data"]
        assert (seen["name"], seen["status"], seen["workers"], seen["waiting"]) == ("night", "at work", 2, 3)
        assert seen["groups"][0]["adapters"] == [{"run": run, "adapter": "my-cup"}, NOBODYS]
        assert [group["base"] for group in seen["groups"]] == ["pocket", None]
        assert [group["slots"] for group in seen["groups"]] == [4, 2]
        assert seen["measuring"] == [NOBODYS]
        assert not any(word in bob.get(PATH).text for word in ("secret", "my-cup", "pot", "gpu-7", run))
        with http(live.url, "master") as admin:
            [whole] = admin.get(PATH).json()["data"]
        assert whole["groups"][1]["adapters"] == [{"run": "run-00000000000a", "adapter": "secret"}]
        assert whole["groups"][1]["base"] == "s3://secret/base"


def test_a_service_that_was_killed_is_silent(tmp_path: Path) -> None:
    with training_service(tmp_path) as live, http(live.url, "any") as anybody:
        assert anybody.get(PATH).json() == {"object": "list", "data": []}
        tell(LocalStore(tmp_path), "night", 61.0)
        tell(LocalStore(tmp_path), "day", 1.0)
        assert [(one["name"], one["status"]) for one in anybody.get(PATH).json()["data"]] == [
            ("day", "at work"),
            ("night", "silent"),
        ]
