"""How users name adapters, and where the registry keeps what they name.

A reference is `id` (its alias `latest`), `id@alias` or `id@r-<12 hex>`. Everything is matched here, whole, before
any of it becomes part of a storage key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cat_cluster.errors import RegistryError

LATEST = "latest"

_ADAPTER_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
REVISION_PATTERN = r"^r-[0-9a-f]{12}$"
_REVISION = re.compile(REVISION_PATTERN)
_ALIAS = re.compile(r"(?!r-)[a-z0-9][a-z0-9-]{0,62}")  # never to be taken for a revision
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,16}")


@dataclass(frozen=True)
class Reference:
    """A parsed reference: a revision of an adapter or, where that is None, what an alias names.

    Raises RegistryError for an id, revision or alias that is none.
    """

    adapter_id: str
    revision: str | None = None
    alias: str = LATEST

    def __post_init__(self) -> None:
        check_adapter_id(self.adapter_id)
        check_alias(self.alias)
        if self.revision is not None:
            check_revision(self.revision)

    def __str__(self) -> str:
        return f"{self.adapter_id}@{self.revision or self.alias}"


def parse_reference(text: Reference | str) -> Reference:
    """Return the parts of `id`, `id@alias` or `id@r-...`, or what is parsed already; RegistryError for other text."""
    if isinstance(text, Reference):
        return text
    adapter_id, at, name = text.partition("@")
    if not at:
        return Reference(adapter_id)
    return Reference(adapter_id, revision=name) if name.startswith("r-") else Reference(adapter_id, alias=name)


def check_adapter_id(adapter_id: str) -> str:
    """Return the adapter id if it is one, else raise RegistryError."""
    if not _ADAPTER_ID.fullmatch(adapter_id):
        raise RegistryError(
            f"{adapter_id[:80]!r} is not an adapter id: use 1 to 63 of a-z, 0-9 and '-', not beginning with '-'"
        )
    return adapter_id


def check_revision(revision: str) -> str:
    """Return the revision if it is one, else raise RegistryError."""
    if not _REVISION.fullmatch(revision):
        raise RegistryError(
            f"{revision[:80]!r} is not a revision: a revision is 'r-' and 12 hex digits, as `adapters show` prints it"
        )
    return revision


def is_alias(text: str) -> bool:
    """Say whether a text can be an alias."""
    return _ALIAS.fullmatch(text) is not None


def check_alias(alias: str) -> str:
    """Return the alias if it is one, else raise RegistryError."""
    if not is_alias(alias):
        raise RegistryError(
            f"{alias[:80]!r} is not an alias: use 1 to 63 of a-z, 0-9 and '-', not beginning with '-' or 'r-'"
        )
    return alias


def manifest_key(adapter_id: str, revision: str) -> str:
    """Return `adapters/<id>/<revision>/manifest.json`."""
    return f"adapters/{check_adapter_id(adapter_id)}/{check_revision(revision)}/manifest.json"


def split_manifest_key(key: str) -> tuple[str, str] | None:
    """Return (adapter id, revision) of a manifest's key, None for any other key."""
    parts = key.split("/")
    if len(parts) != 4 or parts[0] != "adapters" or parts[3] != "manifest.json":
        return None
    if not _ADAPTER_ID.fullmatch(parts[1]) or not _REVISION.fullmatch(parts[2]):
        return None
    return parts[1], parts[2]


def behind_adapter(folder: str, adapter_id: str) -> str:
    """Return what sorts behind every key of an adapter in a folder ("adapters") and before those of the next one."""
    return f"{folder}/{check_adapter_id(adapter_id)}/~"  # no key has a "~"


def alias_prefix(adapter_id: str, alias: str) -> str:
    """Return `aliases/<id>/<alias>/`, under which the alias's moves are numbered."""
    return f"aliases/{check_adapter_id(adapter_id)}/{check_alias(alias)}/"


def quarantine_key(adapter_id: str, revision: str) -> str:
    """Return `quarantine/<id>/<revision>.json`."""
    return f"quarantine/{check_adapter_id(adapter_id)}/{check_revision(revision)}.json"


def object_key(digest: str, suffix: str = "") -> str:
    """Return `objects/<sha256><suffix>`; the suffix (".png") is dropped unless it is letters and digits."""
    if not _DIGEST.fullmatch(digest):
        raise RegistryError(f"{digest[:80]!r} is not a sha256: publish the adapter again")
    return f"objects/{digest}{suffix if _SUFFIX.fullmatch(suffix) else ''}"
