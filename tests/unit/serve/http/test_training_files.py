"""Uploads of photos: kept once each is read, one caller's apart from another's, and none of it where one is wrong."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from PIL import Image

from cat_cluster.data.s3_photos import local_images, pack_images
from cat_cluster.errors import StoreError, StoreRefusedError
from cat_cluster.store import LocalStore
from serve.http.training.photo_process import PhotoProcess
from tests.support.ingress_server import Live, assert_refused
from tests.support.tiny_jobs import stored_files, write_photos
from tests.support.training_http import (
    FILES,
    JOBS,
    KEYS,
    RUNS,
    client_of,
    job_fields,
    photo_bytes,
    photos_zip,
    send,
    training_service,
    zip_of,
)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    with training_service(tmp_path / "store", KEYS, max_files_per_key=3) as live:
        yield live


@pytest.fixture
def ann(live: Live) -> Iterator[openai.OpenAI]:
    with client_of(live, "ann") as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


class Troubled(LocalStore):
    """A folder whose calls fail as it is told, from a key on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fails: type[StoreError] | None = None
        self.fails_on = ""

    def _path(self, key: str) -> Path:
        if self.fails is not None and self.fails_on in key:
            raise self.fails("the server says no, at s3.example.com")
        return super()._path(key)


def test_openais_client_sends_lists_and_deletes_files(ann: openai.OpenAI, tmp_path: Path) -> None:
    began = int(time.time())
    content = photos_zip(2, **{"0__txt": b"sks, a cup", "1__txt": b"a sks cup"})
    file = ann.files.create(file=("cups.zip", content), purpose="fine-tune")
    assert (file.object, file.filename, file.bytes) == ("file", "cups.zip", len(content))
    assert (file.purpose, file.status) == ("fine-tune", "processed")
    assert began <= file.created_at <= time.time()
    held: Any = file.model_extra
    assert held["cat"]["photos"] == ["0.png", "1.png"]
    assert held["cat"]["captions"] == ["0.txt", "1.txt"]
    one = ann.files.create(file=("mug.jpg", photo_bytes(7, kind="jpeg")), purpose="fine-tune")
    assert ann.files.retrieve(one.id).filename == "mug.jpg"
    assert [item.id for item in ann.files.list()] == [one.id, file.id]
    assert [item.id for item in ann.files.list(order="asc", limit=1)] == [file.id, one.id], "the client reads each page"
    assert ann.files.list(purpose="fine-tune", after=one.id).data[0].id == file.id

    assert ann.files.delete(file.id).deleted
    assert [item.id for item in ann.files.list()] == [one.id]
    with pytest.raises(openai.NotFoundError):
        ann.files.retrieve(file.id)
    assert not [key for key in stored_files(tmp_path / "store") if file.id in key]


def test_the_same_photos_are_one_file_as_training_reads_it(ann: openai.OpenAI, tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "cup", count=2)
    (folder / "0.txt").write_text("sks, a cup")
    (folder / "1.caption").write_text("a sks cup")
    members = {path.name: path.read_bytes() for path in folder.iterdir()}
    first = ann.files.create(file=("a.zip", zip_of(members)), purpose="fine-tune")
    wrapped = {f"cups/{name}": content for name, content in members.items()}
    system = {"cups/": b"", "cups/.DS_Store": b"x", "__MACOSX/cups/._0.png": b"x", "cups/Thumbs.db": b"x"}
    again = ann.files.create(file=("b.zip", zip_of({**system, **wrapped})), purpose="fine-tune")
    assert again.id == first.id
    (archive,) = [key for key in stored_files(tmp_path / "store") if key.endswith(".zip")]
    assert (tmp_path / "store" / archive).read_bytes() == pack_images(folder)
    read = local_images(str(tmp_path / "store" / archive), tmp_path / "cache").folder
    assert {path.name: path.read_bytes() for path in read.iterdir()} == members


def test_masks_are_told_apart_from_photos(ann: openai.OpenAI) -> None:
    white = io.BytesIO()
    Image.new("L", (40, 40), 255).save(white, "png")
    content = zip_of({"1.png": photo_bytes(), "1-mask.png": white.getvalue(), "2.png": photo_bytes(1)})
    held: Any = ann.files.create(file=("a.zip", content), purpose="fine-tune").model_extra
    assert (held["cat"]["photos"], held["cat"]["masks"]) == (["1.png", "2.png"], ["1-mask.png"])


def test_callers_do_not_see_each_others_files(live: Live, ann: openai.OpenAI) -> None:
    file = ann.files.create(file=("a.zip", photos_zip()), purpose="fine-tune")
    with client_of(live, "bob") as bob, client_of(live, "master") as admin:
        same = bob.files.create(file=("a.zip", photos_zip()), purpose="fine-tune")
        assert same.id != file.id, "nobody learns what another has sent"
        assert [item.id for item in bob.files.list()] == [same.id]
        for act in (bob.files.retrieve, bob.files.delete):
            with pytest.raises(openai.NotFoundError) as refused:
                act(file.id)
            assert refused.value.code == "file_not_found"
        with pytest.raises(openai.NotFoundError):
            bob.fine_tuning.jobs.create(model="base", training_file=file.id, suffix="cup")
        with pytest.raises(openai.BadRequestError):
            bob.files.list(after=file.id)
        assert admin.files.retrieve(file.id).id == file.id
        assert admin.files.delete(same.id).deleted
    assert ann.files.retrieve(file.id).id == file.id


def test_a_key_has_so_many_files(live: Live, ann: openai.OpenAI, tmp_path: Path) -> None:
    ids = [ann.files.create(file=("a.zip", photos_zip(1, n)), purpose="fine-tune").id for n in range(3)]
    before = stored_files(tmp_path / "store")
    with pytest.raises(openai.ConflictError, match="3 files are stored") as refused:
        ann.files.create(file=("a.zip", photos_zip(1, 9)), purpose="fine-tune")
    assert refused.value.param == "file"
    assert stored_files(tmp_path / "store") == before
    assert ann.files.create(file=("a.zip", photos_zip(1, 0)), purpose="fine-tune").id == ids[0], "it is there"
    ann.files.delete(ids[1])
    assert ann.files.create(file=("a.zip", photos_zip(1, 9)), purpose="fine-tune").id not in ids


def test_a_file_that_a_run_waits_for_stays(live: Live, ann: openai.OpenAI) -> None:
    file = ann.files.create(file=("a.zip", photos_zip()), purpose="fine-tune")
    with live.http(headers=bearer("ann")) as http:
        job = http.post(JOBS, json=job_fields(file.id)).json()
        refused = assert_refused(http.delete(f"{FILES}/{file.id}"), 409, "conflict")
        assert job["id"] in refused["message"]
        assert http.post(f"{JOBS}/{job['id']}/cancel").json()["status"] == "cancelled"
        assert http.delete(f"{FILES}/{file.id}").json() == {"id": file.id, "object": "file", "deleted": True}


def test_a_photo_that_takes_too_long_ends_the_process_and_not_the_service(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = live.app.state.ingress.training.photos
    with live.http(headers=bearer("ann")) as http:
        monkeypatch.setattr(process, "_limit_s", 0.001)
        late = assert_refused(send(http, photos_zip(20)), 400, "invalid_value", "file")
        assert "could not be read within 0.001 s; send fewer or smaller photos" in late["message"]
        assert stored_files(tmp_path / "store") == {}
        monkeypatch.setattr(process, "_limit_s", 60.0)
        assert send(http, photos_zip()).status_code == 200
        process._process.kill()
        process._process.wait()
        assert send(http, photos_zip(1)).status_code == 200, "another one is started"


def test_a_file_that_ends_the_process_is_refused(monkeypatch: pytest.MonkeyPatch, live: Live) -> None:
    monkeypatch.setattr("serve.http.training.photo_process._READER", ("/bin/sh", "-c", "read line; exit 9"))
    live.app.state.ingress.training.photos.close()  # of an earlier test; the next one is ours
    with live.http(headers=bearer("ann")) as http:
        told = assert_refused(send(http, photos_zip()), 400, "invalid_value", "file")
        assert "ended the process that reads it" in told["message"]


def test_the_process_ends_with_its_service() -> None:
    process = PhotoProcess(10.0)
    running, _ = process._running()
    process.close()
    assert running.poll() is not None


def test_no_training_where_it_is_off(tmp_path: Path) -> None:
    with training_service(tmp_path, training=False) as live, live.http() as http:
        asked = [
            send(http, photos_zip()),
            http.get(FILES),
            http.get(JOBS),
            http.post(JOBS, json=job_fields("file-anonymous-" + "0" * 24)),
            http.post(RUNS, json={"name": "a"}),
            http.get(f"{RUNS}/run-0123456789ab"),
        ]
        for response in asked:
            assert_refused(response, 403, "training_off")
    assert stored_files(tmp_path) == {}


def test_pages_of_other_sites_do_not_train(tmp_path: Path) -> None:
    origin = "https://example.com"
    with training_service(tmp_path, cors_origins=(origin,)) as live, live.http() as http:
        http.headers.update({"origin": origin, "sec-fetch-site": "cross-site"})
        assert http.get(FILES).status_code == 200
        for response in (
            send(http, photos_zip()),
            http.delete(f"{FILES}/file-anonymous-{'0' * 24}"),
            http.post(JOBS, json=job_fields("file-anonymous-" + "0" * 24)),
            http.post(RUNS, json={"name": "a"}),
            http.post(f"{RUNS}/run-0123456789ab/stop"),
            http.post(f"{JOBS}/run-0123456789ab/cancel"),
        ):
            assert_refused(response, 403, "foreign_origin")


def test_a_store_that_is_away_is_503_everywhere_and_one_that_refuses_says_so(tmp_path: Path) -> None:
    store = Troubled(tmp_path)
    with training_service(store) as live, live.http() as http:
        file = send(http, photos_zip()).json()["id"]
        run = http.post(JOBS, json=job_fields(file)).json()["id"]
        before = stored_files(tmp_path)

        def calls() -> list[httpx2.Response]:
            return [
                send(http, photos_zip(1)),
                http.post(JOBS, json=job_fields(file, "other")),
                http.post(RUNS, json={"name": "a", "adapters": [{"id": "a", "concepts": [concept(file)]}]}),
                http.get(f"{FILES}/{file}"),
                http.delete(f"{FILES}/{file}"),
                http.get(f"{JOBS}/{run}"),
                http.get(f"{JOBS}/{run}/events?stream=true"),
                http.get(f"{JOBS}/{run}/checkpoints"),
                http.post(f"{JOBS}/{run}/cancel"),
                http.get(f"{RUNS}/{run}"),
                http.get(RUNS),
            ]

        store.fails = StoreError
        for response in calls():
            error = assert_refused(response, 503, "store_unavailable")
            assert int(response.headers["retry-after"]) >= 1
            assert "example.com" not in error["message"]
        store.fails, store.fails_on = StoreRefusedError, ".zip"
        error = assert_refused(send(http, photos_zip(1)), 403, "storage_refuses")
        assert "right to write" in error["message"]
        store.fails = None
        assert stored_files(tmp_path) == before


def test_an_upload_whose_record_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    store = Troubled(tmp_path)
    with training_service(store) as live, live.http() as http:
        put = store.put

        def failing(key: str, data: bytes, *, if_absent: bool = False) -> None:
            if key.startswith("files/") and key.endswith(".json"):
                raise StoreError("no space left")
            put(key, data, if_absent=if_absent)

        store.put = failing
        assert_refused(send(http, photos_zip()), 503, "store_unavailable")
        assert stored_files(tmp_path) == {}
        store.put = put
        assert send(http, photos_zip()).status_code == 200


def concept(file_id: str) -> dict[str, str]:
    return {"token": "sks", "class_noun": "cup", "images": file_id}
