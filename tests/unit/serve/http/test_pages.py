"""Lists come in pages, none of which loses an entry; and a name costs what its own adapter costs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from cat_cluster.registry import Manifest, Registry
from cat_cluster.registry.references import manifest_key
from cat_cluster.store import LocalStore
from serve.http.access import Access
from serve.http.recent import Recent
from serve.settings import ServeSettings
from tests.support.counted_stores import CountingStore, fill
from tests.support.ingress_server import ScriptedEngine, listening, only, publish
from tests.support.served_adapters import SOON, Clock, WatchedStore

MANY = [f"other-{number:04d}" for number in range(230)]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    unet = torch.nn.ModuleDict({"mid": torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 4)})})
    return publish(Registry(LocalStore(tmp_path_factory.mktemp("one"))), unet, "f" * 64, "base", adapter_id="cup")


@contextmanager
def serving(store: LocalStore, *, base: str = "base") -> Iterator[httpx2.Client]:
    settings = ServeSettings(base=base)
    with (
        listening(only(ScriptedEngine()), Registry(store), settings, Access(settings)) as live,
        live.http() as http,
    ):
        yield http


def followed(http: httpx2.Client, path: str, limit: int) -> list[dict[str, Any]]:
    """Every entry, page by page; each page says truly what it holds."""
    found: list[dict[str, Any]] = []
    query: dict[str, Any] = {"limit": limit}
    for _ in range(1000):
        page = http.get(path, params=query).json()
        assert page["object"] == "list"
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        assert len(page["data"]) == limit or not page["has_more"]
        found += page["data"]
        if not page["has_more"]:
            return found
        query["after"] = page["last_id"]
    raise AssertionError("the pages do not end")


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 7, 115, 230, 1000])
def test_pages_hold_each_entry_once_and_in_order(tmp_path: Path, template: Manifest, limit: int) -> None:
    few = MANY if limit > 7 else MANY[:9]
    fill(tmp_path, template, few)
    (tmp_path / manifest_key(few[3], template.revision)).write_bytes(b"{")  # damaged: it has no `latest` to serve
    with serving(LocalStore(tmp_path)) as http:
        assert [card["id"] for card in followed(http, "/v1/adapters", limit)] == few
        served = [name for name in few if name != few[3]]
        assert [card["id"] for card in followed(http, "/v1/models", limit)] == ["base", *served]


def test_without_a_limit_a_page_has_a_bound_and_says_that_there_is_more(tmp_path: Path, template: Manifest) -> None:
    fill(tmp_path, template, MANY)
    store = CountingStore(tmp_path)
    with serving(store) as http:
        page = http.get("/v1/adapters").json()
        assert (len(page["data"]), page["last_id"], page["has_more"]) == (100, MANY[99], True)
        assert store.calls == {"entries": 2, "get": 202}  # one more tells that there is more
        models = http.get("/v1/models").json()  # OpenAI's client asks for no other page
        assert [card["id"] for card in models["data"]] == ["base", *MANY]
        assert not models["has_more"]
        assert http.get("/v1/models", params={"limit": 1}).json()["data"][0]["id"] == "base"


def test_an_empty_list_and_the_end_of_one(tmp_path: Path, template: Manifest) -> None:
    with serving(LocalStore(tmp_path)) as http:
        nothing = {"object": "list", "first_id": None, "last_id": None, "has_more": False, "data": []}
        assert http.get("/v1/adapters").json() == nothing
        assert http.get("/v1/models", params={"after": "base"}).json() == nothing
        assert http.get("/v1/models", params={"limit": 1}).json()["has_more"] is False
        fill(tmp_path, template, MANY[:3])
    with serving(LocalStore(tmp_path)) as http:
        assert http.get("/v1/adapters", params={"after": "zzz"}).json() == nothing
        for after in ("other-0000", "other-0000@latest", "other-0000a", "other-00"):  # there or not
            page = http.get("/v1/adapters", params={"after": after, "limit": 1}).json()
            assert page["data"][0]["id"] == ("other-0000" if after == "other-00" else "other-0001")
        assert http.get("/v1/models", params={"after": ""}).json()["data"][0]["id"] == "base"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/adapters"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("limit", value) for value in ("0", "-1", "1001", "many", "1.5", "", "9" * 30)),
        *(("after", value) for value in ("Cup", "../x", "cup@", "a b", "x" * 2000, "cup\0", "\u00fc")),
    ],
)
def test_a_bad_page_is_refused_by_the_name_of_its_field(tmp_path: Path, path: str, name: str, value: str) -> None:
    with serving(LocalStore(tmp_path)) as http:
        response = http.get(path, params={name: value})
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (400, name, "invalid_value")
        assert error["message"].startswith(f"{name}: ")


def test_an_adapter_named_as_the_base_is_listed_by_a_name_that_means_it(tmp_path: Path, template: Manifest) -> None:
    fill(tmp_path, template, ["aaa", "pocket", "zzz"])
    with serving(LocalStore(tmp_path), base="pocket") as http:
        for limit in (1, 2, 10):
            found = followed(http, "/v1/models", limit)
            assert [card["id"] for card in found] == ["pocket", "aaa", "pocket@latest", "zzz"]
            assert all(http.get(f"/v1/models/{card['id']}").json() == card for card in found)


def test_a_name_costs_the_same_in_a_large_registry_and_does_not_read_it(tmp_path: Path, template: Manifest) -> None:
    costs = []
    for count in (3, 230):
        folder = tmp_path / str(count)
        fill(folder, template, ["cup", *MANY[:count]])
        store = CountingStore(folder)
        with serving(store) as http:
            for path, status in (("models/nobody", 404), ("models/cup", 200), ("adapters/cup", 200)):
                assert http.get(f"/v1/{path}").status_code == status
            assert http.get("/v1/adapters/cup-x/drift").status_code == 404
        assert not [key for key in store.read if "/other-" in key]
        costs.append(store.calls.total())
    assert costs[0] == costs[1] <= 8


def test_an_unknown_name_does_not_wait_for_a_listing(tmp_path: Path, template: Manifest) -> None:
    fill(tmp_path, template, ["cup", *MANY[:3]])
    store = WatchedStore(tmp_path)
    held = store.gates[manifest_key(MANY[1], template.revision)] = threading.Event()
    with serving(store) as http, ThreadPoolExecutor(3) as pool:
        try:
            lists = [pool.submit(http.get, path) for path in ("/v1/models", "/v1/adapters", "/v1/adapters?limit=2")]
            assert http.get("/v1/models/nobody", timeout=SOON / 2).status_code == 404
            assert http.get("/v1/models/cup", timeout=SOON / 2).status_code == 200
            assert not any(one.done() for one in lists)
        finally:
            held.set()
        assert [one.result().status_code for one in lists] == [200, 200, 200]


def test_what_was_read_is_bounded_shared_and_read_again_in_time() -> None:
    reads, clock = list[str](), Clock()

    def read(key: str) -> str:
        reads.append(key)
        if key == "bad":
            raise ValueError(key)
        return key.upper()

    async def ask() -> None:
        with ThreadPoolExecutor(1) as threads:
            recent = Recent(read, threads, ttl_s=5.0, most=2, clock=clock)
            assert await asyncio.gather(*(recent.get("a") for _ in range(9))) == ["A"] * 9
            clock.now += 4.9
            assert await recent.get("a") == "A"
            for _ in range(3):
                with pytest.raises(ValueError, match="bad"):
                    await recent.get("bad")
            assert reads == ["a", "bad"]
            assert await recent.get("b") == "B"  # the third key: the first one goes
            assert await recent.get("a") == "A"
            assert reads == ["a", "bad", "b", "a"]
            clock.now += 5.0
            assert await recent.get("a") == "A"
            assert reads == ["a", "bad", "b", "a", "a"]

    asyncio.run(ask())
