"""The disk cache: files of weights as the store has them, bounded, and never a reason for a request to fail."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from cat_cluster.errors import OutputError
from cat_cluster.files import write_whole
from cat_cluster.registry.manifest import sha256

# A file of ours, or what a crash left of one (see write_whole): nothing else in the folder is ever removed.
_OURS = re.compile(r"[0-9a-f]{64}\.safetensors|\.[0-9a-f]{32}")

_log = logging.getLogger(__name__)


class DiskCache:
    """Downloaded files named by their sha256, at most `budget` bytes, the least recently used go first.

    Several processes may share the folder. A folder that cannot be read or written is logged, and nothing is cached.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self._folder = folder
        self._budget = budget

    def read(self, digest: str) -> bytes | None:
        """Return the file of a digest; None if it is not there or damaged, and then it is removed."""
        path = self._path(digest)
        try:
            data = path.read_bytes()
            if sha256(data) == digest:
                os.utime(path)
                return data
            _log.warning("%s is damaged and will be fetched again", path)
            path.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            _log.warning("the disk cache cannot be used: %s", error)
        return None

    def write(self, digest: str, data: bytes) -> int:
        """Keep a file, unless it is larger than the whole cache; return how many others were removed for it."""
        if len(data) > self._budget:
            return 0
        try:
            write_whole(self._path(digest), data)
            return self._shrink()
        except (OutputError, OSError) as error:
            _log.warning("the disk cache cannot be used: %s", error)
            return 0

    def _shrink(self) -> int:
        files = [(entry.stat(), Path(entry.path)) for entry in os.scandir(self._folder) if _OURS.fullmatch(entry.name)]
        excess = sum(stat.st_size for stat, _ in files) - self._budget
        removed = 0
        for stat, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= stat.st_size
            removed += 1
        return removed

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}.safetensors"
