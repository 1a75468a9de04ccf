"""Photos that travel: archives in memory, and s3:// addresses on a real server."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from cat_cluster.data import s3_photos as inputs
from cat_cluster.data.concepts import Concept, load_concept
from cat_cluster.data.s3_photos import local_images, pack_images, store_images, unpack_images
from cat_cluster.errors import ConceptError, StoreError
from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.store import open_store
from cat_cluster.store.s3_folder import S3Folder
from tests.support.s3_server import S3Server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three photos with odd names, captions of both kinds, and files that the loader passes over."""
    folder = tmp_path / "my photos"
    folder.mkdir()
    for number, name in enumerate(("b 1.png", "a+é.jpg", "c.webp")):
        Image.new("RGB", (48, 40), (70 * number, 90, 200)).save(folder / name)
    (folder / "b 1.txt").write_text("a sks cup on a table", encoding="utf-8")
    entries = [{"file_name": "a+é.jpg", "text": "a sks cup"}, {"file_name": "c.webp", "text": "sks, a cup"}]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries), encoding="utf-8")
    (folder / "notes.docx").write_bytes(b"x")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "raw").mkdir()
    (folder / "raw" / "notes.md").write_bytes(b"x")
    return folder


def concept(images: object, cache: Path) -> Concept:
    return load_concept(ConceptSpec(token="sks", class_noun="cup", images=str(images)), cache)


def seen(concept: Concept) -> list[tuple[str, str, str, str, bytes]]:
    return [(e.path.name, e.digest, e.prompt, e.prior_prompt, e.image.tobytes()) for e in concept.examples]


def upload(server: S3Server, url: str, folder: Path) -> None:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    for path in folder.rglob("*"):
        if path.is_file():
            key = f"{prefix}/{path.relative_to(folder).as_posix()}"
            server.client().put_object(Bucket=bucket, Key=key, Body=path.read_bytes())


def test_an_archive_holds_what_the_loader_looks_at_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    data = pack_images(folder)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.namelist() == ["a+é.jpg", "b 1.png", "b 1.txt", "c.webp", "metadata.jsonl"]
    unpack_images(data, tmp_path / "new" / "copy", sha256=hashlib.sha256(data).hexdigest())
    assert seen(concept(tmp_path / "new" / "copy", tmp_path)) == seen(concept(folder, tmp_path))
    assert pack_images(tmp_path / "new" / "copy") == data


def archive_of(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), b"x")
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["../out.png", "/out.png", "a/b.png", "..", "a\\b.png", "C:x.png", "a/"])
def test_archives_whose_names_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConceptError, match="no plain file name"):
        unpack_images(archive_of("good.png", name), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way_of_an_unpacked_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConceptError, match=r"cannot write .*file is a file, not a folder; choose another place"):
        unpack_images(archive_of("a.png"), tmp_path / "file" / "new")


def test_damaged_archives_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(pack_images(folder))
    data[60] ^= 1
    with pytest.raises(ConceptError, match="another sha256"):
        unpack_images(bytes(data), tmp_path / "new", sha256=hashlib.sha256(pack_images(folder)).hexdigest())
    for damaged in (bytes(data), bytes(data[:-30]), b""):
        with pytest.raises(ConceptError, match="not a readable zip"):
            unpack_images(damaged, tmp_path / "new")
    monkeypatch.setattr(inputs, "MOST_BYTES", 1)
    with pytest.raises(ConceptError, match="one concept may have"):
        unpack_images(archive_of("a", "b"), tmp_path / "new")


def test_a_prefix_is_seen_as_the_folder_it_was_uploaded_from(
    s3_server: S3Server, s3_bucket: str, folder: Path, tmp_path: Path
) -> None:
    url, cache = f"{s3_bucket}/customers/my photos", tmp_path / "cache"
    upload(s3_server, url, folder)
    assert seen(concept(url, cache)) == seen(concept(f"{url}/", cache)) == seen(concept(folder, cache))
    first = local_images(url, cache).folder
    assert [path.name for path in (cache / "inputs").iterdir()] == [first.name]
    (folder / "b 1.txt").write_text("a sks cup in snow", encoding="utf-8")
    upload(s3_server, url, folder)
    assert local_images(url, cache).folder != first
    assert seen(concept(url, cache)) == seen(concept(folder, cache))


def test_a_stored_archive_is_seen_as_its_folder_and_read_once(
    s3_bucket: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, cache = open_store(f"{s3_bucket}/prod"), tmp_path / "cache"
    url = store_images(folder, store)
    assert url == store_images(folder, store)
    assert url.startswith(f"{s3_bucket}/prod/inputs/")
    assert seen(concept(url, cache)) == seen(concept(folder, cache))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert seen(concept(url, cache)) == seen(concept(folder, cache))


def test_addresses_without_photos_are_explained(s3_bucket: str, tmp_path: Path) -> None:
    open_store(s3_bucket).put("cup/captions.txt", b"sks")
    for url, message in (
        (f"{s3_bucket}/none", "holds nothing that could be used; check the bucket and the prefix"),
        (f"{s3_bucket}/cup", "holds no image"),
        ("s3://no-such-bucket/cup", "there is no bucket no-such-bucket"),
        (f"{s3_bucket}/{'0' * 64}.zip", f"no object {'0' * 64}.zip in storage {s3_bucket}"),
        ("s3://", "is not an S3 address"),
    ):
        with pytest.raises(ConceptError, match=f"images: .*{message}"):
            concept(url, tmp_path)


def copied(url: str, folder: Path) -> list[Path]:
    """Every object below an S3 prefix, copied into a folder."""
    source = S3Folder(url)
    return source.copy(source.files(), folder)


def test_a_prefix_is_downloaded_whole(s3_server: S3Server, s3_bucket: str, folder: Path, tmp_path: Path) -> None:
    upload(s3_server, f"{s3_bucket}/p", folder)
    paths = copied(f"{s3_bucket}/p", tmp_path / "copy")
    expected = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "copy"): path.read_bytes() for path in paths} == expected


@pytest.mark.parametrize("key", ["p/../out", "p//out", "p/a\\b", "p/./out"])
def test_names_that_would_leave_the_folder_are_refused(
    s3_server: S3Server, s3_bucket: str, tmp_path: Path, key: str
) -> None:
    s3_server.client().put_object(Bucket=s3_bucket.removeprefix("s3://"), Key=key, Body=b"x")
    with pytest.raises(StoreError, match="cannot be a file below a folder"):
        copied(f"{s3_bucket}/p", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_prefix_is_looked_through_as_a_folder_is(s3_server: S3Server, s3_bucket: str, tmp_path: Path) -> None:
    folder, cache, url = tmp_path / "phone", tmp_path / "cache", f"{s3_bucket}/phone"
    (folder / "work").mkdir(parents=True)
    for name, format in (("0.jfif", "JPEG"), ("1.avif", "AVIF"), ("IMG_2", "PNG")):
        Image.new("RGB", (48, 40), "red").save(folder / name, format)
    (folder / "0.caption").write_text("sks, a cup")
    (folder / "1.TXT").write_text("sks, a mug")
    (folder / "metadata.csv").write_text("file_name,text\nIMG_2,a sks cup\n")
    for name in ("notes.docx", "design.json"):
        (folder / name).write_bytes(b"x")
    (folder / "work" / "notes.md").write_bytes(b"x")
    upload(s3_server, url, folder)
    there, here = concept(url, cache), concept(folder, cache)
    assert seen(there) == seen(here)
    assert len(there.examples) == 3
    assert there.captions_from == here.captions_from == ".caption files and .txt files and metadata.csv"
    assert there.passed_over == here.passed_over == ("design.json", "notes.docx", "work")
    (folder / "3.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "3.txt").write_text("sks by night")
    upload(s3_server, url, folder)
    with pytest.raises(ConceptError, match=r"3\.heic: is not a readable image"):
        concept(url, cache)


def test_photos_below_a_prefix_are_refused_by_name(s3_server: S3Server, s3_bucket: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "10_sks cup" / "day").mkdir(parents=True)
    Image.new("RGB", (48, 40), "red").save(folder / "10_sks cup" / "day" / "0.jpg")
    upload(s3_server, f"{s3_bucket}/set", folder)
    for place in ("set/10_sks cup has photos or captions in its subfolder 'day'", "set has .* subfolder '10_sks cup'"):
        with pytest.raises(ConceptError, match=place):
            concept(f"{s3_bucket}/set", tmp_path / "cache")
        Image.new("RGB", (48, 40), "red").save(folder / "1.jpg")
        upload(s3_server, f"{s3_bucket}/set", folder)
    s3_server.client().put_object(Bucket=s3_bucket.removeprefix("s3://"), Key="clips/clip.mov", Body=b"x")
    with pytest.raises(ConceptError, match=r"clips holds no image but clip\.mov"):
        concept(f"{s3_bucket}/clips", tmp_path / "cache")


def test_a_prefix_around_a_single_folder_of_kohyas_is_read_as_that_one(
    s3_server: S3Server, s3_bucket: str, tmp_path: Path
) -> None:
    folder, cache, url = tmp_path / "train", tmp_path / "cache", f"{s3_bucket}/train"
    (folder / "10_sks cup").mkdir(parents=True)
    Image.new("RGB", (48, 40), "red").save(folder / "10_sks cup" / "0.png")
    (folder / "10_sks cup" / "notes.docx").write_bytes(b"x")
    upload(s3_server, url, folder)  # where nothing but the folder is directly below the prefix
    assert seen(concept(url, cache)) == seen(concept(folder, cache))
    (folder / "settings.toml").write_bytes(b"x")
    upload(s3_server, url, folder)
    there, here = concept(url, cache), concept(folder, cache)
    assert seen(there) == seen(here)
    assert there.passed_over == here.passed_over == ("notes.docx", "settings.toml")
    assert there.warnings == here.warnings
    assert "the 10 of '10_sks cup'" in there.warnings[0]
