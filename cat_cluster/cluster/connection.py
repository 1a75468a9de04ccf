"""Joining a Ray cluster, or starting one on this machine, and refusing early a job that it is too small for."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import ray

from cat_cluster.cluster.local_ray import check_ray_folder, first_line, start_ray
from cat_cluster.errors import ClusterError, SpecError
from cat_cluster.spec.sections import ClusterSpec

REPLACED_SECONDS = 180.0  # in which another machine or pod takes the place of a lost one
_POLL_SECONDS = 1.0
_IDLE = 4  # common.proto, NodeDeathInfo.Reason: the autoscaler had no use for it


@dataclass(frozen=True)
class ClusterSize:
    """The CPUs and GPUs of a whole Ray cluster, and what one worker of a pack takes of them."""

    cpus: float
    gpus: float

    @property
    def on_gpus(self) -> bool:
        """Workers take a GPU each where the cluster has any, else a CPU each."""
        return self.gpus >= 1

    @property
    def kind(self) -> str:
        """What a worker takes one of, in the plural."""
        return "GPUs" if self.on_gpus else "CPUs"

    @property
    def workers(self) -> int:
        """How many workers fit at once."""
        return int(self.gpus if self.on_gpus else self.cpus)


def cluster_address(given: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the address of the cluster to join, `given` or else RAY_ADDRESS; None to start Ray on this machine.

    Nothing is contacted. Raises ClusterError for an address that is no cluster's, and for a machine without a folder
    that Ray can use.
    """
    name, address = ("--address ", given) if given else ("RAY_ADDRESS=", environment.get("RAY_ADDRESS", ""))
    address = address.strip()
    here = f"{'leave it out' if given else 'unset RAY_ADDRESS'} to start Ray on this machine"
    if address in ("", "local"):
        check_ray_folder(environment)
        return None
    scheme = address.partition("://")[0].lower() if "://" in address else ""
    if scheme in ("http", "https"):
        raise ClusterError(
            f"{name}{address}: is the address of a dashboard, which takes jobs: send yours with `cat-cluster submit "
            f"SPEC --address {address}`, or {here}"
        )
    if scheme == "ray":
        raise ClusterError(
            f"{name}{address}: through Ray's client no training can be driven: send the job with `cat-cluster submit` "
            f"to the cluster's dashboard, or {here}"
        )
    if address != "auto" and not _is_host_and_port(address):
        raise ClusterError(
            f"{name}{address}: is not the address of a Ray cluster: write host:port of its head, such as "
            f"10.0.0.5:6379, or {here}"
        )
    return address


def _is_host_and_port(address: str) -> bool:
    try:
        parts = urlsplit(f"//{address}")
        port = parts.port
    except ValueError:
        return False
    is_whole = parts.netloc == address and parts.username is None and address.isprintable() and " " not in address
    return is_whole and bool(parts.hostname) and bool(port)


@contextmanager
def ray_connection(address: str | None = None) -> Iterator[ClusterSize]:
    """Join the cluster at `address` (see cluster_address), else start Ray on this machine for the time of the block.

    A Ray that this process has joined already is used and stays. Raises ClusterError when none answers or starts.
    """
    joined = ray.is_initialized()
    if not joined and address is None:
        start_ray(log_to_driver=False, otherwise="; `cat-cluster train --in-process` trains without Ray")
    elif not joined:
        _join(str(address))
    try:
        yield _size()
    finally:
        if not joined:
            ray.shutdown()


def _size() -> ClusterSize:
    resources = ray.cluster_resources()
    return ClusterSize(resources.get("CPU", 0.0), resources.get("GPU", 0.0))


def _join(address: str) -> None:
    try:
        with _one_attempt():
            ray.init(address=address, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        if address == "auto":
            raise ClusterError(
                "no Ray cluster runs on this machine, and auto joins the one that does: start one with `ray start "
                "--head`, or unset RAY_ADDRESS and leave --address out to start Ray for this command"
            ) from error
        raise ClusterError(
            f"no Ray cluster at {address}: {first_line(error)}; check the address (host:port of the head, not of its "
            "dashboard), and RAY_AUTH_MODE=token with RAY_AUTH_TOKEN if it asks for a token; or leave it out to "
            "start Ray here"
        ) from error


@contextmanager
def _one_attempt() -> Iterator[None]:
    """Let Ray try an address for 40 seconds once, not 20 times, so that a mistyped one is refused soon."""
    name = "RAY_gcs_server_port_wait_time_s"  # read as a number of attempts where a process joins
    before = os.environ.get(name)
    os.environ.setdefault(name, "1")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def await_workers(cluster: ClusterSpec, size: ClusterSize, say: Callable[[str], None]) -> ClusterSize:
    """Return the size of the cluster, first waiting for another machine where one was lost and a pack does not fit.

    The wait ends when it fits, after REPLACED_SECONDS at most. say: is told what is waited for.
    """
    least = least_workers(cluster)
    if least <= size.workers:
        return size
    lost = sum(not node["Alive"] and node.get("DeathReason") != _IDLE for node in ray.nodes())
    if not lost:
        return size
    say(
        f"the cluster has lost {'a machine or pod' if lost == 1 else f'{lost} machines or pods'}, and has too few "
        f"{size.kind} for {least} workers: waiting {REPLACED_SECONDS:.0f} s for another"
    )
    until = time.monotonic() + REPLACED_SECONDS
    while least > size.workers and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
        size = _size()
    return size


def check_size(cluster: ClusterSpec, storage: str, size: ClusterSize) -> None:
    """Raise SpecError if a cluster is too small for a pack, or has machines that cannot see a storage folder."""
    least = least_workers(cluster)
    if least > size.workers:
        fewer = f"ask for at most {size.workers}, or " if size.workers else ""
        raise SpecError(
            f"cluster.workers: {least} workers need as many {size.kind}, and this Ray cluster has {size.workers}: "
            f"{fewer}let the cluster grow first"
        )
    if storage.startswith("file:"):
        here = socket.gethostname()
        others = sorted({node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]} - {here})
        if others:
            raise SpecError(
                f"storage: {storage} is a folder of {here}, and the cluster also has {', '.join(others)}: name an "
                "s3:// address that every machine can reach"
            )


def least_workers(cluster: ClusterSpec) -> int:
    """Return the fewest workers that a pack may have."""
    workers = cluster.workers
    return workers if isinstance(workers, int) else workers[0]
