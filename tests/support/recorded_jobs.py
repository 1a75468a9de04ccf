"""Jobs that did not move, as a real API server (Kubernetes 1.34) and KubeRay 1.7 showed them; and jobs in a queue."""

from __future__ import annotations

import json
from http import HTTPStatus
from pathlib import Path
from typing import Any

from cat_cluster.errors import KubernetesError

RECORDED = {
    case["case"]: case
    for case in map(json.loads, Path(__file__).with_name("recorded_jobs.jsonl").read_text().splitlines())
}


def workload(name: str, minute: int, priority: int = 0, message: str = "", **spec: Any) -> dict[str, Any]:
    reserved = {"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": message}
    return {
        "metadata": {
            "name": f"rayjob-{name}",
            "creationTimestamp": f"2026-11-29T10:{minute}:00Z",
            "ownerReferences": [{"uid": name}],
        },
        "spec": {"queueName": "train", "priority": priority, **spec},
        "status": {"conditions": [reserved]},
    }


def queued(name: str) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "uid": name,
            "labels": {"kueue.x-k8s.io/queue-name": "train"},
            "creationTimestamp": "2026-11-29T10:40:00Z",
        },
        "spec": {"suspend": True},
        "status": {"jobDeploymentStatus": "Suspended"},
    }


class Server:
    """The border of Api: objects by kind, and what may not be read."""

    namespace = "cat-cluster"

    def __init__(self, objects: dict[str, list[dict[str, Any]]], forbidden: tuple[str, ...] = ()) -> None:
        self._objects, self._forbidden = objects, forbidden
        self.logs_read: list[tuple[str, str, bool]] = []

    def get(self, api_version: str, kind: str, name: str) -> dict[str, Any] | None:
        return next((one for one in self._objects.get(kind, []) if one["metadata"]["name"] == name), None)

    def resource(self, api_version: str, kind: str) -> object | None:
        return object() if kind in self._objects else None

    def list(
        self, api_version: str, kind: str, *, labels: str = "", fields: str = "", namespace: str | None = None
    ) -> list[dict[str, Any]]:
        if kind in self._forbidden:
            raise KubernetesError(f"a right is missing to list {kind}", HTTPStatus.FORBIDDEN)
        pairs = [tuple(pair.split("=")) for pair in labels.split(",") if pair]
        return [
            one
            for one in self._objects.get(kind, [])
            if all(one["metadata"].get("labels", {}).get(key) == value for key, value in pairs)
        ]

    def log(self, pod: str, container: str, *, tail: int, previous: bool) -> list[str]:
        self.logs_read.append((pod, container, previous))
        return ["Traceback\n", "ValueError: no bucket\n"]
