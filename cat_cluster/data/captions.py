"""Captions of a folder of photos: .txt beside each image, metadata.jsonl, or a template."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from cat_cluster.errors import ConceptError
from cat_cluster.spec.job import ConceptSpec

METADATA_NAME = "metadata.jsonl"


def read_captions(spec: ConceptSpec, folder: Path, images: Sequence[Path]) -> dict[Path, str]:
    """Return the caption of each image as `spec.captions` says; the template when `auto` finds none.

    Raises ConceptError naming the files: captions that disagree, are empty, unreadable or missing for some images.
    """
    if spec.captions == "template":
        return dict.fromkeys(images, spec.template_caption())
    beside = _read_sidecars(images) if spec.captions in ("auto", "txt") else {}
    listed = _read_metadata(folder / METADATA_NAME, images) if spec.captions in ("auto", "metadata") else {}
    if spec.captions == "metadata" and not (folder / METADATA_NAME).is_file():
        raise ConceptError(f"captions: {folder / METADATA_NAME} is not there; use captions: txt or template")
    _refuse_disagreement(folder, beside, listed)
    captions = {**listed, **beside}
    if not captions and spec.captions == "auto":
        return dict.fromkeys(images, spec.template_caption())
    missing = [image.name for image in images if image not in captions]
    if missing:
        raise ConceptError(
            f"captions: {folder}: no caption for {', '.join(missing)}; write one in {Path(missing[0]).stem}.txt "
            f"and so on or in {METADATA_NAME}, or use captions: template"
        )
    return {image: captions[image] for image in images}


def _refuse_disagreement(folder: Path, beside: Mapping[Path, str], listed: Mapping[Path, str]) -> None:
    differing = [image for image in beside if image in listed and beside[image] != listed[image]]
    if differing:
        report = [
            f"captions: {folder}: the .txt files and {METADATA_NAME} disagree on {len(differing)} of the images; "
            "say which is right with captions: txt, captions: metadata or captions: template"
        ]
        for image in differing:
            report.append(f"  {image.with_suffix('.txt').name}: {beside[image]!r}")
            report.append(f"  {METADATA_NAME}, {image.name}: {listed[image]!r}")
        raise ConceptError("\n".join(report))


def _read_sidecars(images: Sequence[Path]) -> dict[Path, str]:
    captions = {}
    for image in images:
        sidecar = image.with_suffix(".txt")
        if sidecar.is_file():
            captions[image] = _stripped(_read_text(sidecar), str(sidecar))
    return captions


def _read_metadata(path: Path, images: Sequence[Path]) -> dict[Path, str]:
    if not path.is_file():
        return {}
    # Some systems store names in decomposed Unicode, others composed; a caption file may come from either.
    by_name = {unicodedata.normalize("NFC", image.name): image for image in images}
    by_name.update({image.name: image for image in images})
    captions: dict[Path, str] = {}
    lines: dict[Path, int] = {}
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        name, text = _metadata_entry(line, f"{path}, line {number}")
        image = by_name.get(name) or by_name.get(unicodedata.normalize("NFC", name))
        if image is None:
            raise ConceptError(
                f"captions: {path}, line {number}: no image {name!r} in the folder; add it or remove the line"
            )
        if image in captions:
            raise ConceptError(
                f"captions: {path}: lines {lines[image]} and {number} both caption {name!r}; keep one of them"
            )
        captions[image], lines[image] = _stripped(text, f"{path}, line {number}"), number
    return captions


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
        raise ConceptError(f"captions: {path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise ConceptError(f"captions: {path}: cannot be read: {error.strerror}") from error


def _stripped(caption: str, place: str) -> str:
    if not caption.strip():
        raise ConceptError(f"captions: {place}: the caption is empty; write one with the token, or remove the file")
    return caption.strip()
