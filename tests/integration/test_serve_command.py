"""`cat-cluster serve` as a user runs it, and `serve deploy` of the example configuration, on real Ray."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx2
import psutil
import pytest
import ray
import torch
import yaml
from ray.serve.generated.serve_pb2 import ASGIRequest
from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub
from ray.serve.schema import ServeDeploySchema

from cat_cluster.errors import SpecError
from serve import app
from serve.app import build
from serve.local import local_deployment
from serve.settings import Deployment, ServeSettings
from tests.support.ray_head import TOKEN, free_ports, ray_head
from tests.support.serving import PATH, ROOT, ask, ray_folder, surroundings, until
from tests.support.tiny_jobs import CommandLine

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

CONFIG = ROOT / "serve" / "config.yaml"
COMMAND = (sys.executable, "-m", "cat_cluster.cli", "serve")
KEYS = ("CAT_API_KEYS", "CAT_ADMIN_KEYS", "CAT_STORAGE")


@dataclass(frozen=True)
class Command:
    """A running `cat-cluster serve`."""

    url: str
    process: subprocess.Popen[bytes]
    folder: Path

    def said(self) -> str:
        return (self.folder / "err").read_text()

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@contextmanager
def command(base: Path, *options: str) -> Iterator[Command]:
    (port,) = free_ports(1)
    with ray_folder() as folder:
        environment = {name: value for name, value in surroundings(folder).items() if name not in KEYS}
        with (folder / "err").open("wb") as err:
            process = subprocess.Popen(
                [*COMMAND, "--storage", "registry", "--base", str(base), "--port", str(port), *options],
                cwd=folder,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=err,
                start_new_session=True,
            )
        running = Command(f"http://127.0.0.1:{port}", process, folder)
        try:
            yield running
        finally:
            with suppress(psutil.Error):
                for one in [*running.family(), process]:
                    one.kill()
            process.wait()


def assert_only_here(family: list[psutil.Process]) -> None:
    """They listen on loopback; the port that Ray Serve opens everywhere for each replica asks for a token."""
    ports = [at.laddr for one in family for at in one.net_connections() if at.status == psutil.CONN_LISTEN]
    open_ports = [port for host, port in ports if not ipaddress.ip_address(host.removeprefix("::ffff:")).is_loopback]
    assert len(open_ports) == 2 < len(ports)
    for port in open_ports:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as caught:
            ASGIServiceStub(channel).HandleRequest(ASGIRequest(), timeout=10)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_what_cannot_be_is_said_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    run = CommandLine(monkeypatch, capsys)

    def refused(*options: str) -> str:
        ended = run("serve", "--storage", tmp_path / "registry", *options)
        assert (ended.code, ended.out) == (1, "")
        assert "Traceback" not in ended.err
        return " ".join(ended.err.split())

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port, other = str(taken.getsockname()[1]), str(free_ports(1)[0])
        assert f"port {port} of 127.0.0.1 cannot be used" in refused("--port", port)
        assert "set CAT_API_KEYS to one or more keys" in refused("--port", other, "--host", "0.0.0.0")
        assert "text_encoder, tokenizer, unet, vae" in refused("--port", other, "--base", str(tmp_path))
    assert not ray.is_initialized()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.chaos)])
def test_a_signal_ends_it_and_a_second_one_at_once(tiny_base_folder: Path, number: signal.Signals) -> None:
    """SIGTERM lets images in flight finish; a second Ctrl+C, which a terminal sends to all processes, does not."""
    with command(tiny_base_folder) as serving, httpx2.Client(base_url=serving.url, timeout=60) as http:
        until(lambda: "Serving" in serving.said() or serving.process.poll() is not None, 120)
        assert http.get("/ready").status_code == 200, serving.said()
        odd = http.get("/v1/models", headers={"x-request-id": b"\xff\xfe"})  # Ray's proxy decodes it first
        assert (odd.status_code, odd.headers["x-request-id"].isascii()) == (200, True)
        family = serving.family()
        assert len(family) > 4
        assert_only_here(family)
        with ThreadPoolExecutor(8) as pool:
            count = 3 if number is signal.SIGTERM else 8  # some seconds' work
            fields = {"n": 8, "prompt": "a secret"}
            drawn = [pool.submit(ask, http, str(tiny_base_folder), 100, **fields) for _ in range(count)]
            until(lambda: http.get("/v1/status").json()["images"]["in_flight"] == 8 * count, 30, 0.02)
            began = time.monotonic()
            os.kill(serving.process.pid, number)
            if number is signal.SIGINT:
                time.sleep(1.0)
                os.killpg(serving.process.pid, number)
            else:
                until(lambda: http.get("/ready").status_code == 503, 10, 0.02)
                refused = http.post(PATH, json={"prompt": "a secret"})
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "service_away")
                assert int(refused.headers["retry-after"]) >= 1
                assert [one.result().status_code for one in drawn] == [200] * count
        if number is signal.SIGINT:
            assert any(isinstance(one.exception(), httpx2.TransportError) for one in drawn)
        assert serving.process.wait(60) == 0, serving.said()
        print(f"ended after {time.monotonic() - began:.1f} s")
        assert psutil.wait_procs(family, timeout=10)[1] == []
        assert "Traceback" not in serving.said()
        if number is signal.SIGTERM:
            lines = [line.partition("{")[2] for line in serving.said().splitlines() if '"route"' in line]
            told = [json.loads("{" + line) for line in lines]
            assert {("/ready", 200), (PATH, 200)} <= {(line["route"], line["status"]) for line in told}
        assert "a secret" not in serving.said()


@pytest.mark.chaos
def test_it_ends_when_ray_has_died(tiny_base_folder: Path) -> None:
    with command(tiny_base_folder) as serving:
        until(lambda: "Serving" in serving.said() or serving.process.poll() is not None, 120)
        family = serving.family()
        (raylet,) = (one for one in family if one.name() == "raylet")
        raylet.kill()
        assert serving.process.wait(120) == 1
        assert "Ray has died on this machine" in " ".join(serving.said().split())
        assert "Traceback" not in serving.said()
        assert psutil.wait_procs(family, timeout=60)[1] == []


def test_the_example_configuration_is_one() -> None:
    document = yaml.safe_load(CONFIG.read_text())
    (application,) = ServeDeploySchema.model_validate(document).applications
    assert application.import_path == "serve.app:build"
    Deployment.model_validate(application.args)
    build(application.args)


def test_args_that_are_not_right_are_named() -> None:
    with pytest.raises(SpecError, match="max_engines must be at least min_engines"):
        build({"min_engines": 2, "max_engines": 1})
    with pytest.raises(SpecError, match=r"settings\.slots: Input should be greater"):
        build({"settings": {"slots": 0}})
    with pytest.raises(SpecError, match="enginges: Extra inputs are not permitted"):
        build({"enginges": 2})


def test_this_machine_is_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.chdir(tmp_path)
    shared = local_deployment(ServeSettings(storage="registry", disk_cache=Path("cache")), engines=3)
    assert (shared.settings.threads, shared.min_engines, shared.engine_gpus) == (2, 3, 0.0)
    assert (shared.settings.storage, shared.settings.base) == (str(tmp_path / "registry"), "pocket")
    assert shared.settings.disk_cache == tmp_path / "cache"
    assert local_deployment(ServeSettings(storage="s3://bucket/prod", threads=1), 1).settings.threads == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert local_deployment(ServeSettings(), 3).engine_gpus == 1.0
    assert local_deployment(ServeSettings(device="cpu"), 3).engine_gpus == 0.0
    for gpus, engines in ((1, 3), (2, 3), (2, 7), (3, 1000)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        share = round(10_000 * local_deployment(ServeSettings(), engines).engine_gpus)  # as Ray counts
        assert share > 0
        assert gpus * (10_000 // share) >= engines  # each lies on one GPU


def test_serve_deploy(tiny_base_folder: Path, tmp_path: Path) -> None:
    """The example, as it is but for storage, base and port."""
    document = yaml.safe_load(CONFIG.read_text())
    (port,) = free_ports(1)
    document["http_options"]["port"] = port
    (application,) = document["applications"]
    application["args"]["settings"] |= {"storage": str(tmp_path / "registry"), "base": str(tiny_base_folder)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(document))
    http = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, headers={"Authorization": "Bearer a-key"})
    with ray_head(PYTHONPATH=str(ROOT), CAT_API_KEYS="a-key") as head, http:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CAT_"))}
        ended = subprocess.run(
            [sys.executable, "-m", "ray.serve.scripts", "deploy", str(tmp_path / "config.yaml"), "-a", head.address],
            env={**clean, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN},
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert ended.returncode == 0, ended.stderr

        def is_ready() -> bool:
            with suppress(httpx2.TransportError):
                return http.get("/ready").status_code == 200
            return False

        until(is_ready, 120, 0.5)
        assert ask(http, str(tiny_base_folder), 2).status_code == 200


def test_what_listens_beyond_this_machine_wants_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example listens to everybody."""
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(app, "_listens_at", lambda: str(yaml.safe_load(CONFIG.read_text())["http_options"]["host"]))

    class Replica(app.IngressReplica):  # type: ignore[misc]
        def __del__(self) -> None:  # type: ignore[override]
            """Ray's is for Ray alone."""

    def start() -> None:
        asyncio.run(Replica.__init__(object.__new__(Replica), ServeSettings().model_dump(mode="json"), None, False))

    with pytest.raises(SpecError, match=r"listens on this machine alone, not on 0\.0\.0\.0"):
        start()
    monkeypatch.setenv("CAT_API_KEYS", "a-key")
    start()
