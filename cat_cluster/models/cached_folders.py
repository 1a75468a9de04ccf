"""Folders of bases in the cache: whole or not at all, and made again when files of theirs have gone."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from cat_cluster.errors import OutputError
from cat_cluster.files import write_failure

_LISTING = "files.json"  # in a folder of the cache: the size of each of its files


def is_whole(place: Path) -> bool:
    """Say whether a folder of the cache has all files that `whole_folder` left there, each of its size."""
    try:
        sizes: Mapping[str, int] = json.loads((place / _LISTING).read_text(encoding="utf-8"))
        return all((place / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def whole_folder(place: Path) -> Iterator[Path]:
    """Give an empty folder that becomes `place` once it is whole; another process may have been faster.

    A folder there of which files have gone is replaced. Raises OutputError where the cache cannot be written.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{place.name}-", dir=place.parent) as name:
            folder = Path(name) / "whole"
            folder.mkdir()
            yield folder
            sizes = {str(one.relative_to(folder)): one.stat().st_size for one in folder.rglob("*") if one.is_file()}
            (folder / _LISTING).write_text(json.dumps(sizes), encoding="utf-8")
            if not is_whole(place):
                with contextlib.suppress(FileNotFoundError):
                    place.rename(Path(name) / "before")
            try:
                folder.rename(place)
            except OSError:
                if not is_whole(place):
                    raise
    except (OSError, SafetensorError) as error:
        reason = write_failure(place, error) if isinstance(error, OSError) else f"cannot write {place}: {error}"
        raise OutputError(f"{reason} (bases are kept there; set CAT_CACHE_DIR)") from error
