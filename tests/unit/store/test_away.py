"""A store that is away says so: nothing that cannot be seen is taken for something that is not there."""

from __future__ import annotations

import http.server
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from cat_cluster.errors import AdapterNotFoundError, ObjectNotFoundError, ObjectUnreadableError, StoreError
from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore
from cat_cluster.store.protocol import ObjectStore
from cat_cluster.store.s3 import S3Store

USES: dict[str, Callable[[ObjectStore], object]] = {
    "get": lambda store: store.get("a/b"),
    "get another": lambda store: store.get("none/c"),
    "exists": lambda store: store.exists("a/b"),
    "size": lambda store: store.size("a/b"),
    "list": lambda store: store.list("a/"),
    "list all": lambda store: store.list(""),
    "entries": lambda store: list(store.entries("", after="b")),
    "delete": lambda store: store.delete("a/b"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    LocalStore(tmp_path / "storage").put("a/b", b"1")
    return tmp_path / "storage"


def elsewhere(folder: Path) -> Path:
    """A place of this test's own: tests in one process have their folders side by side."""
    return folder.with_name(f"{folder.name}-elsewhere")


def gone(folder: Path) -> None:
    folder.rename(elsewhere(folder))


def unmounted(folder: Path) -> None:
    gone(folder)
    folder.mkdir()  # the place where it was mounted


def locked(folder: Path) -> None:
    gone(folder)
    folder.write_bytes(b"a file in its place")


@pytest.mark.parametrize("away", [gone, unmounted, locked])
@pytest.mark.parametrize("use", USES)
def test_a_folder_that_went_away_is_not_empty(folder: Path, away: Callable[[Path], None], use: str) -> None:
    store = LocalStore(folder)
    away(folder)
    for one in (store, pickle.loads(pickle.dumps(store))):
        with pytest.raises(StoreError, match="see that it is mounted") as caught:
            USES[use](one)
        assert not isinstance(caught.value, ObjectNotFoundError)
        assert not isinstance(caught.value, ObjectUnreadableError)


@pytest.mark.parametrize("away", [gone, unmounted, locked])
def test_nothing_is_written_where_a_folder_was_mounted(folder: Path, away: Callable[[Path], None]) -> None:
    store = LocalStore(folder)
    away(folder)
    with pytest.raises(StoreError, match="see that it is mounted"):
        store.put("a/c", b"2")
    assert not folder.is_dir() or not list(folder.iterdir())


def test_a_folder_that_comes_back_is_used_again(folder: Path) -> None:
    store = LocalStore(folder)
    unmounted(folder)
    with pytest.raises(StoreError):
        store.exists("a/b")
    folder.rmdir()
    shutil.copytree(elsewhere(folder), folder)
    assert store.get("a/b") == b"1"
    assert not store.exists("a/c")
    store.put("a/c", b"2")


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_that_was_never_written_is_empty(tmp_path: Path, exists: bool) -> None:
    if exists:
        (tmp_path / "storage").mkdir()
    store, other = LocalStore(tmp_path / "storage"), LocalStore(tmp_path / "storage")
    assert (store.list(""), store.list("a/"), store.exists("a/b")) == ([], [], False)
    with pytest.raises(ObjectNotFoundError):
        store.get("a/b")
    store.delete("a/b")
    other.put("probe", b"1")  # as check_access does
    other.delete("probe")
    assert store.list("") == other.list("") == []
    other.put("a/b", b"1")
    other.delete("a/b")
    assert store.list("") == other.list("") == []


@pytest.mark.parametrize("written_by", ["itself", "another"])
def test_a_folder_that_was_empty_when_it_was_opened_is_missed_too(tmp_path: Path, written_by: str) -> None:
    store = LocalStore(tmp_path / "storage")
    (store if written_by == "itself" else LocalStore(tmp_path / "storage")).put("a/b", b"1")
    assert store.get("a/b") == b"1"
    unmounted(tmp_path / "storage")
    with pytest.raises(StoreError):
        store.exists("a/b")


def test_one_object_that_cannot_be_read_is_told_apart(folder: Path) -> None:
    store = LocalStore(folder)
    os.symlink("loop", folder / "a" / "loop")
    os.symlink("/etc/passwd", folder / "a" / "out")
    for key in ("a/loop", "a/out"):
        with pytest.raises(ObjectUnreadableError):
            store.get(key)
    assert store.get("a/b") == b"1"


def test_a_registry_that_is_away_has_lost_nothing(tmp_path: Path) -> None:
    registry = Registry(LocalStore(tmp_path / "storage"))
    assert registry.list() == []
    with pytest.raises(AdapterNotFoundError):
        registry.resolve("cup")
    registry.store.put("adapters/cup/r-0123456789ab/manifest.json", b"{}")
    unmounted(tmp_path / "storage")
    for use in (
        registry.list,
        lambda: registry.look_up("cup"),
        lambda: registry.resolve("cup@r-0123456789ab"),
        lambda: registry.delete("cup", "r-0123456789ab"),
        lambda: registry.release("cup", "r-0123456789ab"),
        lambda: registry.quarantined("cup", "r-0123456789ab"),
    ):
        with pytest.raises(StoreError, match="mounted") as caught:
            use()
        assert not any(word in str(caught.value) for word in ("delete", "remove", "train"))


@pytest.fixture
def not_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Store]:
    """A store whose endpoint is some other web server, which knows nothing of S3."""

    class Nothing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        do_HEAD = do_DELETE = do_GET

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Nothing) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "x")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield S3Store("s3://bucket/prefix", retry_seconds=0.0)
        server.shutdown()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("use", [use for use in USES if use != "delete"])
def test_another_web_server_is_no_empty_bucket(not_found: S3Store, use: str) -> None:
    with pytest.raises(StoreError, match="check AWS_ENDPOINT_URL") as caught:
        USES[use](not_found)
    assert not isinstance(caught.value, ObjectNotFoundError)


def test_a_first_write_beside_a_look_is_no_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder was empty when it was looked at, and another thread wrote the first object before the verdict."""
    store, look = LocalStore(tmp_path), os.scandir

    def slow_look(folder: Path) -> nullcontext[Iterator[os.DirEntry[str]]]:
        seen = list(look(folder))
        monkeypatch.undo()
        store.put("a/b", b"1")
        return nullcontext(iter(seen))

    monkeypatch.setattr(os, "scandir", slow_look)
    with pytest.raises(ObjectNotFoundError):
        store.get("a/c")
    assert store.get("a/b") == b"1"
    gone(tmp_path)
    with pytest.raises(StoreError, match="held objects"):
        store.list("")
