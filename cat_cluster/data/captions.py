"""Captions of a folder of photos: a text file beside each, metadata.jsonl or metadata.csv, or a template."""

from __future__ import annotations

import csv
import io
import itertools
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cat_cluster.data.photo_folder import (
    CAPTION_SUFFIXES,
    METADATA_NAMES,
    is_hidden,
    looks_like_captions,
    suffix_of,
)
from cat_cluster.errors import ConceptError
from cat_cluster.spec.characters import control_character, shown_name
from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.spec.fields import words

_LARGEST_NOTE = 65_536  # bytes of a text file that is no photo's; a longer one is no caption


@dataclass(frozen=True)
class Captions:
    """The caption of each photo. source: where they come from, in words; files: those they were read from."""

    by_image: Mapping[Path, str]
    source: str
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class _Found:
    """A caption with the file that holds it and the place in it, as messages name them."""

    text: str
    file: Path
    place: str


def read_captions(spec: ConceptSpec, folder: Path, images: Sequence[Path]) -> Captions:
    """Return the caption of each image as `spec.captions` says; the template when `auto` finds none.

    Raises ConceptError naming the files: captions that disagree, are empty, unreadable, missing for some images, or of
    a kind that is not read.
    """
    template = Captions(dict.fromkeys(images, spec.template_caption()), f"the template {spec.template_caption()!r}")
    if spec.captions == "template":
        return template
    metadata = _metadata_files(folder)
    if spec.captions == "metadata" and not metadata:
        raise ConceptError(
            f"captions: {folder / METADATA_NAMES[0]} is not there, nor is {METADATA_NAMES[1]}; use captions: txt or "
            "template"
        )
    beside = _read_sidecars(images) if spec.captions in ("auto", "txt") else []
    listed = [_read_metadata(path, images) for path in metadata] if spec.captions in ("auto", "metadata") else []
    found: dict[Path, list[_Found]] = {}
    for image, caption in (*beside, *(entry for entries in listed for entry in entries.items())):
        found.setdefault(image, []).append(caption)
    _refuse_disagreement(folder, found)
    missing = [shown_name(image.name) for image in images if image not in found]
    unread = _unread_captions(spec, folder, images, itertools.chain(*found.values()))
    if not found and spec.captions == "auto" and not unread:
        return template
    if missing:
        raise ConceptError(_missing(folder, missing, unread))
    files = tuple(dict.fromkeys(one.file for image in images for one in found[image]))
    return Captions({image: found[image][0].text for image in images}, _source(files), files)


def caption_files(folder: Path, images: Sequence[Path]) -> list[Path]:
    """Return the files of a folder that captions of these images may be read from."""
    return [*(path for _, path in _sidecars(images)), *_metadata_files(folder)]


def _source(files: Iterable[Path]) -> str:
    kinds = [path.name if _is_metadata(path.name) else f"{suffix_of(path.name)} files" for path in files]
    return " and ".join(dict.fromkeys(kinds))


def _missing(folder: Path, missing: Sequence[str], unread: Sequence[str]) -> str:
    shown = f"{', '.join(missing[:10])}{f' and {len(missing) - 10} more' if len(missing) > 10 else ''}"
    message = (
        f"captions: {folder}: no caption for {shown}; write one in {Path(missing[0]).stem}.txt and so on or in "
        f"{METADATA_NAMES[0]}, or use captions: template"
    )
    return f"{message} ({', '.join(unread)} may hold captions, but not where they are read)" if unread else message


def _unread_captions(spec: ConceptSpec, folder: Path, images: Sequence[Path], captions: Iterable[_Found]) -> list[str]:
    """Return the names of files that look like captions and are not read: the template must not silently replace them.

    They look so by their name; of .txt files only those do that have the token in them, any other may be a note.
    """
    photos = {path.name for path in images}
    used = {one.file.name for one in captions} | photos
    return [
        shown_name(path.name)
        for path in sorted(folder.iterdir())
        if path.name not in used
        and not is_hidden(path.name)
        and looks_like_captions(path.name, photos)
        and path.is_file()
        and (suffix_of(path.name) != ".txt" or spec.token.casefold() in words(_note(path)))
    ]


def _note(path: Path) -> str:
    try:
        if path.stat().st_size <= _LARGEST_NOTE:
            return path.read_bytes().decode("utf-8", "replace")
    except OSError:
        pass  # nothing asks for this file
    return ""


def _refuse_disagreement(folder: Path, found: Mapping[Path, Sequence[_Found]]) -> None:
    differing = [(image, captions) for image, captions in found.items() if len({one.text for one in captions}) > 1]
    if differing:
        kinds = _source(one.file for _, captions in differing for one in captions)
        report = [
            f"captions: {folder}: {kinds} disagree on {len(differing)} of the images; keep one of them, or say which "
            "is right with captions: txt, captions: metadata or captions: template"
        ]
        report += [f"  {one.place}: {one.text!r}" for _, captions in differing for one in captions]
        raise ConceptError("\n".join(report))


def _sidecars(images: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """Yield each image with each text file beside it: 1.txt or 1.jpg.txt for 1.jpg, whatever the letters' case."""
    if not images:
        return
    names = {path.name for path in images[0].parent.iterdir() if suffix_of(path.name) in CAPTION_SUFFIXES}
    by_key: dict[str, list[str]] = {}
    for name in sorted(names):
        by_key.setdefault(_key(name), []).append(name)
    for image in images:
        for wanted in (start + suffix for suffix in CAPTION_SUFFIXES for start in (image.stem, image.name)):
            # Where case counts, A.txt is the caption of A.jpg and a.txt that of a.jpg.
            for name in [wanted] if wanted in names else by_key.get(_key(wanted), ()):
                if image.with_name(name).is_file():
                    yield image, image.with_name(name)


def _key(name: str) -> str:
    # Some systems store names in decomposed Unicode, others composed; a caption file may come from either.
    return unicodedata.normalize("NFC", name).casefold()


def _read_sidecars(images: Sequence[Path]) -> list[tuple[Path, _Found]]:
    return [
        (image, _Found(_stripped(_read_text(path), shown_name(path)), path, shown_name(path.name)))
        for image, path in _sidecars(images)
    ]


def _is_metadata(name: str) -> bool:
    return name.casefold() in METADATA_NAMES


def _metadata_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _is_metadata(path.name) and path.is_file())


def _read_metadata(path: Path, images: Sequence[Path]) -> dict[Path, _Found]:
    by_name = {unicodedata.normalize("NFC", image.name): image for image in images}
    by_name.update({image.name: image for image in images})
    captions: dict[Path, _Found] = {}
    lines: dict[Path, int] = {}
    for number, name, text in _entries(path):
        place = f"{path}, line {number}"
        image = by_name.get(name) or by_name.get(unicodedata.normalize("NFC", name))
        if image is None:
            raise ConceptError(f"captions: {place}: no image {name!r} in the folder; add it or remove the line")
        if image in captions:
            raise ConceptError(
                f"captions: {path}: lines {lines[image]} and {number} both caption {name!r}; keep one of them"
            )
        captions[image] = _Found(_stripped(text, place), path, f"{path.name}, {shown_name(image.name)}")
        lines[image] = number
    return captions


def _entries(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line number, file name and caption of each entry."""
    text = _read_text(path)
    if suffix_of(path.name) == ".csv":
        yield from _csv_entries(text, path)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, *_metadata_entry(line, f"{path}, line {number}")


def _csv_entries(text: str, path: Path) -> Iterator[tuple[int, str, str]]:
    remedy = 'the first line is file_name,text and each other like 1.jpg,"sks, a cup"'
    heading = text.partition("\n")[0]
    # Spreadsheets write semicolons where a comma stands in numbers.
    separator = max(",;\t", key=heading.count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        if header.count("file_name") != 1 or header.count("text") != 1:
            raise ConceptError(f"captions: {path}: lacks a column file_name or text; {remedy}")
        for row in rows:
            place = f"{path}, line {rows.line_num}"
            if not any(field.strip() for field in row):
                continue
            if len(row) != len(header):
                raise ConceptError(
                    f"captions: {place}: has {len(row)} fields, the first line {len(header)}; put a caption with "
                    f"{separator!r} in it in quotes: {remedy}"
                )
            yield rows.line_num, row[header.index("file_name")].strip(), row[header.index("text")]
    except csv.Error as error:
        raise ConceptError(f"captions: {path}, line {rows.line_num}: is not CSV ({error}); {remedy}") from error


def _metadata_entry(line: str, place: str) -> tuple[str, str]:
    remedy = 'each line is written like {"file_name": "1.jpg", "text": "sks, a cup"}'
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConceptError(f"captions: {place}: is not JSON ({error}); {remedy}") from error
    name, text = (entry.get("file_name"), entry.get("text")) if isinstance(entry, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(text, str):
        raise ConceptError(f"captions: {place}: lacks file_name or text; {remedy}")
    return name, text


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConceptError(
            f"captions: {shown_name(path)}: is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise ConceptError(f"captions: {shown_name(path)}: cannot be read: {error.strerror}") from error


def _stripped(caption: str, place: str) -> str:
    if not caption.strip():
        raise ConceptError(f"captions: {place}: the caption is empty; write one with the token, or remove the file")
    if (control := control_character(caption)) is not None:
        raise ConceptError(
            f"captions: {place}: the caption holds the control character {control!r}; remove it, or type the caption "
            "anew"
        )
    return caption.strip()
