"""Uploaded photos in the object store: `files/<id>/<sha256>.zip`, and beside it, written last, the record of it.

An id has the name of its owner in it, so that a caller's files are one prefix, and what the upload holds: the same
photos of one caller are one file. `file-uses/<id>/<run>.json` says which runs read it.
"""

from __future__ import annotations

import hashlib
import re
import time
from contextlib import suppress
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, ValidationError

from cat_cluster.data.s3_photos import object_address
from cat_cluster.errors import ConflictError, ObjectNotFoundError, RunError, StoreError
from cat_cluster.runs.run import Run
from cat_cluster.store import ObjectStore

FILE_ID = r"^file-(?:anonymous|[0-9a-f]{8})-[0-9a-f]{24}$"
_RECORD = re.compile(r"files/(?P<id>file-[a-z0-9]+-[0-9a-f]{24})/(?P<ms>[0-9]{13})\.json")


class StoredFile(BaseModel):
    """What is known of an upload. bytes: of what was sent; names of photos, masks and captions as in its archive."""

    model_config = ConfigDict(frozen=True)

    id: str
    owner: str
    filename: str
    bytes: int
    created_at: int
    sha256: str
    photos: tuple[str, ...]
    masks: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()

    @property
    def archive_key(self) -> str:
        """The storage key of its photos."""
        return f"files/{self.id}/{self.sha256}.zip"


@dataclass(frozen=True)
class FilePage:
    """Some of a caller's files, and whether more follow."""

    files: tuple[StoredFile, ...]
    has_more: bool


class StoredFiles:
    """The uploads of a store. Every method raises StoreError, and what a caller may not see is not there for them."""

    def __init__(self, store: ObjectStore, most: int) -> None:
        """most: files that one owner may have."""
        self._store = store
        self._most = most

    def put(self, owner: str, filename: str, size: int, archive: bytes, held: dict[str, tuple[str, ...]]) -> StoredFile:
        """Store an upload, unless its owner has it already; ConflictError where they have too many.

        archive: as `pack_images` makes it; held: the names of its photos, masks and captions.
        """
        sha256 = hashlib.sha256(archive).hexdigest()
        file_id = f"{_prefix(owner)}{hashlib.sha256(f'{owner} {sha256}'.encode()).hexdigest()[:24]}"
        records = self._records(_prefix(owner))
        if file_id in records:
            return self._read(records[file_id])
        if len(records) >= self._most:
            raise ConflictError(
                f"file: {self._most} files are stored for this key, and no more may be; delete one that is not needed "
                "any more"
            )
        now = time.time()
        file = StoredFile(
            id=file_id, owner=owner, filename=filename, bytes=size, created_at=int(now), sha256=sha256, **held
        )
        self._store.put(file.archive_key, archive)
        try:
            self._store.put(f"files/{file_id}/{int(now * 1000):013d}.json", file.model_dump_json().encode())
        except StoreError:
            with suppress(StoreError):
                self._store.delete(file.archive_key)
            raise
        return file

    def find(self, file_id: str) -> StoredFile | None:
        """Return a file, None where there is none."""
        record = self._records(f"files/{file_id}/").get(file_id) if re.fullmatch(FILE_ID, file_id) else None
        with suppress(ObjectNotFoundError):  # deleted just now
            return None if record is None else self._read(record)
        return None

    def page(self, owner: str, limit: int, after: str | None, *, newest_first: bool) -> FilePage | None:
        """Return a page of an owner's files by the time of their upload; None where `after` is none of them.

        Costs a listing of the owner's files, and a read for each of the page.
        """
        found = self._records(_prefix(owner))
        ids = sorted(found, key=lambda file_id: (found[file_id].rpartition("/")[2], file_id), reverse=newest_first)
        if after is not None:
            if after not in found:
                return None
            ids = ids[ids.index(after) + 1 :]
        files = []
        for file_id in ids[:limit]:
            with suppress(ObjectNotFoundError):  # deleted just now
                files.append(self._read(found[file_id]))
        return FilePage(tuple(files), len(ids) > limit)

    def delete(self, file: StoredFile) -> None:
        """Remove a file; ConflictError while a run that has not ended reads it."""
        uses = self._store.list(f"file-uses/{file.id}/")
        for key in uses:
            run = Run(self._store, key.rpartition("/")[2].removesuffix(".json"))
            if not _is_over(run):
                raise ConflictError(f"{file.id} is used by {run.run_id}, which has not ended; stop that first")
        keys = self._store.list(f"files/{file.id}/")
        for key in [*sorted(keys, key=lambda key: not key.endswith(".json")), *uses]:  # the record goes first
            self._store.delete(key)

    def use(self, file: StoredFile, run_id: str) -> None:
        """Note that a run reads a file, so that it stays as long as the run does."""
        self._store.put(f"file-uses/{file.id}/{run_id}.json", b"{}")

    def address(self, file: StoredFile) -> str:
        """Return what `images` takes for a file."""
        return object_address(self._store, file.archive_key)

    def _records(self, prefix: str) -> dict[str, str]:
        """Return the keys of records, by file, of those that begin with the prefix."""
        whole = prefix if prefix.startswith("files/") else f"files/{prefix}"
        found: dict[str, str] = {}
        for key in self._store.list(whole):
            if (match := _RECORD.fullmatch(key)) is not None:
                found.setdefault(match["id"], key)  # of two at the same moment the first
        return found

    def _read(self, key: str) -> StoredFile:
        try:
            return StoredFile.model_validate_json(self._store.get(key))
        except ValidationError:
            raise ObjectNotFoundError(f"{key} in storage {self._store.url} is no record of a file") from None


def _is_over(run: Run) -> bool:
    try:
        progress = run.progress()
    except RunError:
        return True  # it never began, or nobody can go on with it
    return progress.is_over(is_stopping=run.is_stopping(progress))


def _prefix(owner: str) -> str:
    return f"file-{owner}-"
