"""Photos that lie in S3, or in a store's archive, brought into a local cache; and a folder of photos as one archive."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import uuid
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from cat_cluster.data.captions import caption_files
from cat_cluster.data.photo_folder import (
    find_images,
    folder_with_photos,
    holding_subfolders,
    is_hidden,
    is_looked_at,
    is_photo_name,
    no_image,
    only_subfolder,
    passed_over,
    refuse_subfolders,
)
from cat_cluster.errors import ConceptError, ObjectExistsError, StoreError
from cat_cluster.files import write_failure
from cat_cluster.settings import load_settings
from cat_cluster.store.protocol import ObjectStore

if TYPE_CHECKING:
    from cat_cluster.store.s3 import StoredKey
    from cat_cluster.store.s3_folder import S3Folder

MOST_BYTES = 2 * 2**30  # of all files of one concept
_SCHEME = "s3://"
_ARCHIVE = re.compile(r"([0-9a-f]{64})\.zip")
_TIMESTAMP = (1980, 1, 1, 0, 0, 0)  # the first that a zip can hold: equal folders give equal archives


@dataclass(frozen=True)
class LocalImages:
    """The photos of a concept on this machine. name: that of the folder they lie in, where it has one.

    left_there: names at the address, or beside the folder that is read in its place, that were not taken.
    """

    folder: Path
    name: str = ""
    left_there: tuple[str, ...] = ()


def local_images(images: str, cache_dir: Path | None = None) -> LocalImages:
    """Return the folder of a concept's photos: a folder as it is, an s3:// address as its copy in the cache.

    In place of a folder around a single one that is named as `10_sks cup`, that one is returned.

    An address is a prefix, whose photos and captions are copied when the listing (names, ETags, sizes) is new to the
    cache, or an archive `.../<sha256>.zip` of `pack_images`; that may lie in a folder too. cache_dir: by default
    that of the settings.
    Raises ConceptError that says what to do.
    """
    if not images.lower().startswith(_SCHEME):
        if _ARCHIVE.fullmatch(Path(images).name) and Path(images).is_file():
            return _cached_file(Path(images), cache_dir or load_settings().cache_dir)
        folder = folder_with_photos(Path(images))
        beside = () if folder == Path(images) else passed_over(Path(images), [folder])
        return LocalImages(folder, folder.name, beside)
    cache_dir = cache_dir or load_settings().cache_dir
    address = f"{_SCHEME}{images[len(_SCHEME) :].rstrip('/')}"
    parent, _, name = address.rpartition("/")
    archive = _ARCHIVE.fullmatch(name)
    try:
        return _cached_prefix(address, cache_dir) if archive is None else _cached_archive(parent, archive[1], cache_dir)
    except StoreError as error:
        raise ConceptError(f"images: {error}") from error
    except OSError as error:
        raise ConceptError(
            f"images: {images} cannot be kept in {cache_dir}: {error.strerror}; set CAT_CACHE_DIR"
        ) from error


def store_images(folder: Path, store: ObjectStore) -> str:
    """Store a folder's photos as `inputs/<sha256>.zip` and return the address that `images` takes for them.

    The store must be one whose address others can reach. Equal folders are stored once.
    """
    data = pack_images(folder)
    key = f"inputs/{hashlib.sha256(data).hexdigest()}.zip"
    with suppress(ObjectExistsError):
        store.put(key, data, if_absent=True)
    return f"{store.url}/{key}"


def object_address(store: ObjectStore, key: str) -> str:
    """Return what `images` takes for an archive that a store has: its address, of a store in a folder the file."""
    if store.url.startswith("file:"):
        return str(Path(unquote(urlsplit(store.url).path)) / key)
    return f"{store.url}/{key}"


def pack_images(folder: Path) -> bytes:
    """Return a zip of the files that the loader looks at: the photos, the captions beside them, the metadata files.

    Equal files give equal bytes. Raises ConceptError for a folder without photos or with more than 2 GiB.
    """
    folder = folder_with_photos(folder)
    images = find_images(folder)
    files = sorted({*images, *caption_files(folder, images)}, key=lambda path: path.name)
    buffer = io.BytesIO()
    try:
        _refuse_large(sum(path.stat().st_size for path in files), str(folder))
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            for path in files:
                entry = zipfile.ZipInfo(path.name, _TIMESTAMP)
                entry.create_system, entry.external_attr = 3, 0o644 << 16
                archive.writestr(entry, path.read_bytes())
    except OSError as error:
        raise ConceptError(
            f"images: {error.filename}: cannot be read: {error.strerror}; check its permissions"
        ) from error
    except UnicodeEncodeError as error:
        raise ConceptError(
            f"images: {folder} has a file name that is not Unicode ({error.object!r}); rename it"
        ) from None
    return buffer.getvalue()


def unpack_images(data: bytes, folder: Path, *, sha256: str | None = None) -> None:
    """Write the files of an archive that `pack_images` made into a folder, which is made.

    sha256: what its bytes must have. Raises ConceptError for another digest, a damaged archive, names that are not
    plain file names, or more than 2 GiB.
    """
    name = "the archive of photos" if sha256 is None else f"{sha256}.zip"
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise ConceptError(f"images: {name} is damaged: its bytes have another sha256; delete it and store it again")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            _refuse_large(sum(entry.file_size for entry in entries), name)
            if len({entry.filename for entry in entries}) != len(entries):
                raise ConceptError(f"images: {name} holds two files of one name; pack it again")
            for entry in entries:
                if not _is_plain(entry.filename):
                    raise ConceptError(f"images: {name} holds {entry.filename!r}, which is no plain file name")
            folder.mkdir(parents=True, exist_ok=True)
            for entry in entries:
                # Never more than the size that was added up above: the reader stops there.
                (folder / entry.filename).write_bytes(archive.read(entry))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise ConceptError(f"images: {name} is not a readable zip ({error}); pack it again") from error
    except OSError as error:
        raise ConceptError(f"images: {name} cannot be unpacked: {write_failure(folder, error)}") from error


def _cached_prefix(address: str, cache_dir: Path) -> LocalImages:
    from cat_cluster.store.s3_folder import S3Folder  # folders need no boto3

    source, beside = S3Folder(address), list[str]()
    files_there, folders, holding = _listed(source)
    only = only_subfolder(holding, files_there)
    if only is not None:
        beside = [name for name in (*files_there, *folders) if name != only and not is_hidden(name)]
        source = S3Folder(f"{source.url}/{only}")
        files_there, folders, holding = _listed(source)
    refuse_subfolders(source.url, holding)
    photos = [name for name in files_there if is_photo_name(name)]
    files = {name: entry for name, entry in files_there.items() if is_looked_at(name, photos)}
    if not files:
        raise no_image(source.url, files_there)
    beside += [name for name in (*files_there, *folders) if name not in files and not is_hidden(name)]
    _refuse_large(sum(entry.size for entry in files.values()), address)
    listing = json.dumps([(name, entry.etag, entry.size) for name, entry in files.items()])
    place = cache_dir / "inputs" / hashlib.sha256(listing.encode()).hexdigest()
    if not place.is_dir():
        temporary = _temporary(place)
        try:
            source.copy(files, temporary)
            _move(temporary, place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return LocalImages(place, source.url.rpartition("/")[2], tuple(sorted(beside)))


def _listed(source: S3Folder) -> tuple[dict[str, StoredKey], list[str], list[str]]:
    """Return the files directly below a prefix, its folders, and the names of those with photos or captions in them."""
    folders = source.folders()
    holding = holding_subfolders({name: source.names_below(name) for name in folders if not is_hidden(name)})
    files = source.files(lambda name: not is_hidden(name), deep=False, may_be_none=bool(holding))
    return files, folders, holding


def _cached_archive(parent: str, sha256: str, cache_dir: Path) -> LocalImages:
    from cat_cluster.store.s3_folder import S3Folder  # folders need no boto3

    return _unpacked(sha256, lambda: S3Folder(parent).read(f"{sha256}.zip"), cache_dir)


def _cached_file(path: Path, cache_dir: Path) -> LocalImages:
    try:
        return _unpacked(path.stem, path.read_bytes, cache_dir)
    except OSError as error:
        raise ConceptError(
            f"images: {path} cannot be read, or not kept in {cache_dir}: {error.strerror}; check its permissions, or "
            "set CAT_CACHE_DIR"
        ) from error


def _unpacked(sha256: str, read: Callable[[], bytes], cache_dir: Path) -> LocalImages:
    """Return the files of an archive as the cache has them; read: returns its bytes, where they are not there yet."""
    place = cache_dir / "inputs" / sha256
    if not place.is_dir():
        temporary = _temporary(place)
        try:
            unpack_images(read(), temporary, sha256=sha256)
            _move(temporary, place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return LocalImages(place)


def _temporary(place: Path) -> Path:
    temporary = place.with_name(f".{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    return temporary


def _move(temporary: Path, place: Path) -> None:
    try:
        temporary.rename(place)
    except OSError:
        if not place.is_dir():  # else another process was first, with the same files
            raise


def _is_plain(name: str) -> bool:
    return bool(name) and name not in (".", "..") and not set(name) & set("/\\\0:")


def _refuse_large(size: int, what: str) -> None:
    if size > MOST_BYTES:
        raise ConceptError(f"images: {what} holds {size / 2**30:.1f} GiB; one concept may have {MOST_BYTES >> 30} GiB")
