"""S3 as it is in the field: wrong keys, no bucket, races, outages, lost answers, damage, on a real server."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from cat_cluster.errors import ObjectExistsError, StoreError
from cat_cluster.store import open_store, s3
from cat_cluster.store.s3 import S3Store
from tests.support.s3_server import S3Server

MEGABYTE = 10**6


def bucket_of(url: str) -> str:
    return url.removeprefix("s3://").split("/")[0]


def test_access_is_checked_and_leaves_nothing(s3_bucket: str) -> None:
    store = open_store(f"{s3_bucket}/prefix")
    store.check_access()
    assert store.list("") == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", r"refused the credentials \(SignatureDoesNotMatch.*set AWS_ACCESS_KEY_ID"),
        ("AWS_ACCESS_KEY_ID", "nobody:here", r"refused the credentials \((InvalidAccessKeyId|SignatureDoesNotMatch)"),
        ("AWS_ACCESS_KEY_ID", None, "no AWS credentials were found; set AWS_ACCESS_KEY_ID"),
        ("AWS_PROFILE", "nowhere", r"profile \(nowhere\) could not be found; check the AWS_\* variables"),
        ("AWS_ENDPOINT_URL", "nonsense", r"Invalid endpoint: nonsense; check the AWS_\* variables"),
    ],
)
def test_settings_that_do_not_fit_are_explained_at_once(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str | None, message: str
) -> None:
    if value is None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    else:
        monkeypatch.setenv(name, value)
    store = S3Store(f"{s3_bucket}/prefix")
    with pytest.raises(StoreError, match=message) as caught:
        store.check_access()
    assert f"{s3_bucket}/prefix" in str(caught.value)
    assert store.retries == 0
    assert store.retries == 0


def test_a_missing_bucket_is_named_by_every_request(s3_bucket: str) -> None:
    store = S3Store("s3://no-such-bucket/prefix")
    for use in (store.check_access, lambda: store.get("a"), lambda: store.exists("a"), lambda: store.list("")):
        with pytest.raises(StoreError, match="there is no bucket no-such-bucket at http"):
            use()
    assert store.retries == 0


def test_an_unreachable_endpoint_is_tried_again_and_named(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        asked: list[str] = []
        store = S3Store(s3_bucket, retry_seconds=1, on_retry=asked.append)
        with pytest.raises(StoreError, match=f"{address} cannot be reached .*tried again for 1 s.*AWS_ENDPOINT_URL"):
            store.put("a", b"1")
    assert store.retries == len(asked) > 1
    assert set(asked) == {"write"}


def test_a_server_that_never_answers_is_given_up(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "READ_SECONDS", 0.3)
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StoreError, match="did not answer in time"):
            S3Store(s3_bucket, retry_seconds=0.5).get("a")


def test_large_objects_go_in_parts(s3_server: S3Server, s3_bucket: str) -> None:
    store = open_store(s3_bucket)
    data = bytes(range(256)) * (20 * MEGABYTE // 256)
    store.put("large", data, if_absent=True)
    assert store.get("large") == data
    assert store.size("large") == len(data)
    assert s3_server.client().head_object(Bucket=bucket_of(s3_bucket), Key="large")["ETag"].endswith('-3"')
    with pytest.raises(ObjectExistsError):
        store.put("large", data[::-1], if_absent=True)
    store.put("large", data[::-1])
    assert store.get("large") == data[::-1]
    store.delete("large")
    assert store.list("") == []


def test_of_many_threads_that_write_once_exactly_one_wins(s3_bucket: str) -> None:
    store = open_store(s3_bucket)
    start = threading.Barrier(4)

    def write(name: int) -> set[int]:
        won = set()
        for number in range(20):
            start.wait()
            try:
                store.put(f"race/{number}", bytes([name]), if_absent=True)
                won.add(number)
            except ObjectExistsError:
                pass
        return won

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(write, range(4)))
    assert sorted(number for numbers in won for number in numbers) == list(range(20))
    assert all(store.get(f"race/{number}") == bytes([name]) for name, numbers in enumerate(won) for number in numbers)


def test_long_listings_are_read_to_the_end(s3_server: S3Server, s3_bucket: str) -> None:
    keys = [f"many/{number:02d}" for number in range(40)]
    for key in [*keys, "many-more"]:
        s3_server.client().put_object(Bucket=bucket_of(s3_bucket), Key=key, Body=b"")
    assert S3Store(s3_bucket, page_size=7).list("many/") == keys
    assert S3Store(s3_bucket, page_size=8).list("many/3") == keys[30:]


def test_names_of_others_under_the_prefix_are_passed_over(s3_server: S3Server, s3_bucket: str) -> None:
    for key in ("p/", "p/a b", "p/.hidden", "p/good"):
        s3_server.client().put_object(Bucket=bucket_of(s3_bucket), Key=key, Body=b"")
    assert open_store(f"{s3_bucket}/p").list("") == ["good"]


@pytest.mark.parametrize("size", [1000, 48 * MEGABYTE])
def test_an_outage_in_the_middle_of_a_put_is_survived(s3_server: S3Server, s3_bucket: str, size: int) -> None:
    data = b"x" * size
    store = S3Store(s3_bucket, retry_seconds=30)
    before = set(s3_server.data_folder.rglob("*.data"))
    try:
        with ThreadPoolExecutor(1) as pool:
            if size < MEGABYTE:
                s3_server.kill("object")
            waiting = pool.submit(store.put, "a", data, if_absent=True)
            while size > MEGABYTE and set(s3_server.data_folder.rglob("*.data")) == before:
                time.sleep(0.002)
            s3_server.kill("object")
            while store.retries < 2:
                assert not waiting.done()
                time.sleep(0.02)
            s3_server.restart("object")
            waiting.result()
    finally:
        s3_server.restart("object")
    assert store.get("a") == data


def test_an_upload_that_another_writer_overtakes_is_refused_and_removed(s3_server: S3Server, s3_bucket: str) -> None:
    store, other = S3Store(s3_bucket), S3Store(s3_bucket)
    store._bucket.client("write", "a").meta.events.register_first(
        "before-call.s3.CompleteMultipartUpload", lambda **_: other.put("a", b"theirs")
    )
    with pytest.raises(ObjectExistsError):
        store.put("a", b"z" * (9 * MEGABYTE), if_absent=True)
    assert store.get("a") == b"theirs"
    assert "Uploads" not in s3_server.client().list_multipart_uploads(Bucket=bucket_of(s3_bucket))


def test_an_outage_that_lasts_is_given_up_and_leaves_nothing(s3_server: S3Server, s3_bucket: str) -> None:
    store = S3Store(s3_bucket, retry_seconds=0.5)
    s3_server.kill("object")
    try:
        with pytest.raises(StoreError, match=r"cannot write a .* answered 503 .*tried again for 0.5 s.*recovered"):
            store.put("a", b"1")
    finally:
        s3_server.restart("object")
    assert not store.exists("a")


class Line:
    """A connection to the server that can lose answers: the request arrives, the client never hears of it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._request: bytes | None = None
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def lose(self, request: bytes) -> None:
        """Lose the answer to the next request that has these bytes in it."""
        self._request = request

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                losing = threading.Event()
                for pump in (self._carry_requests, self._carry_answers):
                    threading.Thread(target=pump, args=(near, far, losing), daemon=True).start()

    def _carry_requests(self, near: socket.socket, far: socket.socket, losing: threading.Event) -> None:
        with suppress(OSError):
            while data := near.recv(65536):
                if self._request is not None and self._request in data:
                    self._request = None
                    losing.set()
                far.sendall(data)
        hang_up(far)

    def _carry_answers(self, near: socket.socket, far: socket.socket, losing: threading.Event) -> None:
        with suppress(OSError):
            while data := far.recv(65536):
                if losing.is_set() and not data.startswith(b"HTTP/1.1 100"):
                    break
                near.sendall(data)
        hang_up(near)


def hang_up(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


@contextmanager
def losing_line(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    line = Line(int(server.endpoint.rpartition(":")[2]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", line.address)
    with closing(line):
        yield line


def test_a_write_once_whose_answer_was_lost_is_known_as_our_own(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with losing_line(s3_server, monkeypatch) as line:
        store = S3Store(s3_bucket)
        line.lose(b"PUT /")
        store.put("a", b"ours", if_absent=True)
        assert store.retries == 1
        with pytest.raises(ObjectExistsError):
            store.put("a", b"ours", if_absent=True)
        assert store.get("a") == b"ours"


@pytest.mark.parametrize("if_absent", [False, True])
def test_an_upload_in_parts_survives_a_lost_answer_to_any_of_its_requests(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch, if_absent: bool
) -> None:
    data = b"y" * (9 * MEGABYTE)
    with losing_line(s3_server, monkeypatch) as line:
        store = S3Store(s3_bucket)

        for number, request in enumerate((b"POST /", b"PUT /", b"<CompleteMultipartUpload"), start=1):
            line.lose(request)
            store.put(f"k{number}", data, if_absent=if_absent)
            assert store.retries == number
            assert store.get(f"k{number}") == data


@pytest.mark.parametrize("size", [1000, 9 * MEGABYTE])
def test_a_damaged_object_is_named(s3_server: S3Server, s3_bucket: str, size: int) -> None:
    """A byte is turned on the server's own disk."""
    data = bytes([7]) * size
    store = open_store(f"{s3_bucket}/prefix")
    store.put("weights", data)
    newest = next(path for path in files_by_age(s3_server.data_folder) if path.read_bytes()[:100] == data[:100])
    with newest.open("r+b") as file:
        file.seek(50)
        file.write(b"\0")
    with pytest.raises(StoreError, match=f"weights in storage {s3_bucket}/prefix is damaged"):
        store.get("weights")


def files_by_age(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.data"), key=lambda path: path.stat().st_mtime, reverse=True)
