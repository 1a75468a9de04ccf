"""The service on this machine: what keeps Ray from starting is said in a sentence."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import ray

from cat_cluster.errors import ClusterError
from serve.local import serve_here
from serve.proxy import CALLBACK, CALLBACK_VARIABLE
from serve.settings import ServeSettings


def serve(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ServeSettings(storage=str(tmp_path), device="cpu")
    serve_here(settings, "127.0.0.1", port, on_ready=lambda address: pytest.fail(f"it serves at {address}"))


def test_a_long_temporary_folder_is_refused_before_ray_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("a" * 90)))
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray was started"))
    with pytest.raises(ClusterError, match=r"^TMPDIR=.*; set RAY_TMPDIR to a folder of at most \d+ bytes") as refused:
        serve(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_ray_that_does_not_start_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: object) -> None:
        assert os.environ[CALLBACK_VARIABLE] == CALLBACK  # Ray's processes have the environment of this moment
        raise Exception("The current node timed out during startup.\nand more")  # as Ray raises it

    for name in (CALLBACK_VARIABLE, "RAY_AUTH_TOKEN", "RAY_COLOR_PREFIX"):
        monkeypatch.setenv(name, "restored to what it was, whatever is set meanwhile")
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(
        ClusterError, match=r"Ray did not start on this machine: The current .* startup; its logs"
    ) as told:
        serve(tmp_path)
    assert "\n" not in str(told.value)
