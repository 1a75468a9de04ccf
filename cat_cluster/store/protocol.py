"""What the rest of the project asks of an object store, and which keys every store accepts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from cat_cluster.errors import StoreError

MAX_KEY_LENGTH = 900  # S3 allows 1,024 bytes; a storage prefix of its own must still fit in front
MAX_SEGMENT_LENGTH = 180  # folders allow 255 bytes a name

KeyList: TypeAlias = list[str]  # a class with a method `list` cannot write list[str] itself

_SEGMENT = re.compile(r"[A-Za-z0-9_=@+-][A-Za-z0-9._=@+-]*")


@dataclass(frozen=True)
class Entry:
    """An object in a listing: its key, and a text that is another one once the object has been replaced."""

    key: str
    version: str


class ObjectStore(Protocol):
    """A flat map from keys to bytes: whole objects only, and each put is seen whole or not at all.

    Keys are posix paths (`check_key`). Every method raises StoreError when the store refuses, is out of space or is
    away: that an object is not there is said only of a store that responds. One object alone that cannot be read, or is
    not what was stored, is ObjectUnreadableError.
    """

    @property
    def url(self) -> str:
        """The address a user gives to reach this store."""

    def get(self, key: str) -> bytes:
        """Return the object's bytes; ObjectNotFoundError if there is none."""

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        """Store an object, replacing an older one; with `if_absent`, ObjectExistsError when the key is taken."""

    def exists(self, key: str) -> bool:
        """Say whether an object is stored under the key."""

    def list(self, prefix: str) -> KeyList:
        """Return, sorted, every key that begins with the prefix ("" for all)."""

    def entries(self, prefix: str, *, after: str = "") -> Iterator[Entry]:
        """Yield, in the order of their keys, the objects whose key begins with the prefix and sorts behind `after`.

        The store is read as far as the iterator is. after: a key, or any text that sorts as one.
        """

    def delete(self, key: str) -> None:
        """Remove an object; a key without one is no error."""

    def size(self, key: str) -> int:
        """Return the object's size in bytes; ObjectNotFoundError if there is none."""

    def check_access(self) -> None:
        """Write and remove a probe, so that a store that cannot be used is a StoreError before any work begins."""


def check_key(key: str) -> str:
    """Return the key if every store can hold it, else raise StoreError.

    A key is one or more names joined by "/": letters, digits and ._=@+- , no name beginning with a dot, at most
    180 characters a name and 900 in all. So "..", absolute paths, backslashes and hidden files never reach a store.
    """
    segments = key.split("/")
    if len(key) > MAX_KEY_LENGTH or any(len(segment) > MAX_SEGMENT_LENGTH for segment in segments):
        raise StoreError(
            f"the storage key {key[:60]!r}... is too long: keep each name under {MAX_SEGMENT_LENGTH} characters "
            f"and the key under {MAX_KEY_LENGTH}"
        )
    if not all(_SEGMENT.fullmatch(segment) for segment in segments):
        raise StoreError(
            f"{key!r} cannot be a storage key: use names of letters, digits and ._=@+- joined by '/', "
            "none of them empty or beginning with a dot"
        )
    return key


def check_prefix(prefix: str) -> str:
    """Return the prefix if it can begin a key: "", a key, or a key and a "/"; else raise StoreError."""
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix
