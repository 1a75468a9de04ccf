"""Joining a Ray cluster, or starting one on this machine, and refusing early a job that it is too small for."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from cat_cluster.errors import ClusterError, SpecError
from cat_cluster.spec.job import JobSpec


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
    def workers(self) -> int:
        """How many workers fit at once."""
        return int(self.gpus if self.on_gpus else self.cpus)


@contextmanager
def ray_connection(address: str | None = None) -> Iterator[ClusterSize]:
    """Join the cluster at `address` or of RAY_ADDRESS, else start Ray on this machine for the time of the block.

    A Ray that this process has joined already is used and stays. Raises ClusterError when none answers.
    """
    joined = ray.is_initialized()
    if not joined:
        address = address or os.environ.get("RAY_ADDRESS")
        try:
            _join(address)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ClusterError(
                f"no Ray cluster at {address}: {reason}; check the address (host:port of the head, not of its "
                "dashboard), and RAY_AUTH_MODE=token with RAY_AUTH_TOKEN if it asks for a token; or leave it out to "
                "start Ray here"
            ) from error
    try:
        resources = ray.cluster_resources()
        yield ClusterSize(resources.get("CPU", 0.0), resources.get("GPU", 0.0))
    finally:
        if not joined:
            ray.shutdown()


def _join(address: str | None) -> None:
    quiet = {"logging_level": logging.ERROR, "configure_logging": True}
    if address is not None:
        with _one_attempt():
            ray.init(address=address, **quiet)
        return
    # Ray asks for a token by default and would write one into the home directory: this one is our process's alone.
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(address="local", include_dashboard=False, log_to_driver=False, **quiet)


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


def check_cluster(job: JobSpec, storage: str, size: ClusterSize) -> None:
    """Raise SpecError if the cluster is too small for the spec, or has machines that cannot see a storage folder."""
    least = least_workers(job)
    if least > size.workers:
        kind = "GPUs" if size.on_gpus else "CPUs"
        raise SpecError(
            f"cluster.workers: {least} workers need as many {kind}, and this Ray cluster has {size.workers}: ask for "
            f"at most {size.workers}, or let the cluster grow first"
        )
    if storage.startswith("file:"):
        here = socket.gethostname()
        others = sorted({node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]} - {here})
        if others:
            raise SpecError(
                f"storage: {storage} is a folder of {here}, and the cluster also has {', '.join(others)}: name an "
                "s3:// address that every machine can reach"
            )


def least_workers(job: JobSpec) -> int:
    """Return the fewest workers that a pack of the job may have."""
    workers = job.cluster.workers
    return workers if isinstance(workers, int) else workers[0]
