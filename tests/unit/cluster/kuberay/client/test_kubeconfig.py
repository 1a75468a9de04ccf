"""Which API server is meant, of kubeconfigs that people have; what cannot be used is told with its remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cat_cluster.cluster.kuberay.client.kubeconfig import find_server
from cat_cluster.errors import SpecError


def exec_plugin(*words: str) -> dict[str, Any]:
    return {
        "exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": words[0], "args": list(words[1:])},
    }


def config(user: dict[str, Any] | None = None, current: str | None = "lab", **cluster: str) -> dict[str, Any]:
    return {
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:9", **cluster}}],
        "users": [{"name": "u", "user": user or {"token": "secret"}}],
        "contexts": [{"name": name, "context": {"cluster": "c", "user": "u"}} for name in ("lab", "prod")],
        **({} if current is None else {"current-context": current}),
    }


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def write(content: bytes | dict[str, Any]) -> None:
        path = tmp_path / "kubeconfig"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        monkeypatch.setenv("KUBECONFIG", str(path))

    return write


def test_the_current_context_unless_one_is_given(write: Any) -> None:
    write(config())
    configuration, name = find_server(None)
    assert (configuration.host, name) == ("http://127.0.0.1:9", "lab")
    assert find_server("prod")[1] == "prod"


@pytest.mark.parametrize("current", [None, "", "gone"])
def test_a_context_that_is_given_needs_no_current_one(write: Any, current: str | None) -> None:
    write(config(current=current))
    assert find_server("prod")[1] == "prod"
    with pytest.raises(SpecError, match=r"current-context .*has none of this name; it has lab, prod"):
        find_server(None)


def test_an_unknown_context(write: Any) -> None:
    write(config())
    with pytest.raises(SpecError, match=r"--context other: kubeconfig .* has none of this name; it has lab, prod"):
        find_server("other")


def test_no_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(SpecError, match=r"no cluster is configured: .*none is not there; set KUBECONFIG"):
        find_server(None)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"a: [b", b"[]", b"text", b"contexts: 3", b"contexts: [{}]"])
def test_a_file_that_is_no_kubeconfig(write: Any, content: bytes) -> None:
    write(content)
    with pytest.raises(SpecError, match=r"(?s)kubeconfig .* cannot be read: .*; correct it"):
        find_server(None)


def test_a_folder_is_no_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path))
    with pytest.raises(SpecError, match=r"cannot be read: .*Is a directory"):
        find_server(None)


@pytest.mark.parametrize(
    ("user", "says"),
    [
        (exec_plugin("no-such-plugin"), "No such file or directory: 'no-such-plugin'"),
        (exec_plugin("sh", "-c", "echo log in first >&2; exit 3"), "exec: process returned 3. log in first"),
        (exec_plugin("echo", "hello"), "exec: failed to decode process output"),
    ],
)
def test_a_plugin_that_gives_no_credentials_is_told(write: Any, user: dict[str, Any], says: str) -> None:
    write(config(user))
    with pytest.raises(SpecError, match=f"context lab of kubeconfig gives no credentials: .*{says}.*; log in"):
        find_server(None)


def test_a_certificate_that_is_not_there(write: Any) -> None:
    write(config(server="https://127.0.0.1:9", **{"certificate-authority": "/no/such/file"}))
    with pytest.raises(SpecError, match="context lab of kubeconfig cannot be used: File does not exist"):
        find_server(None)
