"""More than five hundred uploads that are wrong in some way: each is refused by its reason, and nothing is stored."""

from __future__ import annotations

import http.client
import io
import json
import random
import stat
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from tests.support.tiny_jobs import stored_files
from tests.support.training_http import FILES, photo_bytes, photos_zip, training_service, zip_of

pytestmark = pytest.mark.slow

BOUNDARY = b"----edge"
PHOTO = photo_bytes()
MOST_BYTES, MOST_FILES, MOST_PIXELS = 300_000, 20, 1_000_000


class Wrong(NamedTuple):
    """A body, and what its refusal must say."""

    body: bytes
    told: str = ""
    content_type: bytes = b"multipart/form-data; boundary=" + BOUNDARY


def form(content: bytes, name: str = "photos.zip", purpose: bytes | None = b"fine-tune", more: bytes = b"") -> bytes:
    parts = [b'Content-Disposition: form-data; name="file"; filename="%b"\r\n\r\n%b' % (name.encode(), content)]
    if purpose is not None:
        parts.append(b'Content-Disposition: form-data; name="purpose"\r\n\r\n' + purpose)
    if more:
        parts.append(more)
    return b"".join(b"--" + BOUNDARY + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + BOUNDARY + b"--\r\n"


def entry_zip(name: str, content: bytes = PHOTO, *, mode: int = 0, method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of a photo and an entry of this name, kind and method."""
    kept = io.BytesIO()
    with zipfile.ZipFile(kept, "w") as archive:
        archive.writestr("0.png", photo_bytes(9))
        entry = zipfile.ZipInfo(name)
        entry.create_system, entry.external_attr, entry.compress_type = 3, mode << 16, method
        archive.writestr(entry, content)
    return kept.getvalue()


def wrong_forms() -> Iterator[Wrong]:
    chance, good = random.Random(0), form(photos_zip())
    yield from (Wrong(good[:end]) for end in range(0, len(good) - 10, len(good) // 80))
    yield from (Wrong(chance.randbytes(chance.randrange(0, 300))) for _ in range(30))
    yield from (
        Wrong(good, "multipart/form-data", kind)
        for kind in (b"application/json", b"application/zip", b"multipart/form-data", b"text/plain", b"", b"\xff")
    )
    yield from (
        Wrong(form(PHOTO, purpose=purpose), "purpose")
        for purpose in (b"", b"batch", b"assistants", b"Fine-Tune", b"fine-tune ", b"\xff", b"a" * 290_000, b"vision")
    )
    yield Wrong(form(PHOTO, purpose=None), "purpose: is missing")
    field = b'Content-Disposition: form-data; name="%b"\r\n\r\n%b'
    yield Wrong(form(PHOTO, more=field % (b"purpose", b"fine-tune")), "purpose: was sent twice")
    yield Wrong(form(PHOTO, more=field % (b'file"; filename="b.png', PHOTO)), "file: was sent twice")
    yield from (
        Wrong(form(PHOTO, more=field % (name, b"1")), "no such parameter")
        for name in (b"expires_after[anchor]", b"files", b"File", b"model", b"x" * 500, b"__proto__")
    )
    only = b"--" + BOUNDARY + b"\r\n" + field % (b"purpose", b"fine-tune") + b"\r\n--" + BOUNDARY + b"--\r\n"
    yield Wrong(only, "file: is missing")
    yield Wrong(only.replace(b'name="purpose"\r\n\r\nfine-tune', b'name="file"\r\n\r\nabc'), "purpose: is missing")
    yield Wrong(
        only.replace(b"--edge--", b"--edge\r\n" + field % (b"file", PHOTO) + b"\r\n------edge--"), "sent as text"
    )
    yield Wrong(form(b""), "empty")
    yield Wrong(form(photo_bytes(side=400)), "larger than")  # noise: 480 kB


def wrong_names() -> Iterator[Wrong]:
    out = "leads out of the folder"
    for name in ("../x.png", "..\\x.png", "../../etc/cron.d/x.png", "a/../../x.png", "/x.png", "/etc/passwd", "\\x.png",
                 "C:\\x.png", "C:x.png", "\\\\host\\x.png", "a\\b.png", "..", "../", "a/..", "a/../x.png",
                 "x.png:stream", "file:///x.png", "//x.png"):  # fmt: skip
        yield Wrong(form(entry_zip(name)), out)
    for name in ("./x.png", "a//x.png", ".", "a/./x.png", "x\n.png", "x\x1b[2J.png", "x\x07.png", "n" * 300 + ".png",
                 "x\x7f.png", "x\r.png"):  # fmt: skip
        yield Wrong(form(entry_zip(name)), "no name that a file can have")
    yield from (
        Wrong(form(entry_zip(name)), "lies in a folder") for name in ("a/x.png", "a/b/x.png", "photos/more/x.png")
    )
    for kind, told in ((stat.S_IFLNK, "is a link"), (stat.S_IFIFO, "no plain file"), (stat.S_IFCHR, "no plain file"),
                       (stat.S_IFBLK, "no plain file"), (stat.S_IFSOCK, "no plain file")):  # fmt: skip
        yield from (
            Wrong(form(entry_zip(name, target, mode=kind | 0o777)), told)
            for name in ("x.png", "x", "x.txt")
            for target in (b"/etc/passwd", b"0.png")
        )
    for first, second in (
        ("x.png", "X.png"),
        ("\u00e9.png", "e\u0301.png"),
        ("x.PNG", "x.png"),
        ("stra\u00dfe.png", "STRASSE.png"),
    ):
        yield Wrong(form(zip_of({first: PHOTO, second: PHOTO})), "has the same name")
    with pytest.warns(UserWarning, match="Duplicate name"):
        yield Wrong(form(entry_zip("0.png")), "has the same name")


def wrong_archives() -> Iterator[Wrong]:
    chance = random.Random(1)
    good = photos_zip(2)
    stored = zip_of({"0.png": PHOTO, "1.png": photo_bytes(1)}, zipfile.ZIP_STORED)
    yield from (Wrong(form(good[:end])) for end in range(1, len(good) - 1, len(good) // 80))
    for _ in range(90):  # in the bytes of the first photo, which have a checksum
        place = chance.randrange(60, 60 + len(PHOTO) - 60)
        yield Wrong(
            form(stored[:place] + bytes([stored[place] ^ 1 << chance.randrange(8)]) + stored[place + 1 :]), "zip"
        )
    encrypted = bytearray(stored)
    encrypted[6] |= 1
    encrypted[stored.index(b"PK\x01\x02") + 8] |= 1
    yield Wrong(form(bytes(encrypted)), "'0.png' is encrypted")
    for method in (1, 6, 9, 12 + 1, 19, 95, 97, 99):
        odd = bytearray(stored)
        odd[8:10] = odd[stored.index(b"PK\x01\x02") + 10 : stored.index(b"PK\x01\x02") + 12] = method.to_bytes(
            2, "little"
        )
        yield Wrong(form(bytes(odd)), "not a readable zip")
    yield Wrong(form(zip_of({})), "no files")
    yield from (
        Wrong(form(zip_of({name: b"x"})), "no files") for name in (".DS_Store", "__MACOSX/._0.png", "Thumbs.db")
    )
    yield Wrong(form(zip_of({f"{number}.txt": b"" for number in range(MOST_FILES + 1)})), f"{MOST_FILES} are read")
    yield Wrong(form(zip_of({f"{number}.txt": b"" for number in range(2500)})), f"{MOST_FILES} are read")
    for kind in ("txt", "caption", "png", "bmp"):
        for size in (100_000, 550_000):
            yield Wrong(form(zip_of({"0.png": PHOTO, f"0.{kind}": bytes(size)})), f"0.{kind}' unpacks to more than")
    yield Wrong(form(zip_of({f"{number}.txt": b"ab" * 30_000 for number in range(15)})), "bytes unpacked")
    liar = bytearray(stored)
    place = stored.index(b"PK\x01\x02") + 24
    for size in (0, 1, len(PHOTO) - 1, len(PHOTO) + 1, 2**31, 2**32 - 2):
        liar[place : place + 4] = size.to_bytes(4, "little")
        yield Wrong(form(bytes(liar)))
    inner = {"x.zip": photos_zip(1), "x.tar": b"x", "x.tar.gz": b"x", "x.7z": b"x", "x.rar": b"x", "x.tgz": b"x"}
    yield from (
        Wrong(form(zip_of({"0.png": PHOTO, name: held})), "is an archive itself") for name, held in inner.items()
    )
    starts = (photos_zip(1), b"\x1f\x8b\x08\x00", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"\xfd7zXZ\x00", b"BZh9")
    yield from (
        Wrong(form(zip_of({"0.png": PHOTO, name: start + bytes(8)})), f"'{name}' is an archive itself")
        for start in starts
        for name in ("1.png", "0.txt", "photo")
    )


def wrong_members() -> Iterator[Wrong]:
    chance = random.Random(2)
    others = ("x.pdf", "x.exe", "x.html", "x.js", "x.py", "x.mp4", "x.docx", "x.safetensors", "x.pkl", "x.json", "x.sh")
    yield from (Wrong(form(zip_of({"0.png": PHOTO, name: b"x"})), f"'{name}' is neither a photo") for name in others)
    yield from (
        Wrong(form(zip_of({"0.png": PHOTO, name: PHOTO})), name) for name in ("x.svg", "x.psd", "x.cr2", "x.eps")
    )
    photos = {kind: photo_bytes(3, 48, kind) for kind in ("png", "jpeg", "webp", "gif", "tiff", "bmp")}
    for kind, whole in photos.items():
        yield from (
            Wrong(form(zip_of({"0.png": PHOTO, f"cut.{kind}": whole[:end]})), f"cut.{kind}")
            for end in (0, 1, 8, 20, len(whole) // 3)
        )
        yield Wrong(form(zip_of({"0.png": PHOTO, f"noise.{kind}": chance.randbytes(500)})), f"noise.{kind}")
    for width, height in ((1, 1), (31, 64), (64, 31), (8, 8), (2000, 33), (33, 1000), (1100, 1000)):
        kept = io.BytesIO()
        Image.frombytes("RGB", (width, height), random.Random(3).randbytes(3 * width * height)).save(
            kept, "webp", quality=1
        )
        yield Wrong(form(zip_of({"0.png": PHOTO, "odd.webp": kept.getvalue()})), "odd.webp")
    huge = bytearray(PHOTO)
    huge[16:24] = (2**31 - 1).to_bytes(4, "big") * 2
    yield Wrong(form(zip_of({"0.png": PHOTO, "huge.png": bytes(huge)})), "huge.png")
    scan = b"\xff\xda\x00\x0c\x03\x01\x00\x02\x11\x03\x11\x00\x3f\x00"
    jpeg = photos["jpeg"]
    yield Wrong(form(zip_of({"scans.jpeg": jpeg[:-2] + scan * 200 + jpeg[-2:]})), "scans")
    for encoding in ("utf-16", "utf-32", "latin-1"):
        caption = "sks, caf\u00e9".encode(encoding)
        yield Wrong(form(photos_zip(**{"0__txt": caption})), "0.txt: is not UTF-8")
        yield Wrong(form(photos_zip(metadata__jsonl=caption)), "metadata.jsonl: is not UTF-8")
    yield from (
        Wrong(form(photos_zip(**{name: b"x"})), "text of no photo") for name in ("7__txt", "notes__txt", "a__caption")
    )
    for size, told in ((41, "mask of"), (40, "black and white")):
        yield Wrong(form(zip_of({"0.png": PHOTO, "0-mask.png": photo_bytes(5, size)})), told)
    black = io.BytesIO()
    Image.new("L", (40, 40)).save(black, "png")
    yield Wrong(form(zip_of({"0.png": PHOTO, "0-mask.png": black.getvalue()})), "marks nothing")
    masks = {"0.png": PHOTO, "0-mask.png": PHOTO, "0-masklabel.png": PHOTO}
    yield Wrong(form(zip_of(masks)), "several")
    yield Wrong(form(zip_of({"0.txt": b"sks"})), "no photo")


def wrong_pictures() -> Iterator[Wrong]:
    chance = random.Random(4)
    for name in ("a.png", "a.jpg", "a", "a.zip", "a.txt", "../a.png", "", "\u202egnp.a", "a" * 300, "C:\\a.heic"):
        yield Wrong(form(chance.randbytes(200), name), "file")
        yield Wrong(form(b"sks, a cup", name), "file")
    yield from (Wrong(form(PHOTO[:end], "a.png"), "a.png") for end in range(1, len(PHOTO), len(PHOTO) // 12))
    yield from (
        Wrong(form(held, "a.png"), "archive") for held in (b"\x1f\x8b\x08", b"Rar!\x1a\x07\x00", b"PK\x03\x04abc")
    )
    yield from (
        Wrong(form(held, "a"), "neither") for held in (b"%PDF-1.7", b"MZ\x90", b"\x7fELF", b"<svg/>", b"\x80\x04.")
    )


def test_malformed_uploads_are_refused_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    codes: Counter[str] = Counter()
    options = {"max_photos_bytes": MOST_BYTES, "max_photos": MOST_FILES, "max_photo_pixels": MOST_PIXELS}
    with training_service(tmp_path / "store", **options) as live, live.http() as client:
        sent = client.post(FILES, data={"purpose": "fine-tune"}, files={"file": ("a.zip", photos_zip())})
        assert sent.status_code == 200, sent.text
        before = stored_files(tmp_path / "store")
        connection = http.client.HTTPConnection("127.0.0.1", int(live.url.rpartition(":")[2]), timeout=60)
        kinds = (wrong_forms(), wrong_names(), wrong_archives(), wrong_members(), wrong_pictures())
        for wrong in (one for kind in kinds for one in kind):
            codes[refused(connection, wrong)] += 1
        connection.close()
        assert stored_files(tmp_path / "store") == before
        assert list(scratch.iterdir()) == []
        again = client.post(FILES, data={"purpose": "fine-tune"}, files={"file": ("b.zip", photos_zip())})
        assert again.json()["id"] == sent.json()["id"], "it still reads what is right"
    assert codes.total() >= 500, codes
    assert set(codes) == {
        *("invalid_value", "invalid_form", "missing_parameter", "unknown_parameter", "not_multipart", "body_too_large")
    }


def refused(connection: http.client.HTTPConnection, wrong: Wrong) -> str:
    """See that an upload is refused with what it must say; the code of the refusal."""
    connection.request("POST", FILES, wrong.body, {"Content-Type": wrong.content_type.decode("latin-1")})
    answer = connection.getresponse()
    content = answer.read()
    about = f"{wrong.told!r} {wrong.body[:80]!r}: {answer.status} {content[:400]!r}"
    assert 400 <= answer.status < 500, about
    error = json.loads(content)["error"]
    assert wrong.told in error["message"], about
    assert error["message"], about
    assert "/scratch/" not in error["message"], about
    assert error["code"] in ("invalid_form", "not_multipart", "body_too_large") or error["param"], about
    return str(error["code"])
