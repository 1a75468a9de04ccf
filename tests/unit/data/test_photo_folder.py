"""Folders as users have them: what is a photo by name or content, and nothing like one is passed over in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image

from cat_cluster.data.concepts import Concept, load_concept
from cat_cluster.data.photo_folder import find_images
from cat_cluster.data.photos import IMAGE_SUFFIXES
from cat_cluster.data.s3_photos import pack_images, unpack_images
from cat_cluster.errors import ConceptError
from cat_cluster.spec.concept import ConceptSpec

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)


def save(path: Path, format: str | None = None) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", (48, 40), (90, 160, 60)).save(path, format)
    return path


def concept(folder: Path) -> Concept:
    return load_concept(ConceptSpec(token="sks", class_noun="cup", images=str(folder)))


def refusal(folder: Path) -> str:
    with pytest.raises(ConceptError) as caught:
        concept(folder)
    return str(caught.value)


def test_photos_of_a_phone_and_of_the_web_are_all_used(tmp_path: Path) -> None:
    for name in ("0.jpg", "1.avif", "2.AVIF", "3.jfif"):
        save(tmp_path / name, "AVIF" if "avif" in name.lower() else "JPEG")
    found = concept(tmp_path)
    assert [example.path.name for example in found.examples] == ["0.jpg", "1.avif", "2.AVIF", "3.jfif"]
    assert found.passed_over == ()
    for example in found.examples:
        colour = example.image.getpixel((20, 20))
        assert isinstance(colour, tuple)
        assert max(abs(a - b) for a, b in zip(colour, (90, 160, 60), strict=True)) <= 4


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_suffix_that_is_promised_is_read(tmp_path: Path, suffix: str) -> None:
    made = {".jif": "JPEG", ".j2k": "JPEG2000", ".jpx": "JPEG2000", ".jpf": "JPEG2000"}
    path = tmp_path / f"a{suffix}"
    if suffix == ".pbm":
        Image.new("1", (48, 40), 1).save(path)
    elif suffix == ".pgm":
        Image.new("L", (48, 40), 90).save(path)
    else:
        save(path, made.get(suffix))
    assert [example.image.size for example in concept(tmp_path).examples] == [(48, 40)]


@pytest.mark.parametrize("name", ["1.dng", "1.jxl", "1.psd"])
def test_photos_of_a_format_that_is_not_read_are_refused_by_name(tmp_path: Path, name: str) -> None:
    save(tmp_path / "0.jpg")
    # A raw photo begins as a TIFF with a thumbnail, which must not be taken for the photo.
    save(tmp_path / name, "TIFF") if name == "1.dng" else (tmp_path / name).write_bytes(b"x")
    message = refusal(tmp_path)
    assert f"{tmp_path / name}: is a " in message
    assert "save it as JPEG or PNG" in message
    assert "0.jpg" not in message


def test_the_content_counts_where_the_name_says_little_or_lies(tmp_path: Path) -> None:
    save(tmp_path / "IMG_0001", "JPEG")
    save(tmp_path / "a.jpg", "PNG")
    (tmp_path / "LICENSE").write_text("text")
    found = concept(tmp_path)
    assert [example.path.name for example in found.examples] == ["IMG_0001", "a.jpg"]
    assert found.passed_over == ("LICENSE",)
    (tmp_path / "b.jpg").write_bytes(HEIC)
    assert "b.jpg: is not a readable image, or is cut off (Invalid input" in refusal(tmp_path)


@pytest.mark.parametrize(
    "deep", ["10_sks cup/day/a.jpg", "0_sks cup/a.jpg", "raw/2024/a.heic", "captions/0.txt", "x/0.caption"]
)
def test_photos_and_captions_in_subfolders_are_refused_by_name(tmp_path: Path, deep: str) -> None:
    path = tmp_path / deep
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    name = deep.partition("/")[0]
    if name == "10_sks cup":  # which is read in place of the folder around it
        assert "photos or captions in its subfolder 'day'" in refusal(tmp_path)
    for with_photo in (name == "10_sks cup", True):
        if with_photo:
            save(tmp_path / "0.jpg")
        message = refusal(tmp_path)
        assert f"photos or captions in its subfolder '{name}'" in message
        assert f"give {tmp_path}/{name} as the images" in message


def test_the_folder_around_a_single_one_of_kohyas_is_read_as_that_one(tmp_path: Path) -> None:
    train = tmp_path / "train"
    photo = save(train / "10_sks cup" / "0.png")
    (train / "10_sks cup" / "notes.docx").write_bytes(b"x")
    (train / "log").mkdir()
    (train / "settings.toml").write_bytes(b"x")
    around, inside = concept(train), concept(train / "10_sks cup")
    assert [example.path for example in around.examples] == [photo]
    assert [e.digest for e in around.examples] == [e.digest for e in inside.examples]
    assert around.passed_over == ("log", "notes.docx", "settings.toml")
    assert inside.passed_over == ("notes.docx",)
    assert around.warnings == inside.warnings
    assert pack_images(train) == pack_images(train / "10_sks cup")
    (train / "metadata.jsonl").write_text('{"file_name": "10_sks cup/0.png", "text": "a sks cup"}')
    assert "in its subfolder '10_sks cup'" in refusal(train)


def test_several_folders_of_kohyas_are_refused_with_the_concepts_to_write(tmp_path: Path) -> None:
    names = ("10_sks cup", "5_zwx big fish", "2_ohwx")
    for name in names:
        save(tmp_path / name / "0.png")
    message = refusal(tmp_path)
    text = message[message.index("concepts:") :]
    written = yaml.safe_load(text)["concepts"]
    assert [one["images"] for one in written] == [str(tmp_path / name) for name in sorted(names)]
    assert [(one["token"], one.get("class_noun")) for one in written] == [
        ("sks", "cup"),
        ("ohwx", None),
        ("zwx", "big fish"),
    ]
    for one in written:
        found = load_concept(ConceptSpec(**{"class_noun": "man", **one}))
        assert [example.path.parent for example in found.examples] == [Path(one["images"])]
    save(tmp_path / "more" / "0.png")
    assert "give " in refusal(tmp_path)
    assert "concepts:" not in refusal(tmp_path)


def test_two_folders_of_one_concept_are_refused_with_the_remedy(tmp_path: Path) -> None:
    for name in ("10_sks cup", "5_SKS Cup"):
        save(tmp_path / name / "0.png")
    assert "those of one concept belong in one folder" in refusal(tmp_path)


def test_what_a_folders_name_says_and_is_not_done_is_a_warning(tmp_path: Path) -> None:
    def warnings(name: str) -> tuple[str, ...]:
        save(tmp_path / name / "0.png")
        return concept(tmp_path / name).warnings

    assert warnings("photos") == warnings("1_sks cup") == warnings("01_cup") == warnings("0_x") == ()
    [repeats] = warnings("10_SKS cup")
    assert "the 10 of '10_SKS cup', the repeats of kohya's trainer, changes nothing" in repeats
    named, repeats = warnings("3_zwx fish")
    assert "'3_zwx fish' is named for 'zwx fish'" in named
    assert "sks cup is taught from it" in named
    assert "the 3 of" in repeats


def test_what_is_passed_over_is_listed_and_what_the_system_left_is_not(tmp_path: Path) -> None:
    save(tmp_path / "0.jpg")
    for name in ("notes.docx", "0.jpg~", "IMG_1.mov", ".DS_Store", "Thumbs.db", "._0.jpg"):
        (tmp_path / name).write_bytes(b"x")
    for deep in ("__MACOSX/._0.jpg", ".thumbnails/0.jpg", "work/.cache/0.jpg", "work/notes.md", "@eaDir/0.jpg"):
        (tmp_path / deep).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / deep).write_bytes(b"x")
    (tmp_path / "album.png").mkdir()
    found = concept(tmp_path)
    assert [example.path.name for example in found.examples] == ["0.jpg"]
    assert found.passed_over == ("0.jpg~", "IMG_1.mov", "album.png", "notes.docx", "work")


def test_a_folder_without_photos_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "IMG_1.mov").write_bytes(b"x")
    with pytest.raises(ConceptError, match=r"holds no image but IMG_1\.mov; put photos there"):
        find_images(tmp_path)


def test_an_archive_takes_along_all_that_was_read(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for name in ("0.avif", "1.jfif", "2.png"):
        save(folder / name)
    save(folder / "3", "PNG")
    (folder / "0.caption").write_text("sks, a cup")
    (folder / "1.jfif.txt").write_text("sks, a cup by day")
    (folder / "2.TXT").write_text("sks, a cup by night")
    (folder / "metadata.csv").write_text("file_name,text\n3,sks in snow\n")
    unpack_images(pack_images(folder), tmp_path / "copy")
    here, there = concept(folder), concept(tmp_path / "copy")
    assert here.captions_from == ".caption files and .txt files and metadata.csv"
    assert [(e.digest, e.prompt) for e in here.examples] == [(e.digest, e.prompt) for e in there.examples]
    assert [e.prompt for e in here.examples] == [
        "sks, a cup",
        "sks, a cup by day",
        "sks, a cup by night",
        "sks in snow",
    ]
