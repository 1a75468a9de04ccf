"""An API server of Kubernetes that keeps objects in memory, over HTTP: what the official client asks it is real."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

Json = dict[str, Any]

KINDS: Mapping[str, Mapping[str, tuple[str, bool]]] = {  # API version -> kind -> name of its resource, namespaced
    "v1": {
        "ConfigMap": ("configmaps", True),
        "Event": ("events", True),
        "Namespace": ("namespaces", False),
        "Node": ("nodes", False),
        "PersistentVolumeClaim": ("persistentvolumeclaims", True),
        "Pod": ("pods", True),
        "Secret": ("secrets", True),
        "Service": ("services", True),
    },
    "apps/v1": {"Deployment": ("deployments", True)},
    "storage.k8s.io/v1": {"StorageClass": ("storageclasses", False)},
    "ray.io/v1": {
        "RayCluster": ("rayclusters", True),
        "RayCronJob": ("raycronjobs", True),
        "RayJob": ("rayjobs", True),
        "RayService": ("rayservices", True),
    },
    "kueue.x-k8s.io/v1beta1": {"Workload": ("workloads", True)},
}
_PATH = re.compile(
    r"/(?:api|apis)/(?P<version>(?:[^/]+/)?v[^/]+?)"
    r"(?:/namespaces/(?P<namespace>[^/]+)(?=/))?/(?P<resource>[a-z]+)(?:/(?P<name>[^/]+))?(?:/(?P<part>[a-z]+))?"
)


@dataclass
class ApiServer:
    """The objects by resource, namespace and name; what is refused; and what was asked, as `PATCH /path?query`."""

    objects: dict[tuple[str, str, str], Json] = field(default_factory=dict)
    kinds: dict[str, Mapping[str, tuple[str, bool]]] = field(default_factory=lambda: dict(KINDS))
    forbidden: set[str] = field(default_factory=set)  # resources
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)  # method and resource -> status, message
    logs: dict[str, str] = field(default_factory=dict)  # pod -> its log
    schemas: Json = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    on_create: Any = None  # called with each object that is made, and may change it
    date: str | None = None  # of each reply, by default the time
    cut: int = 0  # bytes that each reply lacks at its end, where the connection breaks off
    url: str = ""

    def put(self, *objects: Json, namespace: str = "cat-cluster") -> None:
        """Keep objects as they are."""
        for one in objects:
            resource, namespaced = self.kinds[one["apiVersion"]][one["kind"]]
            where = one["metadata"].get("namespace", namespace) if namespaced else ""
            one["metadata"].setdefault("uid", f"uid-{len(self.objects)}")
            if namespaced:
                one["metadata"]["namespace"] = where
            self.objects[resource, where, one["metadata"]["name"]] = one

    def kubeconfig(self, folder: Path, namespace: str = "default") -> Path:
        """Write the file by which clients find this server, as context `test`."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": self.url}}],
            "users": [{"name": "test", "user": {"token": "secret"}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": namespace}}],
            "current-context": "test",
        }
        path = folder / "kubeconfig"
        path.write_text(json.dumps(config), encoding="utf-8")
        return path

    def answer(self, method: str, path: str, query: Mapping[str, str], body: Json | None) -> tuple[int, Any]:
        """Return the status and the JSON, or the text, of a reply."""
        if path == "/version":
            return 200, {"gitVersion": "v1.34.4"}
        if path.startswith("/openapi/v3/"):
            return 200, {"components": {"schemas": self.schemas}}
        if path.endswith("/selfsubjectaccessreviews"):
            assert body is not None
            attributes = body["spec"]["resourceAttributes"]
            return 201, {"status": {"allowed": attributes["resource"] not in self.forbidden}}
        version = path.removeprefix("/apis/").removeprefix("/api/")
        if version in self.kinds:
            resources = [
                {"name": name, "kind": kind, "namespaced": namespaced}
                for kind, (name, namespaced) in self.kinds[version].items()
            ]
            return 200, {"resources": [*resources, {"name": "pods/log", "kind": "Pod", "namespaced": True}]}
        found = _PATH.fullmatch(path)
        if found is None or found["version"] not in self.kinds:
            return 404, {"message": "the server could not find the requested resource"}
        return self._about(method, found, query, body)

    def _about(self, method: str, found: re.Match[str], query: Mapping[str, str], body: Json | None) -> tuple[int, Any]:
        resource, where, name = found["resource"], found["namespace"] or "", found["name"]
        if resource in self.forbidden:
            reason = f'{resource} is forbidden: User "ada" cannot list resource "{resource}" in API group ""'
            return 403, {"message": reason}
        if (refusal := self.refused.get(f"{method} {resource}")) is not None:
            return refusal[0], {"message": refusal[1]}
        if found["part"] == "log":
            return 200, self.logs.get(name, "")
        if method == "POST":
            assert body is not None
            metadata = body["metadata"]
            name = metadata.setdefault("name", f"{metadata.get('generateName', '')}x1")
            method = "PATCH"
            if (resource, where, name) in self.objects:
                return 409, {"message": f'{resource} "{name}" already exists'}
        if name is None:
            wanted = _selector(query.get("labelSelector", ""))
            fields = _selector(query.get("fieldSelector", "")).items()
            items = [
                one
                for (kind, namespace, _), one in self.objects.items()
                if kind == resource
                and where in ("", namespace)
                and wanted.items() <= (one["metadata"].get("labels") or {}).items()
                and all(_field(one, path) == value for path, value in fields)
            ]
            return 200, {"items": items, "metadata": {}}
        if method == "PATCH":
            assert body is not None
            return self._change(resource, where, name, query, body)
        if (resource, where, name) not in self.objects:
            return 404, {"message": f'{resource} "{name}" not found'}
        one = self.objects[resource, where, name]
        if method == "DELETE":
            del self.objects[resource, where, name]
        return 200, one

    def _change(self, resource: str, where: str, name: str, query: Mapping[str, str], body: Json) -> tuple[int, Any]:
        before = self.objects.get((resource, where, name), {})
        after = _merged(before, body)
        after["metadata"].setdefault("uid", f"uid-{len(self.objects)}")
        if "dryRun" not in query:
            self.objects[resource, where, name] = after
            if self.on_create is not None and not before:
                self.on_create(after)
        return 200, after


def made(
    kind: str,
    name: str,
    namespace: str = "cat-cluster",
    *,
    labels: Json | None = None,
    created: str = "2026-01-01T00:00:00Z",
    **content: Any,
) -> Json:
    """Return an object of one of KINDS with its metadata. content: what else it holds, such as its status."""
    version, namespaced = next((version, kinds[kind][1]) for version, kinds in KINDS.items() if kind in kinds)
    where = {"namespace": namespace} if namespaced else {}
    metadata = {"name": name, **where, "labels": labels or {}, "creationTimestamp": created}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": {}, **content}


@contextmanager
def api_server() -> Iterator[ApiServer]:
    """Start such a server on loopback, for the length of the block."""
    state = ApiServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and body go apart: the second would wait 40 ms for the first to arrive

        def _reply(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            state.asked.append(f"{self.command} {self.path}")
            status, content = state.answer(self.command, url.path, query, body)
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) - state.cut])
            self.close_connection = state.cut > 0

        do_GET = do_POST = do_PATCH = do_DELETE = _reply

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(timestamp) if state.date is None else state.date

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield state
        finally:
            server.shutdown()


def _selector(text: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in text.split(",") if part)


def _field(one: Any, path: str) -> Any:
    for name in path.split("."):
        one = one.get(name, {})
    return one


def _merged(before: Json, change: Json) -> Json:
    after = dict(before)
    for key, value in change.items():
        inner = isinstance(value, dict) and isinstance(before.get(key), dict)
        after[key] = _merged(before[key], value) if inner else value
    return after
