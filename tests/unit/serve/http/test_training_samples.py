"""Samples of a run: told to whom the run is, and to nobody else."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest

from cat_cluster.store import LocalStore
from tests.support.training_http import KEYS, RUNS, photo_bytes, photos_zip, send, training_service


@pytest.fixture
def run_of_ann(tmp_path: Path) -> str:
    """A run that Ann has entered, with two pictures of its adapter."""
    with training_service(tmp_path, KEYS) as live, http(live.url, "ann") as ann:
        file = send(ann, photos_zip()).json()
        concept = {"token": "sks", "class_noun": "cup", "images": file["id"]}
        body = {"name": "cups", "adapters": [{"id": "my-cup", "concepts": [concept]}]}
        run = str(ann.post(RUNS, json=body).json()["id"])
    for step in (40, 80):
        LocalStore(tmp_path).put(f"runs/{run}/samples/my-cup/{step:08d}.png", photo_bytes(step))
    LocalStore(tmp_path).put(f"runs/{run}/samples/my-cup/notes.txt", b"no picture")
    return run


def http(url: str, key: str) -> httpx2.Client:
    return httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=30)


def test_the_pictures_of_a_run_are_listed_by_step_and_returned_as_they_are(tmp_path: Path, run_of_ann: str) -> None:
    with training_service(tmp_path, KEYS) as live, http(live.url, "ann") as ann:
        listed = ann.get(f"{RUNS}/{run_of_ann}/samples").json()
        assert listed["data"] == [{"adapter": "my-cup", "step": 40}, {"adapter": "my-cup", "step": 80}]
        picture = ann.get(f"{RUNS}/{run_of_ann}/samples/my-cup/80")
        assert (picture.status_code, picture.headers["content-type"]) == (200, "image/png")
        assert picture.content == photo_bytes(80)


def test_another_caller_sees_neither_the_list_nor_a_picture(tmp_path: Path, run_of_ann: str) -> None:
    with training_service(tmp_path, KEYS) as live, http(live.url, "bob") as bob, http(live.url, "master") as admin:
        for path in (f"{RUNS}/{run_of_ann}/samples", f"{RUNS}/{run_of_ann}/samples/my-cup/40"):
            assert bob.get(path).status_code == 404
            assert admin.get(path).status_code == 200


@pytest.mark.parametrize("rest", ["my-cup/41", "your-cup/40", "..%2Fmy-cup/40", "My Cup/40"])
def test_a_picture_that_is_not_there_is_said_to_be_missing(tmp_path: Path, run_of_ann: str, rest: str) -> None:
    with training_service(tmp_path, KEYS) as live, http(live.url, "ann") as ann:
        answer = ann.get(f"{RUNS}/{run_of_ann}/samples/{rest}")
        assert answer.status_code == 404


@pytest.mark.parametrize("step", ["-1", "x", "100000000"])
def test_a_step_that_can_be_none_is_refused(tmp_path: Path, run_of_ann: str, step: str) -> None:
    with training_service(tmp_path, KEYS) as live, http(live.url, "ann") as ann:
        answer = ann.get(f"{RUNS}/{run_of_ann}/samples/my-cup/{step}")
        assert answer.status_code == 400
        assert "step" in answer.json()["error"]["message"]
