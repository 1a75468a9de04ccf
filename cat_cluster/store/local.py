"""An object store in a folder: atomic, write-once where asked, and safe to share between processes."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from cat_cluster.errors import (
    ObjectExistsError,
    ObjectNotFoundError,
    ObjectUnreadableError,
    StoreError,
    StoreRefusedError,
)
from cat_cluster.store.protocol import Entry, KeyList, check_key, check_prefix

TEMPORARY_PREFIX = ".tmp-"  # no key begins a name with a dot, so a file left by a crash is never an object

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_RIGHT = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_OBJECT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class LocalStore:
    """Objects as plain files under one folder; the first put makes the folder.

    An object is written to a hidden file beside its place, synced to disk, and then renamed (or, write-once,
    hard-linked) into place, so readers and crashes never see a part of it.

    A folder that was never written is empty. One that held folders and has none any more is not: the store never
    removes a folder, so what was mounted there is away, and every method says so instead of finding nothing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser().resolve()
        self._held_objects = False
        if self.folder.is_file():
            raise StoreError(f"storage {self.folder} is a file: give a folder, for example with --storage")
        with suppress(StoreError):  # it is not needed yet
            self._check_folder()

    @property
    def url(self) -> str:
        """The folder as a file:// address."""
        return self.folder.as_uri()

    def get(self, key: str) -> bytes:
        """Return the object's bytes; ObjectNotFoundError if there is none."""
        path = self._path(key)
        with self._explained("read", key):
            data = path.read_bytes()
        self._found(key)
        return data

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        """Store an object, replacing an older one; with `if_absent`, ObjectExistsError when the key is taken."""
        path = self._path(key)
        temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
        if self._held_objects:
            self._check_folder()  # what is written now would be hidden once the folder is mounted again
        with self._explained("write", key, size=len(data)):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                _write_synced(temporary, data)
                if if_absent:
                    self._link(temporary, path, key)
                else:
                    os.replace(temporary, path)
            finally:
                with suppress(FileNotFoundError):
                    temporary.unlink()
            _sync_folder(path.parent)
        self._found(key)

    def exists(self, key: str) -> bool:
        """Say whether an object is stored under the key."""
        path = self._path(key)
        with suppress(ObjectNotFoundError), self._explained("read", key):
            if stat.S_ISREG(path.stat().st_mode):
                self._found(key)
                return True
        return False

    def list(self, prefix: str) -> KeyList:
        """Return, sorted, every key that begins with the prefix ("" for all)."""
        return [entry.key for entry in self.entries(prefix)]

    def entries(self, prefix: str, *, after: str = "") -> Iterator[Entry]:
        """Yield, in the order of their keys, the objects whose key begins with the prefix and sorts behind `after`."""
        check_prefix(prefix)
        # Only the deepest folder that the prefix names whole has to be walked.
        parent = prefix.rpartition("/")[0]
        start = self._path(parent) if parent else self.folder
        return self._entries(start, f"{parent}/" if parent else "", prefix, after)

    def delete(self, key: str) -> None:
        """Remove an object; a key without one is no error."""
        path = self._path(key)
        with suppress(ObjectNotFoundError), self._explained("delete", key):
            path.unlink()

    def size(self, key: str) -> int:
        """Return the object's size in bytes; ObjectNotFoundError if there is none."""
        path = self._path(key)
        with self._explained("read", key):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            return path.stat().st_size

    def check_access(self) -> None:
        """Make the folder, write and remove a probe; raises StoreError when the folder cannot be used."""
        key = f"access-probe-{uuid.uuid4().hex}"
        self.put(key, b"1", if_absent=True)
        self.delete(key)

    def _path(self, key: str) -> Path:
        path = self.folder / check_key(key)
        # check_key leaves one way out of the folder: a symbolic link that somebody put into it.
        try:
            is_inside = path.resolve().is_relative_to(self.folder)
        except (OSError, RuntimeError):  # links in a circle
            is_inside = False
        if not is_inside:
            raise ObjectUnreadableError(
                f"{key} leads out of storage {self.folder} or in a circle: put what it should name in the place of the "
                "symbolic link on its way"
            )
        return path

    def _found(self, key: str) -> None:
        """Remember that the folder holds folders."""
        if "/" in key:
            self._held_objects = True

    def _check_folder(self) -> None:
        """Raise StoreError if the storage folder cannot be read, or is missing or empty though it held objects."""
        held_objects = self._held_objects  # before looking: another thread may write the first one meanwhile
        try:
            with os.scandir(self.folder) as entries:
                holds_folders = any(entry.is_dir() for entry in entries)
        except FileNotFoundError:
            holds_folders = False
        except OSError as error:
            raise StoreError(
                f"storage {self.folder} cannot be read: {error.strerror}; see that it is mounted and that this user "
                "may read it"
            ) from error
        if held_objects and not holds_folders:
            raise StoreError(
                f"storage {self.folder} held objects and is now {'empty' if self.folder.is_dir() else 'missing'}: see "
                "that it is mounted and in its place; if it was emptied on purpose, start this program again"
            )
        if holds_folders:
            self._held_objects = True

    def _entries(self, start: Path, base: str, prefix: str, after: str) -> Iterator[Entry]:
        is_empty = True
        for entry in _walk(start, base, prefix, after):
            is_empty = False
            yield entry
        if is_empty:
            self._check_folder()

    def _link(self, temporary: Path, path: Path, key: str) -> None:
        try:
            os.link(temporary, path)
        except FileExistsError as error:
            raise ObjectExistsError(f"{key} is already in storage {self.folder}, and it is write-once") from error
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            raise StoreError(
                f"cannot store {key}: the file system of {self.folder} has no hard links, which write-once objects "
                "need; choose a storage folder on another file system (ext4, xfs, apfs, nfs)"
            ) from error

    def _explained(self, action: str, key: str, *, size: int = 0) -> _Explained:
        return _Explained(self, action, key, size)

    def _explanation(self, error: OSError, action: str, key: str, size: int) -> StoreError:
        if action != "write":
            self._check_folder()
            if error.errno in _NO_OBJECT:
                return ObjectNotFoundError(f"no object {key} in storage {self.folder}")
        reason = error.strerror or str(error)
        remedy = f"check the permissions of {self.folder} or choose another storage folder"
        if error.errno in _NO_SPACE:
            remedy = (
                f"free {max(size / 1e6, 0.1):.1f} MB or more on the disk of {self.folder} (or raise the quota or "
                "file size limit), or choose another storage folder; nothing of this object was stored"
            )
        kind: type[StoreError] = ObjectUnreadableError if action == "read" else StoreError
        if action == "write" and error.errno in _NO_RIGHT:
            kind = StoreRefusedError
        return kind(f"cannot {action} {key} in storage {self.folder}: {reason}; {remedy}")


@dataclass(frozen=True)
class _Explained:
    """Turns an OSError into the StoreError that names the key, the folder and the remedy.

    No generator: from Python 3.12 on, one that raises leaves a cycle of its frame and the error, for each miss.
    """

    store: LocalStore
    action: str
    key: str
    size: int

    def __enter__(self) -> None:
        """Nothing is held."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, OSError):
            raise self.store._explanation(error, self.action, self.key, self.size) from error


def _walk(folder: str | Path, base: str, prefix: str, after: str) -> Iterator[Entry]:
    """Yield what lies in a folder, whose keys begin with `base`, in the order of the keys; links are not followed."""
    try:
        with os.scandir(folder) as found:
            # A folder sorts as its keys do, in which its name goes on with "/".
            named = [(f"{base}{one.name}{'/' if one.is_dir() else ''}", one) for one in found if one.name[0] != "."]
    except OSError as error:
        if error.errno in _NO_OBJECT:
            return
        raise StoreError(f"cannot list storage folder {folder}: {error.strerror}") from error
    for name, one in sorted((name, one) for name, one in named if name.startswith(prefix)):
        if name.endswith("/"):
            if (name > after or after.startswith(name)) and not one.is_symlink():
                yield from _walk(one.path, name, prefix, after)
        elif name > after:
            with suppress(FileNotFoundError):  # deleted meanwhile
                yield Entry(name, _version(one))


def _version(file: os.DirEntry[str]) -> str:
    try:
        seen = file.stat()
    except OSError:  # a link to nothing is listed too, and reading it says what is wrong
        seen = file.stat(follow_symlinks=False)
    return f"{seen.st_ino}-{seen.st_size}-{seen.st_mtime_ns}"


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut; it has no effect on what readers see."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
