"""The storage of a namespace's jobs from outside: which it is, and how its server is reached."""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from cat_cluster.cluster.kuberay.client import storage
from cat_cluster.cluster.kuberay.client.api import Api
from cat_cluster.cluster.kuberay.client.storage import pod_settings, storage_of, storage_reached
from cat_cluster.errors import KubernetesError, SpecError
from tests.support.api_server import ApiServer, api_server, made

SETTINGS = {"AWS_REGION": "eu-1", "CAT_STORAGE": "s3://cat-storage/prod", "AWS_ENDPOINT_URL": "http://s3:8333"}
VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "CAT_STORAGE",
)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The pods and ports that would be forwarded, all to port 41000."""
    found: list[tuple[str, int]] = []

    @contextmanager
    def forwarded(api: Any, find_pod: Callable[[], str], port: int) -> Iterator[int]:
        found.append((find_pod(), port))
        yield 41000

    monkeypatch.setattr(storage, "forwarded", forwarded)
    return found


@pytest.fixture
def server() -> Iterator[ApiServer]:
    """A namespace whose storage is a Service with two pods, of which one is ready."""
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    data = {name: base64.b64encode(value.encode()).decode() for name, value in keys.items()}
    ports = [{"name": "s3", "containerPort": 9000}]
    pods = [
        made(
            "Pod",
            name,
            labels={"app": "s3", "more": "yes"},
            spec={"containers": [{}, {"ports": ports}]},
            status={"conditions": [{"type": "Ready", "status": state}]},
        )
        for name, state in (("starting", "False"), ("s3-0", "True"))
    ]
    service = {"selector": {"app": "s3"}, "ports": [{"port": 8333, "targetPort": "s3"}]}
    with api_server() as server:
        server.put(made("ConfigMap", "cat-cluster-settings", data=SETTINGS))
        server.put(made("Secret", "cat-cluster-s3", data=data), made("Service", "s3", spec=service), *pods)
        yield server


def seen() -> dict[str, str]:
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


@pytest.mark.parametrize("host", ["s3", "s3.cat-cluster", "s3.cat-cluster.svc", "s3.cat-cluster.svc.cluster.local"])
def test_a_server_in_the_namespace_is_reached_through_its_pod(
    host: str, asked: list[tuple[str, int]], api: Api
) -> None:
    said: list[str] = []
    with storage_reached(api, {**SETTINGS, "AWS_ENDPOINT_URL": f"http://{host}:8333"}, said.append):
        inside = seen()
    assert asked == [("s3-0", 9000)]
    assert inside == {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:41000",
        "AWS_REGION": "eu-1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    assert said == ["storage through a forwarded port of Service s3, with the keys of Secret cat-cluster-s3"]
    assert seen() == {}


def test_what_the_environment_gives_counts(
    asked: list[tuple[str, int]], api: Api, server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "mine")
    before = seen()
    said: list[str] = []
    server.forbidden.add("secrets")
    with storage_reached(api, SETTINGS, said.append):
        assert seen() == {**before, "AWS_ENDPOINT_URL": "http://127.0.0.1:41000"}
    assert said == ["storage through a forwarded port of Service s3"]
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    before = seen()
    with storage_reached(api, SETTINGS, said.append):
        assert seen() == before
    assert len(said) == len(asked) == 1


@pytest.mark.parametrize(
    "endpoint", ["", "https://s3.eu-1.amazonaws.com", "http://s3.other:8333", "http://10.0.0.7:8333", "https://s3:8333"]
)
def test_a_server_elsewhere_is_the_users_own(endpoint: str, asked: list[tuple[str, int]], api: Api) -> None:
    with storage_reached(api, {**SETTINGS, "AWS_ENDPOINT_URL": endpoint}, print):
        assert seen() == {}
    assert asked == []


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda s: s.objects.pop(("pods", "cat-cluster", "s3-0")), r"no pod behind Service s3.*get pods -l app=s3"),
        (
            lambda s: s.objects.pop(("secrets", "cat-cluster", "cat-cluster-s3")),
            "no Secret cat-cluster-s3 with AWS_ACCESS_KEY_ID",
        ),
        (
            lambda s: s.objects.pop(("services", "cat-cluster", "s3")),
            "names port 8333 of Service s3 as the storage",
        ),
        (lambda s: s.forbidden.add("secrets"), "a right is missing to get Secret cat-cluster-s3"),
    ],
)
def test_what_is_missing_is_named(
    break_it: Callable[[ApiServer], object], said: str, asked: list[tuple[str, int]], api: Api, server: ApiServer
) -> None:
    break_it(server)
    with pytest.raises(KubernetesError, match=said), storage_reached(api, SETTINGS, print):
        pass


def test_the_settings_of_pods_are_read_where_that_is_allowed(api: Api, server: ApiServer) -> None:
    said: list[str] = []
    assert pod_settings(api, said.append) == SETTINGS
    assert said == []
    server.objects.clear()
    with pytest.raises(KubernetesError, match="no ConfigMap cat-cluster-settings, which every pod needs"):
        pod_settings(api, print)
    server.forbidden.add("configmaps")
    assert pod_settings(api, said.append) == {}
    assert "a right is missing" in said[0]


def test_the_first_storage_that_pods_can_see_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert storage_of("/given", "s3://spec/a", SETTINGS, said.append) == "/given"  # refused by name later
    assert storage_of(None, "s3://spec/a", SETTINGS, said.append) == "s3://spec/a"
    assert said == []
    monkeypatch.setenv("CAT_STORAGE", "s3://variable/a")
    assert storage_of(None, "/work/cats", SETTINGS, said.append) == "s3://variable/a"
    monkeypatch.setenv("CAT_STORAGE", "./cats")
    assert storage_of(None, None, SETTINGS, said.append) == "s3://cat-storage/prod"
    assert said == [
        "the spec's storage, /work/cats, is a folder of this machine, which no pod sees: passed over",
        "$CAT_STORAGE, ./cats, is a folder of this machine, which no pod sees: passed over",
        "storage s3://cat-storage/prod, as ConfigMap cat-cluster-settings says",
    ]
    monkeypatch.delenv("CAT_STORAGE")
    with pytest.raises(SpecError, match="no storage is known: give --storage"):
        storage_of(None, None, {}, said.append)


def test_a_forwarded_port_carries_both_ways_and_closes(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from cat_cluster.cluster.kuberay.client import port_forward

    far: list[socket.socket] = []

    def connect(self: Any) -> socket.socket:
        self._find_pod()
        near, end = socket.socketpair()
        far.append(end)
        return near

    monkeypatch.setattr(port_forward._Forward, "_connect", connect)
    pods = iter(["s3-0"])

    def find_pod() -> str:
        for pod in pods:
            return pod
        raise KubernetesError("no pod is ready")

    with port_forward.forwarded(api, find_pod, 8333) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            client.sendall(b"question")
            while not far:
                pass
            assert far[0].recv(100) == b"question"
            far[0].sendall(b"answer")
            assert client.recv(100) == b"answer"
            far[0].close()
            assert client.recv(100) == b""
        for _ in range(2):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
                assert client.recv(100) == b""
    assert [record.getMessage() for record in caplog.records] == [
        "port 8333 of a pod cannot be reached: no pod is ready"
    ]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5)


@pytest.mark.parametrize("endpoint", ["http://s3:port", "http://s3:99999", "http://[s3"])
def test_what_is_no_address_of_a_server(endpoint: str, api: Api) -> None:
    with (
        pytest.raises(KubernetesError, match=r"names 'http://.*' as the storage's server, which is no address: "),
        storage_reached(api, {"AWS_ENDPOINT_URL": endpoint}, print),
    ):
        pass
