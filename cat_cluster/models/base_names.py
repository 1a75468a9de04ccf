"""What a base is called, and where its files are: an embedded one, a folder, one file, in S3, on the hub."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from cat_cluster.errors import BaseModelError, HubError, SpecError
from cat_cluster.models.base_files import (
    CONFIG_PATTERNS,
    MODEL_INDEX,
    VARIANTS,
    check_complete,
    check_family,
    read_config,
    size_unit,
    weight_patterns,
)
from cat_cluster.models.s3_base import S3_SCHEME, check_s3_base, fetch_s3_base
from cat_cluster.models.single_file import FAMILIES, PICKLED, not_read, read_checkpoint, unpacked
from cat_cluster.spec.job import ResolvedAdapter

EMBEDDED = {"pocket": "pocket", "pocket-xl": "pocket_xl"}  # name -> the room that has its weights
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILE = re.compile(rf"({_HUB_ID.pattern})/(.+\.safetensors)")
_CHOICES = (
    "give 'pocket', 'pocket-xl', a diffusers folder, a .safetensors checkpoint, either of them under s3://, a hub id "
    "such as 'stable-diffusion-v1-5/stable-diffusion-v1-5', or a hub id with the name of a checkpoint behind it"
)


def base_folder(name: str) -> Path:
    """Return the diffusers folder of a base; files of the hub and of S3 are fetched where the cache has them not.

    A checkpoint in one file is unpacked to a folder in the cache. Raises BaseModelError when there is no such base, or
    none of a supported family, StoreError where S3 refuses.
    """
    if name in EMBEDDED:
        return _embedded(name)
    found = _own_path(name)
    if found is None:
        found = fetch_s3_base(name) if name.startswith(S3_SCHEME) else _hub_path(name)
    return unpacked(found) if found.is_file() else found


def lasting_name(name: str) -> str:
    """Return a name that means the same base from every working folder: the absolute path of what is here."""
    path = Path(name).expanduser()
    is_here = name not in EMBEDDED and bool(name.strip()) and "://" not in name and path.exists()
    return str(path.absolute()) if is_here else name


def local_base(name: str) -> Path | None:
    """Return the folder of a base that is on this machine; None for S3, and for the hub where its cache has it not.

    Raises BaseModelError for what is none of these.
    """
    if name in EMBEDDED:
        return _embedded(name)
    found = _own_path(name)
    if found is None and not name.startswith(S3_SCHEME):
        found = _cached(name)
    return unpacked(found) if found is not None and found.is_file() else found


def cached_file(name: str) -> Path | None:
    """Return the local hub cache's copy of a checkpoint on the hub; None where it has none, and for other names."""
    file = _HUB_FILE.fullmatch(name)
    if file is None:
        return None
    with contextlib.suppress(OSError, ValueError, EntryNotFoundError):
        found = Path(snapshot_download(file[1], local_files_only=True, allow_patterns=[file[2]])) / file[2]
        return found if found.is_file() else None
    return None


def check_bases(adapters: Sequence[ResolvedAdapter]) -> dict[str, str]:
    """Check the bases of a job; return why some cannot be checked here, by name.

    Raises BaseModelError that names the adapter, SpecError as check_buckets.
    """
    away = {}
    for name in dict.fromkeys(adapter.base for adapter in adapters):
        try:
            unchecked = check_base(name)
        except BaseModelError as error:
            of = next(adapter.id for adapter in adapters if adapter.base == name)
            raise BaseModelError(f"base of adapter {of}: {error}") from error
        if unchecked is not None:
            away[name] = unchecked
        configs = _local_configs(name) if unchecked is None else None
        if configs is not None:
            step = size_unit(*(read_config(configs, part) for part in ("unet", "vae")))
            for adapter in adapters:
                if adapter.base == name and adapter.training.resolution is not None:
                    check_buckets(adapter, adapter.training.resolution, step)
    return away


def check_buckets(adapter: ResolvedAdapter, resolution: int, step: int) -> None:
    """Raise SpecError where `resolution` has no aspect buckets, if an adapter's photos are cropped to them.

    step: what the sides of buckets are multiples of, in pixels, the base's size_unit.
    """
    if adapter.training.aspect_buckets and resolution % step:
        raise SpecError(
            f"training.resolution: {resolution} is not a multiple of {step}, as the sides of the aspect buckets of "
            f"base {adapter.base!r} are; choose one that is, or leave aspect_buckets out (adapter {adapter.id})"
        )


def check_base(name: str) -> str | None:
    """Refuse, by name, a base that training would refuse for its files' names, configs and heads; no weights are read.

    Of a hub id that is not in the local cache, and of S3, only those are fetched. Returns why a base could not be
    checked, when the hub cannot be reached or its file is not here; else None. Raises BaseModelError, StoreError.
    """
    if name in EMBEDDED:
        check_complete(_embedded(name))
        return None
    found = _own_path(name)
    if found is None and name.startswith(S3_SCHEME):
        check_s3_base(name)
        return None
    if found is None:
        found = _cached(name)
    if found is None and _HUB_FILE.fullmatch(name):
        return f"base {name!r} is not in the local hub cache, and a file is checked once it is fetched"
    try:
        if found is not None and found.is_file():
            read_checkpoint(found)
        elif found is not None:
            check_complete(found)
        else:
            check_family(_download(name, CONFIG_PATTERNS))
    except BaseModelError as error:
        if not isinstance(error.__cause__, LocalEntryNotFoundError):
            raise
        return f"base {name!r} is not in the local hub cache, and the hub cannot be reached"
    return None


def _local_configs(name: str) -> Path | None:
    """Return a folder with the configs of a base, where this machine has them: after check_base all but those of S3."""
    if name in EMBEDDED:
        return _embedded(name)
    found = _own_path(name)
    if found is None and not name.startswith(S3_SCHEME):
        found = cached_file(name)
        if found is None:
            with contextlib.suppress(OSError, ValueError, EntryNotFoundError):
                found = Path(snapshot_download(name, local_files_only=True, allow_patterns=list(CONFIG_PATTERNS)))
    return FAMILIES / read_checkpoint(found).kind if found is not None and found.is_file() else found


def _embedded(name: str) -> Path:
    folder = Path(__file__).parent / EMBEDDED[name] / "weights"
    if not (folder / MODEL_INDEX).is_file():
        raise BaseModelError(
            f"base {name!r}: {folder / MODEL_INDEX} is missing; reinstall cat-cluster, or make it with "
            f"`cat-cluster pocket pretrain --base {name}`."
        )
    return folder


def _own_path(name: str) -> Path | None:
    """Return the folder or file that a name means, None for S3 and the hub; BaseModelError for what is none of them."""
    if not name.strip():
        raise BaseModelError(f"the base has no name: {_CHOICES}.")
    if "://" in name and not name.startswith(S3_SCHEME):
        raise BaseModelError(f"base {name!r} is an address, which is not opened: {_CHOICES}.")
    path = Path(name).expanduser()
    if not name.startswith(S3_SCHEME) and path.exists():
        return path
    if name.rstrip("/").lower().endswith(PICKLED):  # in S3, on the hub, or not there at all
        raise not_read(name)
    if name.startswith(S3_SCHEME):
        return None
    is_file = name.lower().endswith(".safetensors")  # which no hub id does
    if name.startswith((".", "~")) or not (_HUB_FILE if is_file else _HUB_ID).fullmatch(name):
        raise BaseModelError(f"base {name!r} is neither a folder nor a file: {_CHOICES}.")
    return None


def _hub_path(name: str) -> Path:
    """Return the snapshot folder of a hub id, or a file of one: the local cache when complete, else downloaded."""
    cached = _cached(name)
    if cached is not None:
        return cached
    if (file := _HUB_FILE.fullmatch(name)) is not None:
        found = _download(file[1], [file[2]]) / file[2]
        if not found.is_file():
            raise HubError(f"base {name!r}: {file[1]} has no file {file[2]}; look at its list of files on the hub.")
        return found
    # Configs first: a base of another family is refused before its gigabytes are fetched.
    folder = _download(name, CONFIG_PATTERNS)
    check_family(folder)
    for infix in VARIANTS:
        folder = _download(name, weight_patterns(infix))
        with contextlib.suppress(BaseModelError):
            return check_complete(folder)
    return check_complete(folder)


def _cached(name: str) -> Path | None:
    """Return what the local cache has of a hub id, or a file of one, None unless it is complete."""
    if _HUB_FILE.fullmatch(name):
        return cached_file(name)
    for infix in VARIANTS:
        patterns = [*CONFIG_PATTERNS, *weight_patterns(infix)]  # what is not needed may be missing
        with contextlib.suppress(OSError, ValueError, EntryNotFoundError, BaseModelError):
            return check_complete(Path(snapshot_download(name, local_files_only=True, allow_patterns=patterns)))
    return None


def _download(name: str, patterns: Sequence[str]) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError, EntryNotFoundError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise HubError(
            f"base {name!r} is neither a folder nor in the local hub cache, and downloading it failed "
            f"({type(error).__name__}: {reason}). Check the name and the network (HF_HUB_OFFLINE must not be 1; a "
            "gated base needs `hf auth login`), or give the path of a diffusers folder."
        ) from error
