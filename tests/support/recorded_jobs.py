"""Jobs that did not move, as a real API server (Kubernetes 1.34) and KubeRay 1.7 showed them; and jobs in a queue."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from tests.support.api_server import ApiServer

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


def put_recorded(server: ApiServer, *cases: str) -> None:
    """Keep the objects of recorded jobs in a server."""
    for record in map(RECORDED.__getitem__, cases):
        put_jobs(server, record["job"])
        server.put(*(typed("v1", "Pod", one) for one in record["pods"]))
        for number, event in enumerate(record["events"]):  # whose names were not recorded
            named = {**event, "type": "Warning", "metadata": {**event["metadata"], "name": f"{number}"}}
            server.put(typed("v1", "Event", named))


def put_jobs(server: ApiServer, *jobs: dict[str, Any]) -> None:
    """Keep RayJobs in a server."""
    server.put(*(typed("ray.io/v1", "RayJob", one) for one in jobs))


def typed(api_version: str, kind: str, one: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of an object that names its kind, as lists leave out."""
    return {"apiVersion": api_version, "kind": kind, **copy.deepcopy(one)}
