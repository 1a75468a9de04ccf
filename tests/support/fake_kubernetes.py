"""A Kubernetes API server in memory: the objects of a namespace, and what was asked of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from cat_cluster.errors import KubernetesError

Json = dict[str, Any]


class FakeApi:
    """Stands in for `Api`. kinds: those that the server has; denied: `verb resource` or `verb kind name`."""

    def __init__(self, *objects: Json, kinds: tuple[str, ...] = ("RayJob",), denied: tuple[str, ...] = ()) -> None:
        self.context, self.namespace, self.server = "lab", "cat-cluster", "https://lab:6443"
        self.objects = {self._key(one): one for one in objects}
        self.kinds, self.denied = kinds, denied
        self.deleted: list[str] = []
        self.logs: dict[tuple[str, str], str] = {}

    def required(self, api_version: str, kind: str) -> None:
        if kind not in self.kinds:
            raise KubernetesError(f"no kind {kind}", 404)

    def resource(self, api_version: str, kind: str) -> object | None:
        return kind if kind in self.kinds else None

    def get(self, api_version: str, kind: str, name: str) -> Json | None:
        if f"get {kind} {name}" in self.denied:
            raise KubernetesError(f"a right is missing to get {kind} {name}", 403)
        return copy.deepcopy(self.objects.get((kind, name)))

    def list(
        self, api_version: str, kind: str, *, labels: str = "", fields: str = "", namespace: str | None = None
    ) -> list[Json]:
        wanted = dict(pair.split("=") for pair in labels.split(",") if pair)
        return [
            copy.deepcopy(one)
            for (its_kind, _), one in self.objects.items()
            if its_kind == kind and wanted.items() <= one["metadata"].get("labels", {}).items()
        ]

    def apply(self, document: Json) -> Json:
        self.objects[self._key(document)] = copy.deepcopy(document)
        return document

    def merge(self, api_version: str, kind: str, name: str, change: Json) -> Json:
        self.objects[(kind, name)]["spec"] |= change["spec"]
        return self.objects[(kind, name)]

    def delete(self, api_version: str, kind: str, name: str) -> bool:
        self.deleted.append(name)
        return self.objects.pop((kind, name), None) is not None

    def allows(self, verb: str, group: str, resource: str) -> bool:
        return f"{verb} {resource}" not in self.denied

    def log(self, pod: str, container: str, *, follow: bool = False, tail: int | None = None) -> Iterator[str]:
        yield self.logs[(pod, container)]

    @staticmethod
    def _key(document: Json) -> tuple[str, str]:
        return document["kind"], document["metadata"]["name"]


def made(kind: str, name: str, *, labels: Json | None = None, created: str = "2026-01-01", **rest: Any) -> Json:
    """An object with its metadata; rest: its spec and status."""
    metadata = {"name": name, "labels": labels or {}, "creationTimestamp": created}
    return {"kind": kind, "metadata": metadata, "spec": {}, "status": {}, **rest}
