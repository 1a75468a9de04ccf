"""Serving on this machine: Ray and the application started, watched and stopped by one command."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable

import ray
from ray import serve as ray_serve
from ray.serve.config import HTTPOptions

from cat_cluster.errors import ClusterError
from serve.access import Access, check_bind
from serve.app import Deployment, build
from serve.settings import ServeSettings


def serve_here(
    settings: ServeSettings, host: str, port: int, *, on_ready: Callable[[str], None], engines: int = 1
) -> None:
    """Serve until interrupted; on_ready receives the address once requests are answered.

    Raises SpecError when it would listen beyond this machine without API keys, ClusterError when the port is taken
    or the engine does not start.
    """
    check_bind(host, Access.from_environment(settings))
    _check_port(host, port)
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # for this process alone
    deployment = Deployment(settings=settings, min_engines=engines, max_engines=engines, engine_cpus=0)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        ray_serve.start(http_options=HTTPOptions(host=host, port=port))
        try:
            ray_serve.run(build(deployment.model_dump(mode="json")), name="cat-cluster", route_prefix="/")
        except RuntimeError as error:
            raise ClusterError(f"the service did not start: {error}") from error
        on_ready(f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}")
        while True:
            time.sleep(3600)
    finally:
        ray_serve.shutdown()
        ray.shutdown()


def free_port(host: str) -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _check_port(host: str, port: int) -> None:
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ClusterError(f"port {port} of {host} cannot be used ({error.strerror}): choose another --port") from error
