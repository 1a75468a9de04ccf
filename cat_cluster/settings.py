"""Settings of a machine, not of a job: read from the environment, prefix CAT_; and the folder that Ray takes there."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from cat_cluster.errors import ClusterError, SpecError

_SOCKET_PATH = 103 if sys.platform == "darwin" else 107  # bytes that the path of a Unix socket may have


class Settings(BaseSettings):
    """Where adapters and caches are kept and which device computes; each field is the variable CAT_<NAME>."""

    model_config = SettingsConfigDict(env_prefix="CAT_", env_ignore_empty=True, frozen=True)

    storage: str = Field(default="./cat-storage", description="Folder or URL of the adapter registry.")
    cache_dir: Annotated[Path, AfterValidator(Path.expanduser)] = Field(
        default=Path("~/.cache/cat-cluster"),
        validate_default=True,
        description="Folder of caches; it may be deleted at any time.",
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$",
        description="Device that computes: cpu, cuda, cuda:1, mps, or auto: a GPU where there is one.",
    )


def load_settings() -> Settings:
    """Read the settings from the environment; raises SpecError naming the variable that has a bad value."""
    try:
        return Settings()
    except ValidationError as error:
        lines = [
            f"CAT_{str(detail['loc'][0]).upper()}={detail['input']}: {detail['msg']}; "
            f"{Settings.model_fields[str(detail['loc'][0])].description}"
            for detail in error.errors()
        ]
        raise SpecError("\n".join(lines)) from None


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
