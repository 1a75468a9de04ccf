"""Bases that lie in S3: a diffusers folder, or a checkpoint in one file, brought into the local cache once."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from cat_cluster.errors import BaseModelError
from cat_cluster.models.base_files import CONFIG_PATTERNS, VARIANTS, check_complete, weight_patterns
from cat_cluster.models.cached_folders import is_whole, whole_folder
from cat_cluster.models.single_file import check_head
from cat_cluster.settings import load_settings

if TYPE_CHECKING:
    from cat_cluster.store.s3 import StoredKey
    from cat_cluster.store.s3_folder import S3Folder

S3_SCHEME = "s3://"
_MOST_HEAD = 64 * 2**20  # bytes of the head of a checkpoint; those of SDXL take 0.4 MB


def fetch_s3_base(address: str) -> Path:
    """Return the folder, or the file, of a base under an s3:// address: the copy in the cache, else fetched.

    The copy is known by the names, ETags and sizes there. Raises BaseModelError, StoreError, OutputError.
    """
    folder, files = _listed(address)
    listing = json.dumps([folder.url, *((name, one.etag, one.size) for name, one in sorted(files.items()))])
    place = load_settings().cache_dir / "bases" / f"s3-{hashlib.sha256(listing.encode()).hexdigest()[:32]}"
    if not is_whole(place):
        _check(address, folder, files)
        with whole_folder(place) as fresh:
            folder.copy(files, fresh)
    return place / _name(address) if _is_file(address) else check_complete(place)


def check_s3_base(address: str) -> None:
    """Refuse a base by its configs and the names of its files, or by the head of its file; no weights are fetched.

    Raises BaseModelError, StoreError.
    """
    _check(address, *_listed(address))


def _check(address: str, folder: S3Folder, files: Mapping[str, StoredKey]) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder.copy({name: one for name, one in files.items() if not name.endswith(".safetensors")}, Path(place))
        if not _is_file(address):
            for name in files:
                Path(place, name).parent.mkdir(parents=True, exist_ok=True)
                Path(place, name).touch()  # whether all weights are there is told by their names
            try:
                check_complete(Path(place))
            except BaseModelError as error:
                raise BaseModelError(str(error).replace(place, address.rstrip("/"))) from error
            return
        name, entry = _name(address), files[_name(address)]
        length = int.from_bytes(folder.read_part(entry, name, 0, 8), "little")
        if not 2 <= length <= min(_MOST_HEAD, entry.size):
            raise BaseModelError(f"{address} is damaged (no head of safetensors); upload it again.")
        check_head(address, folder.read_part(entry, name, 8, length), Path(place, name).with_suffix(".yaml"))


def _listed(address: str) -> tuple[S3Folder, Mapping[str, StoredKey]]:
    """Return the folder of an address, and the objects that are read of it, by their names."""
    from cat_cluster.store.s3_folder import S3Folder  # folders of this machine need no boto3

    address = address.rstrip("/")
    if _is_file(address):
        name, folder = _name(address), S3Folder(address.rpartition("/")[0])
        files = folder.files(lambda one: one in (name, str(Path(name).with_suffix(".yaml"))), deep=False)
        if name not in files:
            raise BaseModelError(f"{address} is not there; look at the names below {folder.url}.")
        return folder, files
    folder = S3Folder(address)
    found = folder.files(lambda one: one.count("/") < 2)
    files = {name: entry for name, entry in found.items() if _matches(name, CONFIG_PATTERNS)}
    weights: dict[str, list[str]] = {}
    for infix in reversed(VARIANTS):  # of each part the first variant that is there
        names = [name for name in found if _matches(name, weight_patterns(infix))]
        weights |= {part: list(of_part) for part, of_part in groupby(names, lambda name: name.partition("/")[0])}
    return folder, files | {name: found[name] for of_part in weights.values() for name in of_part}


def _is_file(address: str) -> bool:
    return address.rstrip("/").endswith(".safetensors")


def _name(address: str) -> str:
    return address.rstrip("/").rpartition("/")[2]


def _matches(name: str, patterns: tuple[str, ...] | list[str]) -> bool:
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)
