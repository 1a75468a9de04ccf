"""A real Ray head with its dashboard on loopback, apart from any other on the machine, and always stopped."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

TOKEN = "5f" * 32
START_SECONDS = 90


@dataclass(frozen=True)
class RayHead:
    """A running head: the address of its dashboard, its token, and its process."""

    address: str
    token: str
    pid: int

    def drivers(self, run_id: str) -> list[psutil.Process]:
        """The processes that drive the run."""
        found = []
        for process in psutil.Process(self.pid).children(recursive=True):
            with suppress(psutil.Error):
                if {"jobs.train", run_id} <= set(process.cmdline()):
                    found.append(process)
        return found


@contextmanager
def ray_head(cpus: int = 2, **environment: str) -> Iterator[RayHead]:
    """Start a head with a token of its own and stop it, its workers and its jobs at the end."""
    dashboard, agent, client = free_ports(3)
    # Not a folder of pytest's: the paths of Ray's sockets must stay under 108 characters.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    log = folder / "head.log"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--port=0", f"--num-cpus={cpus}", "--object-store-memory=100000000", "--include-dashboard=true"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--min-worker-port=0"]
    command += ["--max-worker-port=0", f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    own = {
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # jobs run `python`
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**inherited, **own, **environment},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{dashboard}"
        _await(address, process, log)
        yield RayHead(address, TOKEN, process.pid)
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _await(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    request = urllib.request.Request(f"{address}/api/version", headers={"Authorization": f"Bearer {TOKEN}"})
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError, urllib.error.URLError), urllib.request.urlopen(request, timeout=5):
            return
        time.sleep(0.2)
    raise RuntimeError(f"the Ray head did not start:\n{log.read_text()[-2000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the head and whatever it started, jobs in sessions of their own too."""
    with suppress(psutil.Error):
        started = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        for one in (process, *started):
            with suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(started, timeout=5)
    process.wait()
