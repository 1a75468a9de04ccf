"""What lies in a folder of photos: which files are photos, and what in it would be lost if it were passed over."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path, PurePosixPath

from cat_cluster.data.heif import HEIF_SUFFIXES
from cat_cluster.data.photos import IMAGE_SUFFIXES, UNREAD_SUFFIXES, opens_as_image
from cat_cluster.errors import ConceptError
from cat_cluster.spec.characters import shown_name
from cat_cluster.spec.folder_name import FolderName, read_folder_name

CAPTION_SUFFIXES = (".txt", ".caption")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
# Where other programs keep captions. They are not read, and so are no reason to teach the template instead.
_OTHER_CAPTION_SUFFIXES = (
    *(".captions", ".cap", ".text", ".tag", ".tags", ".wildcard"),
    *(".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".xls", ".xlsx"),
)
_NOTE_SUFFIXES = (".json", ".yaml", ".yml")  # captions by their name alone: the file of a photo, or one of all
_CAPTION_WORDS = ("metadata", "caption", "prompt")
MOST_FILES_SEEN = 1000  # of a subfolder, before it is taken for one without photos
_SYSTEM_NAMES = ("__macosx", "@eadir", "thumbs.db", "desktop.ini", "lost+found")


def is_hidden(name: str) -> bool:
    """Say whether a name is the system's own, such as `.DS_Store`, rather than the user's."""
    return name.startswith(".") or name.casefold() in _SYSTEM_NAMES


def suffix_of(name: str) -> str:
    """Return the last suffix of a file's name, in lower case and with its dot; "" if it has none."""
    return PurePosixPath(name.rstrip()).suffix.lower()


def is_photo_name(name: str) -> bool:
    """Say whether a name is that of a photo, of a format that is read or of another."""
    return suffix_of(name) in (*IMAGE_SUFFIXES, *HEIF_SUFFIXES, *UNREAD_SUFFIXES)


def looks_like_captions(name: str, photos: Collection[str]) -> bool:
    """Say whether a file holds captions by its name: one of a kind that is read, or of another.

    photos: the names of the photos beside it.
    """
    suffix, stem = suffix_of(name), PurePosixPath(name).stem.casefold()
    if suffix in _NOTE_SUFFIXES:
        of_photos = {start for photo in photos for start in (photo.casefold(), PurePosixPath(photo).stem.casefold())}
        return stem in of_photos or stem.startswith(_CAPTION_WORDS)
    return suffix in CAPTION_SUFFIXES or suffix in _OTHER_CAPTION_SUFFIXES


def is_looked_at(name: str, photos: Collection[str]) -> bool:
    """Say whether a file may matter by its name alone; one without a suffix may be a photo by its content."""
    return is_photo_name(name) or not suffix_of(name) or looks_like_captions(name, photos)


def find_images(folder: Path) -> tuple[Path, ...]:
    """Return the photos of a folder sorted by name, also those of a format that is not read; hidden ones are not seen.

    Raises ConceptError when the folder is missing, is a file, cannot be listed, holds no image, or has subfolders with
    photos or captions.
    """
    with _explained(folder):
        files, holding = _contents(folder)
        refuse_subfolders(str(folder), holding)
        images = [
            path for path in files if is_photo_name(path.name) or (not suffix_of(path.name) and opens_as_image(path))
        ]
    if not images:
        raise no_image(str(folder), [path.name for path in files])
    return tuple(images)


def folder_with_photos(folder: Path) -> Path:
    """Return the subfolder that is read in place of a folder (`only_subfolder`), else the folder itself."""
    with _explained(folder):
        files, holding = _contents(folder)
    name = only_subfolder(holding, [path.name for path in files])
    return folder if name is None else folder / name


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ConceptError(f"images: {folder} is not there; give the folder of the concept's photos") from None
    except NotADirectoryError:
        raise ConceptError(f"images: {folder} is a file; give the folder that holds the photos") from None
    except OSError as error:
        raise ConceptError(f"images: {folder} cannot be listed: {error.strerror}") from error


def _contents(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the files of a folder, and the names of its subfolders with photos or captions, both sorted."""
    entries = sorted((path for path in folder.iterdir() if not is_hidden(path.name)), key=lambda path: path.name)
    holding = holding_subfolders({path.name: _names_below(path) for path in entries if path.is_dir()})
    # A link that leads nowhere is kept: reading it says so, passing over it would lose a photo silently.
    return [path for path in entries if path.is_file() or (path.is_symlink() and not path.is_dir())], holding


def no_image(where: str, names: Iterable[str]) -> ConceptError:
    """Return the error for a place without photos, which says what it holds instead."""
    held = ", ".join(map(shown_name, islice(names, 5)))
    return ConceptError(
        f"images: {where} holds no image{f' but {held}' if held else ''}; put photos there ({' '.join(IMAGE_SUFFIXES)})"
    )


def holding_subfolders(below: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the names of the subfolders that hold photos or captions.

    below: by the name of a subfolder, the names of the files at any depth in it; as many are taken as are needed.
    """
    return [name for name, files in below.items() if any(map(_is_material, islice(files, MOST_FILES_SEEN)))]


def only_subfolder(holding: Sequence[str], beside: Iterable[str]) -> str | None:
    """Return the subfolder that is read in place of the folder around it, as kohya's trainer does; None if none is.

    It is the only one that holds photos or captions, is named as `10_sks cup`, and none are beside it.
    holding: as `holding_subfolders` returns it; beside: the names of the files that are in no subfolder.
    """
    if len(holding) != 1 or read_folder_name(holding[0]) is None:
        return None
    others = any(_is_material(name) or name.casefold() in METADATA_NAMES for name in beside)
    return None if others else holding[0]


def refuse_subfolders(where: str, holding: Sequence[str]) -> None:
    """Raise ConceptError naming the subfolders that hold photos or captions, which nothing would read.

    holding: as `holding_subfolders` returns it. Where all are named as kohya's trainer has it, the error has the
    concepts to write.
    """
    if not holding:
        return
    one = len(holding) == 1
    message = (
        f"images: {where} has photos or captions in its subfolder{'' if one else 's'} "
        f"{', '.join(map(repr, holding))}, and subfolders are not read: "
    )
    named = {name: read for name in holding if (read := read_folder_name(name)) is not None}
    if one or len(named) < len(holding):
        others = "" if one else ", and each other as those of one of its own"
        raise ConceptError(
            f"{message}give {where}/{holding[0]} as the images of a concept{others}, or move the files up or away"
        )
    if len({(read.token.casefold(), read.class_noun.casefold()) for read in named.values()}) < len(named):
        raise ConceptError(
            f"{message}those of one concept belong in one folder, where each photo is seen equally often; one that is "
            "to be seen twice as often is there twice, under two names"
        )
    lines = [f"  - {_concept_to_write(f'{where}/{name}', read)}" for name, read in named.items()]
    raise ConceptError(
        "\n".join(
            [
                f"{message}write a concept for each, in one adapter or each in its own; their rows are as many "
                "whatever the repeats, and `weight` gives one a larger share",
                "concepts:",
                *lines,
            ]
        )
    )


def _concept_to_write(images: str, named: FolderName) -> str:
    fields = {"token": named.token, "class_noun": named.class_noun, "images": images}
    return f"{{{', '.join(f'{key}: {json.dumps(text, ensure_ascii=False)}' for key, text in fields.items() if text)}}}"


def passed_over(folder: Path, used: Iterable[Path]) -> tuple[str, ...]:
    """Return the names in a folder, files and subfolders, that are neither used nor the system's own, sorted."""
    names = {path.name for path in used}
    return tuple(sorted(path.name for path in folder.iterdir() if path.name not in names and not is_hidden(path.name)))


def _names_below(folder: Path) -> Iterator[str]:
    for _, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        yield from files


def _is_material(name: str) -> bool:
    return not any(map(is_hidden, name.split("/"))) and (is_photo_name(name) or suffix_of(name) in CAPTION_SUFFIXES)
