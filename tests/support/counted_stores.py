"""Stores that count what they are asked, and registries of many adapters made in a moment."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cat_cluster.registry import Manifest
from cat_cluster.registry.manifest import sha256
from cat_cluster.registry.references import manifest_key
from cat_cluster.store import LocalStore
from cat_cluster.store.protocol import Entry
from cat_cluster.store.s3 import S3Store


class CountingStore(LocalStore):
    """A folder that counts its calls by their kind, and keeps the keys that were read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.calls: Counter[str] = Counter()
        self.read: list[str] = []

    def get(self, key: str) -> bytes:
        self.calls["get"] += 1
        self.read.append(key)
        return super().get(key)

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        self.calls["put"] += 1
        super().put(key, data, if_absent=if_absent)

    def exists(self, key: str) -> bool:
        self.calls["exists"] += 1
        return super().exists(key)

    def entries(self, prefix: str, *, after: str = "") -> Iterator[Entry]:
        self.calls["entries"] += 1
        return super().entries(prefix, after=after)

    def delete(self, key: str) -> None:
        self.calls["delete"] += 1
        super().delete(key)

    def forget(self) -> None:
        """Count from 0 again."""
        self.calls.clear()
        self.read.clear()


def count_requests(store: S3Store) -> list[str]:
    """Return a list that gets the name of every request that the store sends from now on."""
    sent: list[str] = []
    events = store._bucket.client("read", "").meta.events
    events.register("before-send.s3", lambda event_name, **_: sent.append(event_name.rpartition(".")[2]))
    return sent


def sealed(manifest: Manifest, **changes: Any) -> bytes:
    """The bytes of a manifest with other fields and a checksum that fits them."""
    fields = json.loads(manifest.model_dump_json(exclude={"checksum"})) | changes
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps({**fields, "checksum": sha256(canonical)}).encode()


def records_like(manifest: Manifest, adapter_id: str) -> dict[str, bytes]:
    """Key -> bytes of an adapter that has this manifest under its own name, and `latest`."""
    move = {"revision": manifest.revision, "created": "2026-01-01T00:00:00+00:00", "nonce": adapter_id}
    return {
        manifest_key(adapter_id, manifest.revision): sealed(manifest, adapter_id=adapter_id),
        f"aliases/{adapter_id}/latest/00000001.json": json.dumps(move).encode(),
    }


def fill(folder: Path, manifest: Manifest, adapter_ids: Iterable[str]) -> None:
    """Write adapters like this one into the folder of a store, not synced to disk as a store does it."""
    for adapter_id in adapter_ids:
        for key, data in records_like(manifest, adapter_id).items():
            path = folder / key
            path.parent.mkdir(parents=True)
            path.write_bytes(data)
