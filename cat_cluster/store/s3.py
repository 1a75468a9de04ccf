"""An object store in an S3 bucket: write-once where asked, checked on reading, and patient with a service in trouble.

Endpoint, region and credentials come from the standard AWS variables and files. This is the only module that
imports boto3.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from cat_cluster.errors import ObjectExistsError, ObjectNotFoundError, StoreError, needs_extra
from cat_cluster.store.protocol import Entry, KeyList, check_key, check_prefix
from cat_cluster.store.retries import with_retries

with needs_extra("s3", "a storage in S3"):
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    from cat_cluster.store.s3_errors import S3_ERRORS, UploadGoneError, damaged, explain, may_pass, says_no_key

RETRY_SECONDS = 60.0  # from the first failure of a request to its last try
CONNECT_SECONDS, READ_SECONDS = 5.0, 30.0
CHECK_SECONDS = 10.0  # a person waits for check_access
# Amazon's conditional writes are atomic. Other servers (OpenStack Swift among them) look first and write a few
# milliseconds later: there the object is looked at again after this time, and only its last writer has won.
SETTLE_SECONDS = 0.05
PART_BYTES = 8 * 2**20  # objects of this size or more are uploaded in parts
MOST_PARTS = 1000  # S3 allows 10,000; some servers no more than this
PARTS_AT_ONCE = 4
PAGE_SIZE = 1000
SEEN_SECONDS = 10.0

# Of each object we write: the sha256 of its bytes, and who wrote it, to know our own write again.
SHA256, _NONCE = "cat-sha256", "cat-nonce"

_AMAZON = "amazonaws.com"
_URL = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9])(?:/(.*))?", re.DOTALL)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class StoredKey:
    """One object of a listing: its whole key in the bucket, its ETag and its size in bytes."""

    key: str
    etag: str
    size: int


class S3Bucket:
    """Requests to one bucket: tried again while they may pass, and explained when they fail.

    url: how messages name the storage. Safe between threads; each process makes a client of its own.
    """

    def __init__(
        self, name: str, url: str, *, retry_seconds: float, on_retry: Callable[[str], None] | None = None
    ) -> None:
        self.name, self.url, self.retry_seconds = name, url, retry_seconds
        self.retries = 0
        self._on_retry = on_retry
        self._counting = threading.Lock()
        self._clients: dict[int, Any] = {}

    def run(self, action: str, key: str, call: Callable[[Any], _Result]) -> _Result:
        """Return what `call(client)` returns; raises StoreError. `action` and `key` are for its message."""
        client = self.client(action, key)

        def count(_: Exception) -> None:
            with self._counting:
                self.retries += 1
            if self._on_retry is not None:
                self._on_retry(action)

        try:
            return with_retries(lambda: call(client), passing=may_pass, budget=self.retry_seconds, on_retry=count)
        except S3_ERRORS as error:
            raise self._explained(error, action, key, client.meta.endpoint_url) from error

    def client(self, action: str, key: str) -> Any:
        """Return this process's boto3 client: a forked child must not share its parent's connections."""
        process = os.getpid()
        if process not in self._clients:
            try:
                self._clients[process] = _make_client()
            except (BotoCoreError, ValueError) as error:
                raise self._explained(error, action, key, os.environ.get("AWS_ENDPOINT_URL", "AWS")) from error
        return self._clients[process]

    def is_amazon(self, key: str) -> bool:
        """Say whether the service is Amazon's own."""
        return _AMAZON in self.client("write", key).meta.endpoint_url

    def read(self, key: str, shown: str) -> tuple[bytes, Mapping[str, Any]]:
        """Return an object's bytes and the fields of the response; ObjectNotFoundError if there is none."""

        def fetch(client: Any) -> tuple[bytes, Mapping[str, Any]]:
            response = client.get_object(Bucket=self.name, Key=key)
            with closing(response["Body"]) as body:  # `with` on the body itself would hand out the stream below it
                return body.read(), response

        data, response = self.run("read", shown, fetch)
        expected = response["Metadata"].get(SHA256)
        if expected is not None and hashlib.sha256(data).hexdigest() != expected:
            raise damaged(shown, self.url, f"its sha256 is not {expected[:12]}..., which was stored with it")
        return data, response

    def keys(
        self, prefix: str, *, page_size: int = PAGE_SIZE, deep: bool = True, after: str = ""
    ) -> Iterator[StoredKey]:
        """Yield every object whose key begins with the prefix, page by page; not `deep`: only up to the next "/".

        after: begin behind this key.
        """
        for page in self._pages(prefix, page_size, deep=deep, after=after):
            for entry in page.get("Contents", ()):
                yield StoredKey(entry["Key"], entry["ETag"], entry["Size"])

    def folders(self, prefix: str) -> Iterator[str]:
        """Yield what keys that begin with the prefix have up to and with the next "/", each once."""
        for page in self._pages(prefix, PAGE_SIZE, deep=False):
            for entry in page.get("CommonPrefixes", ()):
                yield entry["Prefix"]

    def _pages(self, prefix: str, page_size: int, *, deep: bool, after: str = "") -> Iterator[Mapping[str, Any]]:
        arguments: dict[str, Any] = {"Bucket": self.name, "Prefix": prefix, "MaxKeys": page_size}
        if not deep:
            arguments["Delimiter"] = "/"
        if after:
            arguments["StartAfter"] = after
        while True:
            page = self.run("list", prefix, functools.partial(_list_page, arguments=arguments))
            yield page
            if not page.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def _explained(self, error: Exception, action: str, key: str, endpoint: str) -> StoreError:
        return explain(error, action=action, key=key, url=self.url, endpoint=endpoint, waited=self.retry_seconds)


class S3Store:
    """Objects under a prefix of a bucket; the bucket must be there.

    url: s3://bucket/prefix. retry_seconds: how long a failing request is tried again. page_size: keys per listing
    request. on_retry: called with read, write, list or delete before each new try; picklable where the store is.
    Objects that others put under the prefix with names that no store accepts are not seen.
    """

    def __init__(
        self,
        url: str,
        *,
        retry_seconds: float = RETRY_SECONDS,
        page_size: int = PAGE_SIZE,
        on_retry: Callable[[str], None] | None = None,
    ) -> None:
        bucket, prefix = split_url(url)
        if prefix:
            check_key(prefix)
        self._base = f"{prefix}/" if prefix else ""
        self._url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._page_size = page_size
        self._on_retry = on_retry
        self._bucket = S3Bucket(bucket, self._url, retry_seconds=retry_seconds, on_retry=on_retry)
        self._bucket_seen_at = float("-inf")

    def __reduce__(self) -> tuple[Callable[[str], S3Store], tuple[str]]:
        remake = functools.partial(
            S3Store,
            retry_seconds=self._bucket.retry_seconds,
            page_size=self._page_size,
            on_retry=self._on_retry,
        )
        return remake, (self._url,)

    @property
    def url(self) -> str:
        """The address, s3://bucket/prefix."""
        return self._url

    @property
    def retries(self) -> int:
        """How often this store has tried a request again, in this process."""
        return self._bucket.retries

    def get(self, key: str) -> bytes:
        """Return the object's bytes, checked against their sha256; ObjectNotFoundError if there is none."""
        try:
            return self._bucket.read(self._key(key), key)[0]
        except ObjectNotFoundError as error:
            if not says_no_key(error.__cause__):
                self._see_bucket(key)
            raise

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        """Store an object, replacing an older one; with `if_absent`, ObjectExistsError when the key is taken."""
        nonce = uuid.uuid4().hex
        metadata = {SHA256: hashlib.sha256(data).hexdigest(), _NONCE: nonce}
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        place = {"Bucket": self._bucket.name, "Key": self._key(key)}
        try:
            if len(data) < PART_BYTES:
                self._bucket.run(
                    "write", key, lambda client: client.put_object(Body=data, Metadata=metadata, **place, **condition)
                )
            else:
                if if_absent and self.exists(key):  # spares an upload that would be refused at its end
                    raise ObjectExistsError(f"{key} is already in storage {self.url}, and it is write-once")
                self._put_parts(key, data, place, metadata, condition)
        except (ObjectExistsError, UploadGoneError):
            # The object may be our own: written by a try whose response was lost.
            if self._writer(key) != nonce:
                raise
        if if_absent and not self._bucket.is_amazon(key):
            time.sleep(SETTLE_SECONDS)
            if self._writer(key) not in (nonce, None):
                raise ObjectExistsError(f"{key} is already in storage {self.url}: another writer was faster")

    def exists(self, key: str) -> bool:
        """Say whether an object is stored under the key."""
        return self._head(key) is not None

    def list(self, prefix: str) -> KeyList:
        """Return, sorted, every key that begins with the prefix ("" for all)."""
        return sorted(entry.key for entry in self.entries(prefix))

    def entries(self, prefix: str, *, after: str = "") -> Iterator[Entry]:
        """Yield, in the order of their keys, the objects whose key begins with the prefix and sorts behind `after`."""
        check_prefix(prefix)
        start = f"{self._base}{after}" if after else ""
        found = self._bucket.keys(f"{self._base}{prefix}", page_size=self._page_size, after=start)
        entries = (Entry(stored.key.removeprefix(self._base), stored.etag) for stored in found)
        return (entry for entry in entries if _is_key(entry.key))

    def delete(self, key: str) -> None:
        """Remove an object; a key without one is no error."""
        place = {"Bucket": self._bucket.name, "Key": self._key(key)}
        with suppress(ObjectNotFoundError):
            self._bucket.run("delete", key, lambda client: client.delete_object(**place))

    def size(self, key: str) -> int:
        """Return the object's size in bytes; ObjectNotFoundError if there is none."""
        head = self._head(key)
        if head is None:
            raise ObjectNotFoundError(f"no object {key} in storage {self.url}")
        return int(head["ContentLength"])

    def check_access(self) -> None:
        """Write and remove a probe; raises StoreError when the store cannot be used, or holds no key write-once."""
        hasty = S3Store(self.url, retry_seconds=min(CHECK_SECONDS, self._bucket.retry_seconds))
        key = f"access-probe-{uuid.uuid4().hex}"
        hasty.put(key, b"1", if_absent=True)
        try:
            hasty.put(key, b"2", if_absent=True)
        except ObjectExistsError:
            return
        finally:
            hasty.delete(key)
        raise StoreError(
            f"storage {self.url}: its server ignores If-None-Match, so two writers could overwrite each other; use an "
            "S3 service with conditional writes"
        )

    def _key(self, key: str) -> str:
        return f"{self._base}{check_key(key)}"

    def _head(self, key: str) -> Mapping[str, Any] | None:
        place = {"Bucket": self._bucket.name, "Key": self._key(key)}
        try:
            head: Mapping[str, Any] = self._bucket.run("read", key, lambda client: client.head_object(**place))
        except ObjectNotFoundError:
            self._see_bucket(key)
            return None
        return head

    def _writer(self, key: str) -> str | None:
        head = self._head(key)
        return None if head is None else head["Metadata"].get(_NONCE, "")

    def _see_bucket(self, key: str) -> None:
        """Raise StoreError if it is the bucket that is missing: the response to HEAD of an object does not tell.

        A bucket that was there is believed to be for SEEN_SECONDS.
        """
        if time.monotonic() - self._bucket_seen_at < SEEN_SECONDS:
            return
        page = {"Bucket": self._bucket.name, "Prefix": self._key(key), "MaxKeys": 1}
        self._bucket.run("list", key, functools.partial(_list_page, arguments=page))
        self._bucket_seen_at = time.monotonic()

    def _put_parts(
        self, key: str, data: bytes, place: Mapping[str, str], metadata: Mapping[str, str], condition: Mapping[str, str]
    ) -> None:
        """Upload in parts, several at a time, each tried again by itself; a failed upload leaves nothing behind."""
        size = max(PART_BYTES, -(-len(data) // MOST_PARTS))
        run = functools.partial(self._bucket.run, "write", key)
        upload = {**place, "UploadId": run(lambda c: c.create_multipart_upload(Metadata=metadata, **place))["UploadId"]}

        def send(number: int) -> dict[str, Any]:
            body = data[(number - 1) * size : number * size]
            return {
                "PartNumber": number,
                "ETag": run(lambda client: client.upload_part(Body=body, PartNumber=number, **upload))["ETag"],
            }

        def abort() -> None:
            # Best effort, without tries: the error at hand says more, and buckets can expire unfinished uploads.
            with suppress(*S3_ERRORS, StoreError):
                self._bucket.client("write", key).abort_multipart_upload(**upload)

        with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
            try:
                parts = list(pool.map(send, range(1, -(-len(data) // size) + 1)))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                abort()
                raise
        finish = {"MultipartUpload": {"Parts": parts}, **upload, **condition}
        try:
            run(lambda client: client.complete_multipart_upload(**finish))
        except ObjectExistsError:  # after any other error it may be completed all the same
            abort()
            raise


def split_url(url: str) -> tuple[str, str]:
    """Return bucket and prefix of an s3:// address, the prefix without slashes at its ends; else StoreError."""
    match = _URL.fullmatch(url)
    if match is None:
        raise StoreError(
            f"{url!r} is not an S3 address: write s3://bucket/prefix, the bucket in 3 to 63 letters, digits, dots and "
            "hyphens"
        )
    return match[1], (match[2] or "").strip("/")


def _is_key(key: str) -> bool:
    try:
        return bool(check_key(key))
    except StoreError:
        return False


def _list_page(client: Any, *, arguments: Mapping[str, Any]) -> Any:
    return client.list_objects_v2(**arguments)


def _make_client() -> Any:
    options: dict[str, Any] = {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": READ_SECONDS,
        "max_pool_connections": 32,
        "tcp_keepalive": True,
        "retries": {"total_max_attempts": 1},  # ours alone: they have a budget, and are counted
    }
    # A session of its own, since boto3's default session may not be used by two threads at once. Of the two
    # variables for a region boto3 reads only AWS_DEFAULT_REGION.
    session = boto3.session.Session(region_name=os.environ.get("AWS_REGION") or None)
    client = session.client("s3", config=Config(**options))
    if _AMAZON not in client.meta.endpoint_url:
        # Other servers seldom have a host name for each bucket.
        client = session.client("s3", config=Config(**options, s3={"addressing_style": "path"}))
    return client
