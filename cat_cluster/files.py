"""Writing a file so that a reader finds the old one or the new one, never a part."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path

from cat_cluster.errors import OutputError


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to a file, whole or not at all, and make the folders above it.

    Raises OutputError, naming the file, when the place cannot be written or its disk is full.
    """
    if not path.name or path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; name a file in it")
    temporary = path.with_name(f".{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(write_failure(path, error)) from error


def write_failure(path: Path, error: OSError) -> str:
    """Say that a file or folder could not be written, what is in the way, and what to do about it."""
    return f"cannot write {path}: {_reason(path, error)}"


def _reason(path: Path, error: OSError) -> str:
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        file = next((str(place) for place in path.parents if place.exists() and not place.is_dir()), "part of its path")
        return f"{file} is a file, not a folder; choose another place"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.strerror}; free space or choose another place"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{error.strerror}; choose a place that this user may write to"
    return f"{error.strerror}; choose another place"
