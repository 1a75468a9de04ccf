"""An API server over HTTP that keeps objects in memory, and the client that asks it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cat_cluster.cluster.kuberay.client.api import Api, open_api
from tests.support.api_server import ApiServer, api_server


@pytest.fixture
def server() -> Iterator[ApiServer]:
    """One without any object."""
    with api_server() as server:
        yield server


@pytest.fixture
def api(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Api:
    """Its client, by a kubeconfig."""
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path)))
    return open_api(None, "cat-cluster")
