"""Writing a file so that a reader finds the old one or the new one, never a part."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from cat_cluster.errors import OutputError


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to a file, whole or not at all, and make the folders above it.

    Raises OutputError, naming the file, when the place cannot be written or its disk is full.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; free space or choose another place") from error
