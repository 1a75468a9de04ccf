"""A Ray of one command's own: the folders that it can take."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import pytest

from cat_cluster.cluster.local_ray import check_ray_folder
from cat_cluster.errors import ClusterError


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_a_folder_too_long_for_rays_sockets_is_refused_at_the_byte(name: str) -> None:
    """Against the system itself: whether it takes the path of the longest socket that Ray makes."""
    below = f"ray/session_2026-11-28_23-48-55_443748_{os.getpid()}/sockets/plasma_store"
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        room = 107 - len(os.path.join(short, "", below)) - 1
        for letter, length in (("a", room), ("a", room + 1), ("\u00e9", room // 2), ("\u00e9", room // 2 + 1)):
            folder = os.path.join(short, letter * length)
            path = os.path.join(folder, below)
            os.makedirs(os.path.dirname(path))
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.bind(path)
                except OSError:
                    with pytest.raises(ClusterError, match=f"{name}={folder}.*set RAY_TMPDIR to a folder of at most"):
                        check_ray_folder({name: folder})
                    assert length not in (room, room // 2)
                else:
                    check_ray_folder({name: folder})
                    assert length in (room, room // 2)


def test_ray_looks_at_its_own_variable_first(tmp_path: Path) -> None:
    check_ray_folder({})
    check_ray_folder({"RAY_TMPDIR": "/tmp", "TMPDIR": "/dev/null/x"})
    check_ray_folder({"RAY_TMPDIR": "/tmp/not-there-yet/nor-this"})
    with pytest.raises(ClusterError, match=r"RAY_TMPDIR=/dev/null/x: .*because of /dev/null; set RAY_TMPDIR"):
        check_ray_folder({"RAY_TMPDIR": "/dev/null/x", "TMPDIR": "/tmp"})


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
@pytest.mark.parametrize("folder", ["", "tmp", "./tmp", "~/tmp"])
def test_a_folder_that_is_no_whole_path_is_refused(name: str, folder: str) -> None:
    with pytest.raises(ClusterError, match=rf"{name}={folder}: .*; unset {name}, or set RAY_TMPDIR") as refused:
        check_ray_folder({name: folder})
    assert "\n" not in str(refused.value)


def test_a_folder_in_which_ray_cannot_write_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        file = Path(folder, "file")
        file.touch()
        for unfit in (file, file / "below"):
            with pytest.raises(ClusterError, match=f"TMPDIR={unfit}: .*because of {file}"):
                check_ray_folder({"TMPDIR": str(unfit)})
        Path(folder, "ray").mkdir()
        monkeypatch.setattr(
            os, "access", lambda path, mode: Path(path) != Path(folder, "ray")
        )  # root may write anywhere
        with pytest.raises(ClusterError, match=f"because of {folder}/ray"):
            check_ray_folder({"TMPDIR": folder})
