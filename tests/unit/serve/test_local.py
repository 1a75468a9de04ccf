"""The service on this machine: what keeps Ray from starting is said in a sentence."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray import serve as ray_serve
from ray.exceptions import RaySystemError

from cat_cluster.errors import ClusterError, SpecError
from serve import local
from serve.local import local_deployment, serve_here
from serve.proxy import CALLBACK, CALLBACK_VARIABLE
from serve.settings import SafetySettings, ServeSettings, SigningSettings


def serve(tmp_path: Path, host: str = "127.0.0.1", **options: object) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ServeSettings(storage=str(tmp_path), device="cpu", **options)
    serve_here(settings, host, port, on_ready=lambda address: pytest.fail(f"it serves at {address}"))


def test_a_long_temporary_folder_is_refused_before_ray_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("a" * 90)))
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray was started"))
    with pytest.raises(ClusterError, match=r"^TMPDIR=.*; set RAY_TMPDIR to a folder of at most \d+ bytes") as refused:
        serve(tmp_path)
    assert "\n" not in str(refused.value)


def test_files_that_cannot_sign_are_refused_before_ray_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray was started"))
    signing = SigningSettings(certificates=tmp_path / "chain.pem", key=tmp_path / "signer.key")
    with pytest.raises(SpecError, match=r"^signing\.certificates: .*chain\.pem cannot be read"):
        serve(tmp_path, signing=signing)


def test_a_safety_checker_that_cannot_be_loaded_is_refused_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray was started"))
    with pytest.raises(SpecError, match=r"^safety\.model: .*nothing is no image classifier"):
        serve(tmp_path, safety=SafetySettings(model=tmp_path / "nothing", labels=("odd",)))


def test_engines_find_the_files_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    signing = SigningSettings(certificates="keys/chain.pem", key="keys/signer.key", time_stamps="http://tsa.example")
    document = local_deployment(ServeSettings(signing=signing), 1).model_dump(mode="json")
    keys = {"certificates": f"{tmp_path}/keys/chain.pem", "key": f"{tmp_path}/keys/signer.key"}
    keys["time_stamps"] = "http://tsa.example"
    assert document["settings"]["signing"] == keys
    safety = SafetySettings(model="models/nsfw", labels=("nsfw",))
    document = local_deployment(ServeSettings(safety=safety), 1).model_dump(mode="json")
    assert document["settings"]["safety"]["model"] == f"{tmp_path}/models/nsfw"


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


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("cat_cluster.errors.BaseModelError: the base is damaged: download it again.", "the base is damaged: download"),
        ("ValueError: rows\nof what", "the engine stopped: ValueError: rows"),
    ],
)
def test_an_engine_that_does_not_start_is_its_error(message: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the form in which Ray Serve has it: its own words, Ray's traceback, and Python's inside that."""
    whole = (
        "The deployment failed to start 3 times in a row. See controller logs for details. Error:\n"
        "\x1b[36mray::ServeReplica:cat:Engine.initialize()\x1b[39m (pid=1, ip=::1, actor_id=a, repr=<b>)\n"
        '  File "c.py", line 1, in initialize\nRuntimeError: Traceback (most recent call last):\n'
        f'  File "d.py", line 2, in build\n    raise\n{message}\n'
    )
    found = {
        "e": SimpleNamespace(status="DEPLOY_FAILED", message=whole),
        "i": SimpleNamespace(status="HEALTHY", message=""),
    }
    status = SimpleNamespace(applications={local.APPLICATION: SimpleNamespace(deployments=found)})
    monkeypatch.setattr(ray_serve, "status", lambda: status)
    assert local._reason().startswith(reason)


@pytest.mark.parametrize("host", ["a..b", "a" * 64, "\udcff.org"])
def test_what_cannot_be_a_hosts_name_is_refused(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAT_API_KEYS", "a-key")
    with pytest.raises(ClusterError, match=r"^--host .*: cannot be the name of a host; give an address"):
        serve(tmp_path, host)


def test_a_ray_that_dies_ends_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that is silent for a while does not."""
    answers = iter([[{"Alive": True}], RaySystemError("no answer"), [{"Alive": True}]])

    def nodes() -> list[dict[str, bool]]:
        answer = next(answers, [{"Alive": False}])
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setattr(local, "_WATCH_S", 0.001)
    monkeypatch.setattr(local, "start_ray", lambda **options: None)
    monkeypatch.setattr(local, "start", lambda *deployment: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", nodes)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray_serve, "delete", lambda name: pytest.fail("it waits for what is gone"))
    for name in (CALLBACK_VARIABLE, "RAY_COLOR_PREFIX"):
        monkeypatch.setenv(name, "restored to what it was, whatever is set meanwhile")
    watchdog = threading.Timer(10, os.kill, [os.getpid(), signal.SIGTERM])  # a hang is a failure
    watchdog.start()
    try:
        with pytest.raises(ClusterError, match=r"Ray has died on this machine.*: start the command again"):
            serve_here(
                ServeSettings(storage=str(tmp_path), device="cpu"), "127.0.0.1", 0, on_ready=lambda address: None
            )
    finally:
        watchdog.cancel()
    assert next(answers, None) is None
