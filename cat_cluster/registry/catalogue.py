"""What a store holds: manifests found and read, and the errors that help to find the right name."""

from __future__ import annotations

import difflib

from cat_cluster.errors import AdapterNotFoundError, ObjectNotFoundError, ObjectUnreadableError, RegistryError
from cat_cluster.registry.manifest import Manifest, parse_manifest
from cat_cluster.registry.references import check_adapter_id, manifest_key, split_manifest_key
from cat_cluster.store.protocol import ObjectStore

_SHOWN = 8  # names listed in an error


class ManifestReader:
    """The manifests of one store; it only reads."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def adapter_ids(self) -> list[str]:
        """Return, sorted, the id of every adapter with a revision."""
        return sorted({adapter_id for adapter_id, _ in self._places("adapters/")})

    def revision_names(self, adapter_id: str) -> list[str]:
        """Return an adapter's revisions, sorted by name; empty if there is no such adapter."""
        return [revision for _, revision in self._places(f"adapters/{check_adapter_id(adapter_id)}/")]

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
            data = self._store.get(key)
        except ObjectNotFoundError:
            return None
        return parse_manifest(data, key=key, adapter_id=adapter_id, revision=revision)

    def readable(self, adapter_id: str) -> tuple[list[Manifest], list[str]]:
        """Return an adapter's manifests, newest first, and the revisions whose manifest cannot be read."""
        manifests, damaged = [], []
        for revision in self.revision_names(adapter_id):
            try:
                manifests.append(self.find(adapter_id, revision))
            except AdapterNotFoundError:
                continue  # deleted since it was listed
            except (RegistryError, ObjectUnreadableError):
                damaged.append(revision)
        return sorted(manifests, key=lambda manifest: (manifest.created, manifest.revision), reverse=True), damaged

    def named_objects(self) -> set[str] | None:
        """Return every object key that a manifest names; None when a manifest that cannot be read leaves that open."""
        named: set[str] = set()
        for place in self._places("adapters/"):
            try:
                named.update(stored.key for stored in self.find(*place).objects.values())
            except AdapterNotFoundError:
                continue  # deleted since it was listed
            except (RegistryError, ObjectUnreadableError):
                return None
        return named

    def unknown_adapter(self, adapter_id: str) -> AdapterNotFoundError:
        """Return the error for an id without revisions; it lists the ids most like it."""
        known = self.adapter_ids()
        if not known:
            return AdapterNotFoundError(
                f"no adapter {adapter_id!r}: the storage {self._store.url} holds none yet; train one, give --storage, "
                "or see that it is mounted"
            )
        near = difflib.get_close_matches(adapter_id, known, n=3, cutoff=0.5)
        hint = f"did you mean {_listed(near)}?" if near else f"it holds {_listed(known)}"
        return AdapterNotFoundError(f"no adapter {adapter_id!r} in storage {self._store.url}: {hint}")

    def unknown_revision(self, adapter_id: str, revision: str) -> AdapterNotFoundError:
        """Return the error for a revision that is not there; it lists those that are."""
        known = self.revision_names(adapter_id)
        if not known:
            return self.unknown_adapter(adapter_id)
        return AdapterNotFoundError(
            f"adapter {adapter_id!r} has no revision {revision} in storage {self._store.url}: it has {_listed(known)}"
        )

    def unknown_alias(self, adapter_id: str, alias: str, aliases: dict[str, str]) -> AdapterNotFoundError:
        """Return the error for an alias that is not set; it lists the adapter's aliases and revisions."""
        known = self.revision_names(adapter_id)
        if not known:
            return self.unknown_adapter(adapter_id)
        return AdapterNotFoundError(
            f"adapter {adapter_id!r} has no alias {alias!r} in storage {self._store.url}: its aliases are "
            f"{_listed(sorted(aliases)) or 'none'}, its revisions {_listed(known)}; name one of these, as in "
            f"{adapter_id}@{known[0]}, or set the alias"
        )

    def _places(self, prefix: str) -> list[tuple[str, str]]:
        places = (split_manifest_key(key) for key in self._store.list(prefix))
        return [place for place in places if place is not None]


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
