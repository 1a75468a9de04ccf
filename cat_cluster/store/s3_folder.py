"""Copying what a user keeps under an s3:// prefix into a local folder, whatever its objects are called."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from cat_cluster.errors import StoreError
from cat_cluster.files import write_failure
from cat_cluster.store.s3 import RETRY_SECONDS, SHA256, S3Bucket, StoredKey, split_url
from cat_cluster.store.s3_errors import damaged

_FILES_AT_ONCE = 8
_PIECE = 2**20  # bytes of an object that are in memory at once


class S3Folder:
    """The objects directly or deeper under an s3:// prefix, as files with relative names; it only reads."""

    def __init__(
        self, url: str, *, retry_seconds: float = RETRY_SECONDS, on_retry: Callable[[str], None] | None = None
    ) -> None:
        name, prefix = split_url(url)
        self.url = f"s3://{name}/{prefix}".rstrip("/")
        self._bucket = S3Bucket(name, self.url, retry_seconds=retry_seconds, on_retry=on_retry)
        self._base = f"{prefix}/" if prefix else ""

    def files(
        self, wanted: Callable[[str], bool] = lambda name: True, *, deep: bool = True, may_be_none: bool = False
    ) -> dict[str, StoredKey]:
        """Return the objects whose relative name is wanted, by that name, sorted; not `deep`: only the direct ones.

        Raises StoreError when there are none and there must be, or when a wanted name cannot be a file below a folder.
        """
        found = {}
        for entry in self._bucket.keys(self._base, deep=deep):
            name = entry.key.removeprefix(self._base)
            # Consoles mark a folder with an empty object whose name ends in a slash.
            if name and not name.endswith("/") and wanted(name):
                found[_checked(name, self.url)] = entry
        if not found and not may_be_none:
            raise StoreError(f"{self.url} holds nothing that could be used; check the bucket and the prefix")
        return dict(sorted(found.items()))

    def folders(self) -> list[str]:
        """Return the names of the folders directly below the prefix, sorted."""
        found = (key.removeprefix(self._base).rstrip("/") for key in self._bucket.folders(self._base))
        return sorted(name for name in found if name)

    def names_below(self, folder: str) -> Iterator[str]:
        """Yield the name of each object at any depth of a folder below the prefix, relative to that folder."""
        start = f"{self._base}{folder}/"
        names = (entry.key.removeprefix(start) for entry in self._bucket.keys(start))
        return (name for name in names if name and not name.endswith("/"))

    def copy(self, files: Mapping[str, StoredKey], folder: Path) -> list[Path]:
        """Write objects that `files()` returned into a folder, several at a time, and return the files' paths.

        Raises StoreError when an object has changed since it was listed, or the folder cannot be written.
        """

        def fetch(name: str) -> Path:
            path = folder / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._download(files[name], path)
            except OSError as error:
                raise StoreError(write_failure(path, error)) from error
            return path

        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            try:
                return list(pool.map(fetch, files))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def read_part(self, entry: StoredKey, name: str, start: int, length: int) -> bytes:
        """Return `length` bytes of an object from `start` on; fewer where it ends before."""

        def fetch(client: Any) -> bytes:
            wanted = f"bytes={start}-{start + length - 1}"
            response = client.get_object(Bucket=self._bucket.name, Key=entry.key, Range=wanted)
            with closing(response["Body"]) as body:
                data: bytes = body.read()
            self._check_unchanged(entry, response)
            return data

        return self._bucket.run("read", name, fetch)

    def read(self, name: str) -> bytes:
        """Return the bytes of one object below the prefix; ObjectNotFoundError if there is none."""
        return self._bucket.read(f"{self._base}{name}", name)[0]

    def _download(self, entry: StoredKey, path: Path) -> None:
        """Write an object to a file, a piece at a time; raises StoreError, and OSError of the file."""

        def fetch(client: Any) -> None:
            response = client.get_object(Bucket=self._bucket.name, Key=entry.key)
            self._check_unchanged(entry, response)
            digest = hashlib.sha256()
            with closing(response["Body"]) as body, path.open("wb") as file:
                for piece in body.iter_chunks(_PIECE):
                    digest.update(piece)
                    file.write(piece)
            expected = response["Metadata"].get(SHA256)
            if expected is not None and digest.hexdigest() != expected:
                said = f"its sha256 is not {expected[:12]}..., which was stored with it"
                raise damaged(entry.key, self.url, said)

        self._bucket.run("read", entry.key, fetch)

    def _check_unchanged(self, entry: StoredKey, response: Mapping[str, Any]) -> None:
        if response["ETag"] != entry.etag:
            raise StoreError(f"{entry.key} in {self.url} was changed while it was read; try again")


def _checked(name: str, url: str) -> str:
    if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name or "\0" in name:
        raise StoreError(
            f"the object {name!r} in {url} cannot be a file below a folder; rename it without '..', empty names and "
            "backslashes"
        )
    return name
