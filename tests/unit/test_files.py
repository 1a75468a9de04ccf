"""A file is written whole or not at all, whoever looks meanwhile and whatever goes wrong."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from cat_cluster.errors import OutputError
from cat_cluster.files import write_whole


def test_a_file_replaces_the_one_before_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "result.json"
    write_whole(path, b"one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_what_is_in_the_way_is_named_with_what_helps(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    for path in (tmp_path / "file" / "below", tmp_path / "file" / "far" / "below"):
        with pytest.raises(OutputError, match=r"file is a file, not a folder; choose another place") as caught:
            write_whole(path, b"new")
        assert "free space" not in str(caught.value)
    for folder in (tmp_path, Path(""), Path("/")):
        with pytest.raises(OutputError, match="it is a folder; name a file in it"):
            write_whole(folder, b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_place_without_permission_is_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: object, target: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(OutputError, match="Permission denied; choose a place that this user may write to"):
        write_whole(tmp_path / "file", b"new")


def test_readers_never_see_a_part(tmp_path: Path) -> None:
    path, contents = tmp_path / "file", {bytes([65 + n]) * 300_000 for n in range(4)}
    write_whole(path, next(iter(contents)))
    writers = [threading.Thread(target=lambda c=c: [write_whole(path, c) for _ in range(10)]) for c in contents]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match=r"cannot write .*file: No space left on device"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot write"):
        write_whole(tmp_path / "file" / "below", b"new")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
