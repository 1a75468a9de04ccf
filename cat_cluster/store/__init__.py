"""Object stores: one protocol, and the folder or the S3 bucket behind it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

from cat_cluster.errors import StoreError
from cat_cluster.store.local import LocalStore
from cat_cluster.store.protocol import ObjectStore

__all__ = ["LocalStore", "ObjectStore", "open_store"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def open_store(url: str | Path, *, on_retry: Callable[[str], None] | None = None) -> ObjectStore:
    """Return the store at a folder path, a file:// or an s3:// address; any other address raises StoreError.

    It is not touched yet: `check_access()` says whether it can be used. on_retry is called with the operation of every
    request to S3 that is sent again: read, write, list or delete.
    """
    text = str(url)
    if not text.strip() or "\0" in text:
        raise StoreError("the storage is empty or not a path: give a folder, for example ./cat-storage")
    scheme = _SCHEME.match(text)
    if scheme is None:
        return LocalStore(text)
    if scheme[1].lower() == "s3":
        from cat_cluster.store.s3 import S3Store  # folders need no boto3

        return S3Store(f"s3://{text[scheme.end() :]}", on_retry=on_retry)
    if scheme[1].lower() != "file":
        raise StoreError(
            f"storage {text}: {scheme[1]}:// is not supported; give a folder path, a file:// or an s3:// address"
        )
    host, slash, path = text[scheme.end() :].partition("/")
    if host not in ("", "localhost") or not slash:
        raise StoreError(f"storage {text}: a file address has three slashes, as in file:///data/cat-storage")
    return LocalStore(unquote(f"/{path}"))
