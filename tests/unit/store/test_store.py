"""Addresses of stores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cat_cluster.errors import StoreError
from cat_cluster.store import LocalStore, open_store


def test_folders_and_file_addresses_open_the_same_store(tmp_path: Path) -> None:
    folder = tmp_path / "a folder #1?"
    store = open_store(str(folder))
    store.put("a/b", b"1")
    assert open_store(folder).get("a/b") == b"1"
    assert open_store(store.url).get("a/b") == b"1"
    assert open_store(store.url.replace("file:///", "file://localhost/")).get("a/b") == b"1"


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    store = open_store("~/storage")
    assert isinstance(store, LocalStore)
    assert store.folder == tmp_path.resolve() / "storage"


@pytest.mark.parametrize("url", ["https://x/y", "gs://bucket"])
def test_other_addresses_are_refused_with_what_works(url: str) -> None:
    with pytest.raises(StoreError, match=r"not supported; give a folder path, a file:// or an s3:// address"):
        open_store(url)


@pytest.mark.parametrize("url", ["", "  ", "a\0b", "file://", "file://host/data"])
def test_addresses_that_name_no_folder_are_refused(url: str) -> None:
    with pytest.raises(StoreError):
        open_store(url)


def test_a_file_is_no_storage(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(StoreError, match="is a file"):
        open_store(str(file))


def test_opening_makes_no_folder(tmp_path: Path) -> None:
    assert open_store(str(tmp_path / "none")).list("") == []
    assert not (tmp_path / "none").exists()


def test_checking_access_makes_the_folder_and_leaves_it_empty(tmp_path: Path) -> None:
    open_store(tmp_path / "new" / "storage").check_access()
    assert list((tmp_path / "new" / "storage").iterdir()) == []


def test_folders_need_no_boto3() -> None:
    script = "import sys; from cat_cluster.store import open_store; open_store('.'); sys.exit('boto3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
