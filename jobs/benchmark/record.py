"""Result files: what was measured, with the commit, the versions and the hardware it was measured on.

The commit is that of the moment when measuring began: hours later the working tree may be another.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cat_cluster.errors import CatClusterError
from cat_cluster.files import write_whole

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy", "ray", "deepspeed", "boto3", "cat-cluster")
# The rooms whose code decides what a trained and evaluated adapter is.
_TRAINING_CODE = ("spec", "lora", "models", "data", "training", "evaluation", "pipeline")


@dataclass(frozen=True)
class Start:
    """When a measurement began, at which commit, and whether the working tree had uncommitted changes."""

    measured: str
    commit: str
    dirty: bool


def begin(*, allow_dirty: bool = False) -> Start:
    """Return the start of a measurement that begins now.

    Raises CatClusterError when the working tree has uncommitted changes, unless they are allowed.
    """
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    start = Start(datetime.now(UTC).isoformat(timespec="seconds"), commit or "unknown", commit is None or bool(changes))
    if start.dirty and not allow_dirty:
        what = "is no git checkout" if commit is None else "has uncommitted changes"
        raise CatClusterError(
            f"{ROOT} {what}, so no commit would say what was measured: measure in a clean checkout, or with "
            "--allow-dirty, which the result file records"
        )
    return start


def training_digest(settings: Any) -> str:
    """Return 12 hex of the SHA-256 of settings (JSON), of the code that trains and evaluates, and of its libraries."""
    parts = [json.dumps([settings, machine()["versions"]], sort_keys=True).encode()]
    for room in _TRAINING_CODE:
        for path in sorted((ROOT / "cat_cluster" / room).rglob("*.py")):
            parts += [str(path.relative_to(ROOT)).encode(), path.read_bytes()]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:12]


def machine() -> dict[str, Any]:
    """Return what the numbers depend on beside the code: processor, threads, GPU, Python and library versions."""
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version is not None},
    }


def write_result(name: str, result: Mapping[str, Any], start: Start, folder: Path = RESULTS) -> Path:
    """Write `<folder>/<name>.json`, the result below a head of time, commit and machine; return the path."""
    document = {"benchmark": name, **asdict(start), "machine": machine(), **result}
    path = folder / f"{name}.json"
    write_whole(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    return path


def measured_on(result: Mapping[str, Any]) -> str:
    """Return the line below a table that says when, at which commit and on what it was measured."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    dirty = " with uncommitted changes" if result["dirty"] else ""
    hardware = machine["gpu"] or f"{machine['cores']} cores of {machine['processor']}"
    return f"Measured {result['measured'][:10]} at {result['commit'][:12]}{dirty}, {hardware}; {versions}."


def read_result(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """Return a result file, or None where it was not measured yet."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
