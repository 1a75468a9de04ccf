"""Photos that somebody sends: a zip or one picture, checked member by member before anything of it is kept."""

from __future__ import annotations

import stat
import unicodedata
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cat_cluster.data.captions import caption_files
from cat_cluster.data.masks import masks_among, read_mask
from cat_cluster.data.photo_folder import CAPTION_SUFFIXES, METADATA_NAMES, is_hidden, is_photo_name, suffix_of
from cat_cluster.data.photos import SizeLimits, decoded_bytes, opens_as_image, read_photo
from cat_cluster.errors import ConceptError
from cat_cluster.spec.characters import shown_name

_MOST_RATIO = 100  # of a member's bytes to those it is packed in; photos hardly shrink, and a caption is short
_FREE_BYTES = 2**16  # of a member, whatever its ratio
_MOST_CAPTION = 2**20  # bytes of a file of captions
_ENCRYPTED = 0x1
_ARCHIVE_SUFFIXES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst", ".cbz", ".jar")
_ARCHIVE_STARTS = (b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b", b"7z\xbc\xaf\x27\x1c", b"Rar!", b"\xfd7zXZ\x00", b"BZh")
_SHOWN = 100  # characters of a member's name in a message


@dataclass(frozen=True)
class UploadLimits:
    """How much an upload may hold.

    members: files; unpacked: their bytes; pixels: of one photo; decoded: bytes of all photos in memory.
    """

    members: int
    unpacked: int
    pixels: int
    decoded: int


@dataclass(frozen=True)
class CheckedUpload:
    """What an upload holds: its photos, their masks and the files of their captions, each by its name."""

    photos: tuple[str, ...]
    masks: tuple[str, ...]
    captions: tuple[str, ...]


def check_upload(file: Path, name: str, folder: Path, limits: UploadLimits) -> CheckedUpload:
    """Write the files of an upload into an empty folder, once each is known to be what a folder of photos may hold.

    file: a zip, or one picture, which the folder gets under its `name`. A zip may have one folder around its files,
    and what systems put into it (such as `__MACOSX` and `.DS_Store`) is left out. Raises ConceptError that names the
    member and says what to do; what was written until then is the caller's to remove.
    """
    if zipfile.is_zipfile(file):
        _unpack(file, folder, limits)
    else:
        _place_picture(file, name, folder)
    return _read(folder, limits)


def _place_picture(file: Path, name: str, folder: Path) -> None:
    start = file.read_bytes()[:8]
    if not start:
        raise ConceptError("file: is empty (0 bytes); send a zip of photos, or one photo")
    if start.startswith(_ARCHIVE_STARTS) or suffix_of(name) in _ARCHIVE_SUFFIXES:
        raise ConceptError(
            f"file: {_shown(name)} is an archive that is not a readable zip; send the photos as a plain zip"
        )
    plain = PurePosixPath(name.replace("\\", "/")).name
    plain = plain if _is_plain(plain) and not is_hidden(plain) else "photo"
    (folder / plain).write_bytes(file.read_bytes())
    if not is_photo_name(plain) and not opens_as_image(folder / plain):
        raise ConceptError(f"file: {_shown(name)} is neither a zip nor a photo; send a zip of photos, or one photo")


def _unpack(file: Path, folder: Path, limits: UploadLimits) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            members = _checked_members(archive.infolist(), limits)
            for name, member in members.items():
                # Never more than the size that was added up: the reader stops there.
                content = archive.read(member)
                if len(content) != member.file_size:
                    raise _refused(member.filename, "has another size than the zip says; pack the photos again")
                if content.startswith(_ARCHIVE_STARTS):
                    raise _refused(member.filename, "is an archive itself; put the photos of it directly into the zip")
                (folder / name).write_bytes(content)
    except ConceptError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, OverflowError) as error:
        told = " ".join(str(error).split())[:200]
        raise ConceptError(f"file: is not a readable zip ({told}); pack the photos again, as a plain zip") from error
    except Exception as error:  # zlib's, bz2's and lzma's own, of damaged data
        raise ConceptError(f"file: is a damaged zip ({type(error).__name__}); pack the photos again") from error


def _checked_members(entries: Sequence[zipfile.ZipInfo], limits: UploadLimits) -> dict[str, zipfile.ZipInfo]:
    """Return the files of a zip that are kept, by the plain name of each; ConceptError for one that must not be."""
    if len(entries) > limits.members:
        raise ConceptError(f"file: holds {len(entries)} files, and {limits.members} are read; send fewer photos")
    files = [entry for entry in entries if _is_wanted(entry)]
    total = sum(entry.file_size for entry in files)
    if total > limits.unpacked:
        raise ConceptError(
            f"file: holds {total} bytes unpacked, and {limits.unpacked} are read; send fewer or smaller photos"
        )
    top = _top_folder(files)
    named: dict[str, zipfile.ZipInfo] = {}
    seen: dict[str, str] = {}
    for entry in files:
        name = entry.filename.removeprefix(top)
        if "/" in name:
            raise _refused(entry.filename, "lies in a folder, and folders are not read; put the files side by side")
        same = seen.setdefault(_key(name), entry.filename)
        if name in named or same != entry.filename:
            raise _refused(entry.filename, f"has the same name as {_shown(same)}; rename one of them")
        named[name] = entry
    if not named:
        raise ConceptError("file: the zip holds no files; put the photos into it")
    return named


def _is_wanted(entry: zipfile.ZipInfo) -> bool:
    """Say whether a member is a file that matters; ConceptError for one that must not be in a zip at all."""
    name, kind = entry.filename, entry.external_attr >> 16
    parts = name.split("/")
    if name.startswith(("/", "\\")) or ":" in name or "\\" in name or ".." in parts or "\\" in entry.orig_filename:
        raise _refused(name, "leads out of the folder it is unpacked into; pack the photos by their plain names")
    if "\0" in entry.orig_filename or not all(part and _is_plain(part) for part in name.rstrip("/").split("/")):
        raise _refused(name, "is no name that a file can have everywhere; rename it")
    if stat.S_ISLNK(kind):
        raise _refused(name, "is a link; pack the photo itself")
    if stat.S_IFMT(kind) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise _refused(name, "is no plain file; leave it out")
    if entry.is_dir() or any(map(is_hidden, parts)):
        return False
    if entry.flag_bits & _ENCRYPTED:
        raise _refused(name, "is encrypted; pack the photos without a password")
    if suffix_of(name) in _ARCHIVE_SUFFIXES:
        raise _refused(name, "is an archive itself; put the photos of it directly into the zip")
    is_text = suffix_of(name) in CAPTION_SUFFIXES or parts[-1].casefold() in METADATA_NAMES
    if not is_text and suffix_of(name) and not is_photo_name(name):
        raise _refused(name, "is neither a photo nor captions of photos; leave it out")
    if entry.file_size > max(_FREE_BYTES, _MOST_RATIO * entry.compress_size):
        raise _refused(name, f"unpacks to more than {_MOST_RATIO} times its size; save it in a format for photos")
    if is_text and entry.file_size > _MOST_CAPTION:
        raise _refused(name, f"holds more than {_MOST_CAPTION} bytes of captions; shorten them")
    return True


def _top_folder(files: Sequence[zipfile.ZipInfo]) -> str:
    """Return the folder that all files are in, with its "/"; "" where there is none, or more than one."""
    tops = {name.partition("/")[0] if "/" in (name := entry.filename) else "" for entry in files}
    top = tops.pop() if len(tops) == 1 else ""
    return f"{top}/" if top else ""


def _read(folder: Path, limits: UploadLimits) -> CheckedUpload:
    """Read each photo, mask and text of a folder once; ConceptError for the first that cannot be used."""
    with _named_by_member(folder):
        sizes = SizeLimits(most_pixels=limits.pixels)
        paths = sorted(folder.iterdir(), key=lambda path: path.name)
        images = [path for path in paths if is_photo_name(path.name) or (not suffix_of(path.name) and _opens(path))]
        if not images:
            raise ConceptError("file: holds no photo; send JPEG or PNG photos")
        texts = set(caption_files(folder, images))
        for path in paths:
            if path in texts:
                _check_text(path)
            elif path not in images:
                raise ConceptError(f"{path}: is the text of no photo here; name it as its photo is, or leave it out")
        decoded = 0
        for path in images:
            decoded += decoded_bytes(path, sizes)
            if decoded > limits.decoded:
                raise ConceptError(
                    f"file: its photos take more than {limits.decoded // 2**20} MiB of memory; send fewer, or "
                    "smaller ones"
                )
        masks = masks_among(images)
        _read_pictures(images, masks, sizes)
    photos = tuple(path.name for path in images if path not in masks)
    return CheckedUpload(photos, tuple(path.name for path in masks), tuple(sorted(path.name for path in texts)))


def _read_pictures(images: Sequence[Path], masks: Mapping[Path, Path], sizes: SizeLimits) -> None:
    """Decode each photo, one at a time, with the mask that it has."""
    mask_of = {photo: mask for mask, photo in masks.items()}
    for path in images:
        if path not in masks:
            photo = read_photo(path, sizes)
            if path in mask_of:
                read_mask(mask_of[path], photo)


def _opens(path: Path) -> bool:
    if opens_as_image(path):
        return True
    raise ConceptError(f"{path}: is neither a photo nor captions of photos; leave it out")


def _check_text(path: Path) -> None:
    try:
        path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConceptError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


@contextmanager
def _named_by_member(folder: Path) -> Iterator[None]:
    """Say in errors what the sender knows: the member's name, and not the folder that it was unpacked into."""
    try:
        yield
    except ConceptError as error:
        told = str(error).removeprefix("file: ").removeprefix("images: ").replace(f"{folder}/", "")
        raise ConceptError(f"file: {told}") from error


def _is_plain(part: str) -> bool:
    """Say whether a name is one that every file system can hold."""
    if part in (".", "..") or len(part.encode("utf-8", "surrogatepass")) > 200:
        return False
    return bool(part) and all(unicodedata.category(one) not in ("Cc", "Cs") for one in part)


def _key(name: str) -> str:
    # On some systems these are one file: other letters' case, and decomposed Unicode.
    return unicodedata.normalize("NFC", name).casefold()


def _shown(name: str) -> str:
    short = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
    return repr(shown_name(short))


def _refused(name: str, why: str) -> ConceptError:
    return ConceptError(f"file: {_shown(name)} {why}")
