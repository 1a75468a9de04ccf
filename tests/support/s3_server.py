"""A real S3 server on loopback for tests and for trying things out: OpenStack Swift with its s3api.

It has a virtual environment of its own (CAT_S3_SERVER_DIR, by default in ~/.cache/cat-cluster/s3-server), which the
first start makes. `python -m tests.support.s3_server` runs it until Ctrl-C and prints what a shell needs to use it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

NAMES = ("object", "container", "account", "proxy")
ACCESS_KEY, SECRET_KEY = "test:tester", "testing"
REGION = "us-east-1"
START_SECONDS = 30
_CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints-s3-server.txt"
_BUCKET = "cat-storage"  # what the command line makes for a person

# A server ends with its parent, however that ends: it holds the reading end of a pipe that only the parent can close.
_RUN = """
import os, runpy, sys, threading
def end_with_parent(descriptor=int(sys.argv.pop(1)), read=os.read, leave=os._exit):
    read(descriptor, 1)
    leave(1)
threading.Thread(target=end_with_parent, daemon=True).start()
script = sys.argv.pop(1)
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""

_MAKE_RINGS = """
import sys
from swift.common.ring import RingBuilder
folder, *ports = sys.argv[1:]
for name, port in zip(("object", "container", "account"), ports):
    builder = RingBuilder(4, 1, 0)
    builder.add_dev({"region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port), "device": "d1", "weight": 1,
                     "replication_ip": "127.0.0.1", "replication_port": int(port), "meta": ""})
    builder.rebalance()
    builder.get_ring().save(f"{folder}/{name}.ring.gz")
"""

_SWIFT_CONF = """
[swift-hash]
swift_hash_path_prefix = cat
swift_hash_path_suffix = cluster
[storage-policy:0]
name = only
default = yes
"""

_STORAGE_CONF = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
disable_fallocate = true
user = {user}
recon_cache_path = {folder}
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""

_PROXY_CONF = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
swift_dir = {folder}
user = {user}
[pipeline:main]
pipeline = catch_errors gatekeeper listing_formats bulk s3api tempauth copy slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
allow_account_management = true
account_autocreate = true
# A storage server that was away is asked again at once: an outage here lasts as long as a test says.
error_suppression_interval = 0.1
error_suppression_limit = 1000000
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {secret} .admin
[filter:s3api]
use = egg:swift#s3api
location = {region}
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""


class ServerUnavailableError(Exception):
    """The server cannot be installed or started here, and why."""


class S3Server:
    """Four Swift processes and their data in a temporary folder: proxy, account, container, object."""

    def __init__(self) -> None:
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ports: dict[str, int] = {}
        self._folder: Path | None = None
        self._alive: tuple[int, int] | None = None

    def __enter__(self) -> S3Server:
        if not self._processes:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        """Address of the S3 service."""
        return f"http://127.0.0.1:{self._ports['proxy']}"

    @property
    def environment(self) -> dict[str, str]:
        """The standard variables with which every AWS client finds this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }

    @property
    def data_folder(self) -> Path:
        """Where the object server keeps its files."""
        assert self._folder is not None
        return self._folder / "devices"

    def url(self, bucket: str) -> str:
        """Address of a bucket, as --storage takes it."""
        return f"s3://{bucket}"

    def client(self) -> Any:
        """A boto3 client of this server, whatever the environment says."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=Config(s3={"addressing_style": "path"}),
        )

    def create_bucket(self, name: str) -> str:
        """Make a bucket and return its address."""
        self.client().create_bucket(Bucket=name)
        return self.url(name)

    def start(self) -> None:
        """Install the server where that was not done, start its processes and wait until it answers."""
        python = install()
        self._folder = folder = _folder_with_attributes()
        self._alive = os.pipe()
        self._ports = dict(zip(NAMES, _free_ports(len(NAMES)), strict=True))
        try:
            (folder / "devices" / "d1").mkdir(parents=True)
            (folder / "swift.conf").write_text(_SWIFT_CONF)
            for name, port in self._ports.items():
                text = _PROXY_CONF if name == "proxy" else _STORAGE_CONF
                values = {"name": name, "port": port, "folder": folder, "secret": SECRET_KEY, "region": REGION}
                (folder / f"{name}.conf").write_text(text.format(user=_user_name(), **values))
            ports = [str(self._ports[name]) for name in NAMES[:3]]
            _run([python, "-c", _MAKE_RINGS, folder, *ports], "make the rings")
            for name in NAMES:
                self._launch(name)
            for name in NAMES:
                self._wait(name)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every process and remove the data."""
        for name in list(self._processes):
            self.kill(name)
        if self._alive is not None:
            for descriptor in self._alive:
                os.close(descriptor)
            self._alive = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def kill(self, name: str) -> None:
        """End one process with SIGKILL, as a crash does; its data stays."""
        process = self._processes.pop(name, None)
        if process is not None:
            process.kill()
            process.wait()

    def restart(self, name: str) -> None:
        """Start one process again after kill(), and wait until it listens."""
        self.kill(name)
        self._launch(name)
        self._wait(name)

    def log(self, name: str) -> str:
        """What one process has said so far."""
        assert self._folder is not None
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def _launch(self, name: str) -> None:
        assert self._folder is not None
        assert self._alive is not None
        python = install()
        reading = self._alive[0]
        with (self._folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [
                    *(python, "-c", _RUN, str(reading)),
                    *(python.with_name(f"swift-{name}-server"), self._folder / f"{name}.conf", "-v"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(reading,),
                # Ctrl-C in a terminal ends the parent, and it ends these in order.
                start_new_session=True,
            )

    def _wait(self, name: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            code = self._processes[name].poll()
            if code is not None:
                raise ServerUnavailableError(f"swift-{name}-server ended with code {code}:\n{self.log(name)[-2000:]}")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self._ports[name])) == 0:
                    return
            time.sleep(0.02)
        raise ServerUnavailableError(f"swift-{name}-server did not listen within {START_SECONDS} s:\n{self.log(name)}")


def install() -> Path:
    """Return the Python of the server's virtual environment, making that once; safe between processes."""
    home = Path(os.environ.get("CAT_S3_SERVER_DIR") or "~/.cache/cat-cluster/s3-server").expanduser()
    pins = hashlib.sha256(_CONSTRAINTS.read_bytes()).hexdigest()[:12]
    folder = home / f"venv-{pins}-py{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / "bin" / "python"
    if (folder / "installed").is_file():
        return python
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "installed").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            _run([sys.executable, "-m", "venv", folder], "make its virtual environment")
            pip = [python, "-m", "pip", "--disable-pip-version-check", "-q", "install", "-c", _CONSTRAINTS]
            _run([*pip, "swift"], "install OpenStack Swift")
            (folder / "installed").touch()
    return python


def _run(command: list[Any], purpose: str) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise ServerUnavailableError(f"the S3 server cannot {purpose}: {(done.stderr or done.stdout).strip()[-1500:]}")


def _folder_with_attributes() -> Path:
    """Return a new folder on a file system with user attributes, in which Swift keeps an object's metadata."""
    reasons = []
    for parent in ("/dev/shm", tempfile.gettempdir()):
        if not os.access(parent, os.W_OK):
            continue
        folder = Path(tempfile.mkdtemp(prefix="cat-s3-", dir=parent))
        try:
            os.setxattr(folder, "user.cat", b"1")
            return folder
        except OSError as error:
            reasons.append(f"{parent}: {error.strerror}")
            folder.rmdir()
    raise ServerUnavailableError(f"no temporary folder holds user attributes ({'; '.join(reasons)}): set TMPDIR")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _user_name() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def serve_until_interrupted(say: Callable[[str], None]) -> None:
    """Run a server with one bucket and say how to use it, until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    say("Starting OpenStack Swift as an S3 server (the first time it is installed, about half a minute)")
    with S3Server() as server:
        url = server.create_bucket(_BUCKET)
        say("In another shell:\n")
        for name, value in server.environment.items():
            say(f"    export {name}={value}")
        say(f"    .venv/bin/cat-cluster train jobs/specs/single.yaml --storage {url}/first\n")
        say("Ctrl-C ends the server and removes its data.")
        try:
            signal.pause()
        except KeyboardInterrupt:
            say("Ended.")


def main() -> int:
    """Entry point of `make s3`."""
    try:
        serve_until_interrupted(lambda line: print(line, flush=True))
    except ServerUnavailableError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
