"""What a store holds: manifests found and read, and the errors that help to find the right name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

from cat_cluster.errors import AdapterNotFoundError, ObjectNotFoundError, ObjectUnreadableError, RegistryError
from cat_cluster.registry.kept import KeptRecords
from cat_cluster.registry.manifest import Manifest, ManifestHead, parse_manifest
from cat_cluster.registry.references import check_adapter_id, manifest_key, split_manifest_key
from cat_cluster.store.protocol import Entry, ObjectStore

Head = TypeVar("Head", bound=ManifestHead)

_SHOWN = 8  # names listed in an error
_LOOKED_AT = 500  # keys in which names like an unknown one are looked for, however many there are


class ManifestReader:
    """The manifests of one store; it only reads."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self._kept = KeptRecords[ManifestHead]()

    def revision_names(self, adapter_id: str) -> list[str]:
        """Return an adapter's revisions, sorted by name; empty if there is no such adapter."""
        return [revision for _, revision, _ in self._places(f"adapters/{check_adapter_id(adapter_id)}/")]

    def find(self, adapter_id: str, revision: str) -> Manifest:
        """Return a revision's manifest; AdapterNotFoundError with near misses, RegistryError if it is damaged."""
        manifest = self.look_up(adapter_id, revision)
        if manifest is None:
            raise self.unknown_revision(adapter_id, revision)
        return manifest

    def look_up(self, adapter_id: str, revision: str) -> Manifest | None:
        """Return a revision's manifest, None if there is none; RegistryError if it is damaged. It never lists."""
        key = manifest_key(adapter_id, revision)
        try:
            data = self.store.get(key)
        except ObjectNotFoundError:
            return None
        return parse_manifest(data, key=key, adapter_id=adapter_id, revision=revision)

    def readable(self, adapter_id: str) -> tuple[list[Manifest], list[str]]:
        """Return an adapter's manifests, newest first, and the revisions whose manifest cannot be read."""
        return _newest_first(self.revision_names(adapter_id), lambda revision: self.look_up(adapter_id, revision))

    def heads(
        self, adapter_id: str, entries: Iterable[Entry], also: Iterable[str]
    ) -> tuple[list[ManifestHead], list[str]]:
        """Return what a listing shows of an adapter's revisions, newest first, and those that cannot be read.

        entries: those of the store below `adapters/<id>/`; what was read before is not read again. also: revisions that
        an alias named later than that.
        """
        listed = {place[1]: entry for entry in entries if (place := split_manifest_key(entry.key)) is not None}
        return _newest_first(
            [*listed, *(revision for revision in also if revision not in listed)],
            lambda revision: self._head(adapter_id, revision, listed.get(revision)),
        )

    def named_objects(self, adapter_id: str | None, read: set[Entry]) -> set[str] | None:
        """Return the object keys that manifests of an adapter name, or those of all; None if one is damaged.

        read: entries that are passed over; those that were read now are added.
        """
        named: set[str] = set()
        prefix = "adapters/" if adapter_id is None else f"adapters/{adapter_id}/"
        for owner, revision, entry in self._places(prefix):
            if entry in read:
                continue
            try:
                manifest = self.look_up(owner, revision)
            except (RegistryError, ObjectUnreadableError):
                return None
            if manifest is not None:  # else it was deleted since it was listed
                named.update(stored.key for stored in manifest.objects.values())
            read.add(entry)
        return named

    def similar(self, adapter_id: str) -> list[str]:
        """Return the ids most like one, the best first, of those that begin like it and of the first ones."""
        return difflib.get_close_matches(adapter_id, self._some_ids(adapter_id)[0], n=3, cutoff=0.5)

    def unknown_adapter(self, adapter_id: str) -> AdapterNotFoundError:
        """Return the error for an id without revisions; it names ids that are like it."""
        known, is_all = self._some_ids(adapter_id)
        if not known:
            return AdapterNotFoundError(
                f"no adapter {adapter_id!r}: the storage {self.store.url} holds none yet; train one, give --storage, "
                "or see that it is mounted"
            )
        near = difflib.get_close_matches(adapter_id, known, n=3, cutoff=0.5)
        all_known = _listed(known) if is_all else f"{', '.join(known[:_SHOWN])} and more, as `adapters list` says"
        hint = f"did you mean {_listed(near)}?" if near else f"it holds {all_known}"
        return AdapterNotFoundError(f"no adapter {adapter_id!r} in storage {self.store.url}: {hint}")

    def unknown_revision(self, adapter_id: str, revision: str) -> AdapterNotFoundError:
        """Return the error for a revision that is not there; it lists those that are."""
        known = self.revision_names(adapter_id)
        if not known:
            return self.unknown_adapter(adapter_id)
        return AdapterNotFoundError(
            f"adapter {adapter_id!r} has no revision {revision} in storage {self.store.url}: it has {_listed(known)}"
        )

    def unknown_alias(self, adapter_id: str, alias: str, aliases: dict[str, str]) -> AdapterNotFoundError:
        """Return the error for an alias that is not set; it lists the adapter's aliases and revisions."""
        known = self.revision_names(adapter_id)
        if not known:
            return self.unknown_adapter(adapter_id)
        return AdapterNotFoundError(
            f"adapter {adapter_id!r} has no alias {alias!r} in storage {self.store.url}: its aliases are "
            f"{_listed(sorted(aliases)) or 'none'}, its revisions {_listed(known)}; name one of these, as in "
            f"{adapter_id}@{known[0]}, or set the alias"
        )

    def _some_ids(self, adapter_id: str) -> tuple[list[str], bool]:
        """Return ids of adapters, and whether these are all."""
        first = list(islice(self._places("adapters/"), _LOOKED_AT))
        is_all = len(first) < _LOOKED_AT
        like = () if is_all else islice(self._places(f"adapters/{adapter_id[:3]}"), _LOOKED_AT)
        return list(dict.fromkeys(found for found, _, _ in (*first, *like))), is_all

    def _places(self, prefix: str) -> Iterator[tuple[str, str, Entry]]:
        for entry in self.store.entries(prefix):
            place = split_manifest_key(entry.key)
            if place is not None:
                yield (*place, entry)

    def _head(self, adapter_id: str, revision: str, entry: Entry | None) -> ManifestHead | None:
        head = None if entry is None else self._kept.get(entry)
        if head is not None:
            return head
        manifest = self.look_up(adapter_id, revision)
        if manifest is None:
            return None
        head = manifest.head
        if entry is not None:
            self._kept.keep(entry, head, len(head.model_dump_json()))
        return head


def _newest_first(revisions: Iterable[str], read: Callable[[str], Head | None]) -> tuple[list[Head], list[str]]:
    """Read revisions, and return them, the newest first, and the names of those that cannot be read."""
    found, damaged = [], []
    for revision in revisions:
        try:
            one = read(revision)
        except (RegistryError, ObjectUnreadableError):
            damaged.append(revision)
            continue
        if one is not None:  # else it was deleted since it was listed
            found.append(one)
    return sorted(found, key=lambda one: (one.created, one.revision), reverse=True), damaged


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
