"""A record that cannot be read costs its own adapter at most: the catalogue is there for everybody."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from cat_cluster.registry import Manifest, Registry
from cat_cluster.registry.manifest import sha256
from cat_cluster.registry.references import manifest_key
from cat_cluster.store import LocalStore
from serve.http.access import Access
from serve.settings import ServeSettings
from tests.support.ingress_server import Live, ScriptedEngine, listening, only, publish


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(LocalStore(tmp_path))
    unet = torch.nn.ModuleDict({"mid": torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 4)})})
    for name in ("cup", "mug"):
        publish(registry, unet, "f" * 64, "base", adapter_id=name)
    return registry


@pytest.fixture
def live(registry: Registry) -> Iterator[Live]:
    settings = ServeSettings(base="base")
    with listening(only(ScriptedEngine()), registry, settings, Access(settings)) as live:
        yield live


def listed(http: httpx2.Client) -> dict[str, Any]:
    """The adapters by id, after a look at every route of the healthy one."""
    for path in ("models", "models/mug", "adapters/mug", "adapters/mug/drift", "adapters/mug/samples/photo-0-000.png"):
        assert http.get(f"/v1/{path}").status_code == 200, path
    models = [model["id"] for model in http.get("/v1/models").json()["data"]]
    response = http.get("/v1/adapters")
    assert response.status_code == 200
    found = {adapter["id"]: adapter for adapter in response.json()["data"]}
    assert found["mug"]["latest"]["name"] == found["mug"]["id"] + "@" + found["mug"]["revisions"][0]
    assert ("cup" in models) == (found["cup"]["latest"] is not None)
    return found


RECORDS: list[Any] = [None, 5, [], {}, {"revision": 5}, {"revision": ["r-0"], "created": "", "nonce": ""}]


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 100_000, *(json.dumps(record).encode() for record in RECORDS)])
def test_a_damaged_alias_hides_no_other_adapter(live: Live, registry: Registry, data: bytes) -> None:
    registry.store.put("aliases/cup/latest/00000001.json", data)
    with live.http() as http:
        cup = listed(http)["cup"]
        assert (cup["latest"], cup["aliases"], cup["damaged_aliases"]) == (None, {}, ["latest"])
        assert len(cup["revisions"]) == 1
        error = http.get("/v1/adapters/cup").json()["error"]
        assert (error["code"], "alias 'latest' of cup" in error["message"]) == ("invalid_reference", True)
        assert http.get(f"/v1/adapters/cup@{cup['revisions'][0]}").status_code == 200


def test_strange_files_beside_the_records_hide_nothing(live: Live, registry: Registry) -> None:
    for key in ("aliases/cup/notes.txt", "aliases/cup/LATEST/00000001.json", "adapters/cup/notes.txt", "adapters/x"):
        registry.store.put(key, b"")
    with live.http() as http:
        cup = listed(http)["cup"]
        assert (cup["damaged"], cup["damaged_aliases"], len(cup["aliases"])) == ([], [], 1)


def sealed(manifest: Manifest, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A changed manifest whose checksum fits, as a faulty publisher would have written it."""
    fields = json.loads(manifest.model_dump_json(exclude={"checksum"}))
    change(fields)
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps({**fields, "checksum": sha256(canonical)}).encode()


def put(**found: Any) -> Callable[[dict[str, Any]], None]:
    return lambda fields: fields.update(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        put(created="yesterday"),
        put(created="0001-01-01"),
        put(created=5),
        put(rank="many"),
        put(rank=0),
        put(concepts=[{"token": 5}]),
        put(concepts={}),
        put(metrics=[]),
        put(metrics={"kps": "high"}),
        put(metrics={"kps": 0.5, "intervals": []}),
        put(metrics={"intervals": {"kps": 3}}),
        put(metrics={"leak_matrix": float("inf")}),
        put(metrics={"other": float("nan")}),
        put(metrics={"\ud800": 1.0}),
        put(judge="pocket"),
        put(judge={"name": 5}),
        put(reference={"concepts": []}),
        put(reference={"concepts": {"sks": []}}),
        put(reference={"concepts": {"sks": {"kps": 5}}}),
        put(reference={"concepts": {"sks": {"kps": ["x"]}}}),
        put(samples=[5]),
        put(objects=[]),
        put(objects={"weights": {"key": "x"}}),
        lambda fields: fields.pop("samples"),
    ],
)
def test_a_wrong_manifest_hides_no_other_adapter(
    live: Live, registry: Registry, change: Callable[[dict[str, Any]], None]
) -> None:
    manifest = registry.resolve("cup")
    registry.store.put(manifest_key("cup", manifest.revision), sealed(manifest, lambda fields: None))
    assert registry.resolve("cup").name == manifest.name  # the unchanged one is sound
    registry.store.put(manifest_key("cup", manifest.revision), sealed(manifest, change))
    with live.http() as http:
        cup = listed(http)["cup"]
        assert (cup["latest"], cup["revisions"], cup["damaged"]) == (None, [], [manifest.revision])
        for path in ("models/cup", "adapters/cup", "adapters/cup/drift", f"models/{manifest.name}"):
            assert http.get(f"/v1/{path}").json()["error"]["code"] == "invalid_reference", path


@pytest.mark.parametrize("data", [b"", b"null", b"[" * 100_000, b'{"a":' * 100_000, b'{"rank": 1e999}'])
def test_what_is_no_manifest_hides_no_other_adapter(live: Live, registry: Registry, data: bytes) -> None:
    registry.store.put(manifest_key("cup", registry.resolve("cup").revision), data)
    with live.http() as http:
        assert len(listed(http)["cup"]["damaged"]) == 1


@pytest.mark.parametrize(
    "reference", [None, {}, {"concepts": None}, {"concepts": {"sks": {"kps": [0.1, None], "identity": None}}}]
)
def test_a_revision_measured_in_part_has_its_drift(live: Live, registry: Registry, reference: Any) -> None:
    manifest = registry.resolve("cup")
    registry.store.put(manifest_key("cup", manifest.revision), sealed(manifest, put(reference=reference)))
    with live.http() as http:
        assert listed(http)["cup"]["damaged"] == []
        assert http.get("/v1/adapters/cup/drift").status_code == 200


@pytest.mark.parametrize("data", [b"", b"null", b"5", b"[5]", b"{}", b"[" * 100_000, b'[{"time": 1e300}]'])
def test_damaged_probe_records_and_quarantines_are_read_around(live: Live, registry: Registry, data: bytes) -> None:
    manifest = registry.resolve("cup")
    registry.store.put(f"probes/cup/{manifest.revision}/{datetime.now(UTC):%Y%m%dT%H}/r.json", data)
    registry.store.put(f"quarantine/cup/{manifest.revision}.json", data)
    with live.http() as http:
        drift = http.get("/v1/adapters/cup/drift")
        assert drift.status_code == 200
        assert drift.json()["history"] == []
        assert drift.json()["quarantined"]["reason"] == "no reason given"


def test_an_unmounted_registry_is_no_empty_one(live: Live, registry: Registry, tmp_path: Path) -> None:
    tmp_path.rename(tmp_path.with_name("elsewhere"))
    tmp_path.mkdir()
    with live.http() as http:
        for path in ("models", "adapters", "adapters/cup", "adapters/nobody", "models/cup", "adapters/cup/drift"):
            response = http.get(f"/v1/{path}")
            assert (response.status_code, response.json()["error"]["code"]) == (503, "store_unavailable"), path
