"""Object stores: one protocol, and the folder behind it."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from cat_cluster.errors import StoreError
from cat_cluster.store.local import LocalStore
from cat_cluster.store.protocol import ObjectStore

__all__ = ["LocalStore", "ObjectStore", "open_store"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def open_store(url: str | Path) -> ObjectStore:
    """Return the store at a folder path or a file:// address; any other address raises StoreError."""
    text = str(url)
    if not text.strip() or "\0" in text:
        raise StoreError("the storage is empty or not a path: give a folder, for example ./cat-storage")
    scheme = _SCHEME.match(text)
    if scheme is None:
        return LocalStore(text)
    if scheme[1].lower() != "file":
        raise StoreError(
            f"storage {text}: this version stores in folders, not in {scheme[1]}://; "
            "give a folder path or a file:// address"
        )
    host, slash, path = text[scheme.end() :].partition("/")
    if host not in ("", "localhost") or not slash:
        raise StoreError(f"storage {text}: a file address has three slashes, as in file:///data/cat-storage")
    return LocalStore(unquote(f"/{path}"))
