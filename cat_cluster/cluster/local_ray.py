"""A Ray of one command's own on this machine: its folder, its token, and where it listens."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants

from cat_cluster.errors import ClusterError

_SOCKET_PATH = 103 if sys.platform == "darwin" else 107  # bytes that the path of a Unix socket may have


def start_ray(*, loopback: bool = True, otherwise: str = "", **options: Any) -> None:
    """Start Ray here, without a dashboard; every process of it asks for a token, which is made here unless one is set.

    loopback: no port is reached from another machine. otherwise: what a message adds to the reason; options: of
    `ray.init`. Raises ClusterError.
    """
    # Ray asks for a token by default and would write one into the home directory.
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        with _loopback_only() if loopback else nullcontext():
            ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # Ray raises bare ones too, such as for processes that do not start in time
        raise ClusterError(
            f"Ray did not start on this machine: {first_line(error)}; its logs are below ray/session_latest/logs in "
            f"RAY_TMPDIR, TMPDIR or /tmp{otherwise}"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error of Ray's, which may have a page, as the part of a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


def check_ray_folder(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse with ClusterError a temporary folder in which a Ray that starts on this machine could not work.

    Ray takes RAY_TMPDIR, else TMPDIR, else /tmp, and makes its sockets some folders below it.
    """
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in environment or sys.platform == "darwin" else "TMPDIR"
    folder = environment.get(name, "/tmp")
    remedy = "set RAY_TMPDIR to another folder, such as /tmp"
    if not os.path.isabs(folder):
        raise ClusterError(f"{name}={folder}: Ray needs the whole path of a folder; unset {name}, or {remedy}")
    below = f"/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    room = _SOCKET_PATH - len(below)
    if len(os.fsencode(folder)) > room:
        raise ClusterError(
            f"{name}={folder}: is too long for Ray, whose sockets lie below it and have paths of at most "
            f"{_SOCKET_PATH} bytes; set RAY_TMPDIR to a folder of at most {room} bytes, such as /tmp"
        )
    there = Path(folder, "ray")
    while not os.path.lexists(there):
        there = there.parent
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise ClusterError(f"{name}={folder}: Ray cannot write there, because of {there}; {remedy}")


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Have Ray take 127.0.0.1 as this machine's address, as it does by itself on macOS and Windows.

    Its processes then listen there alone; on Linux there is no other way to have that, since `ray.init` replaces a
    loopback address that it is given.
    """
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    variable = os.environ.get(name)
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False  # for processes that start, and for this one
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if variable is None:
            del os.environ[name]
        else:
            os.environ[name] = variable
