"""The objects of a revision, named by their content: the weights, and the sample pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import PurePosixPath

from cat_cluster.errors import ObjectNotFoundError, RegistryError
from cat_cluster.registry.catalogue import ManifestReader
from cat_cluster.registry.file_header import FileSubject, shown_metadata
from cat_cluster.registry.manifest import WEIGHTS, AdapterDraft, StoredObject, sha256
from cat_cluster.registry.references import object_key
from cat_cluster.store.protocol import Entry

PHOTO_PREFIX = "photo-"  # of the names of training photos, and of what belongs to them, among a revision's samples
_SAMPLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def draft_objects(draft: AdapterDraft, revision: str) -> dict[str, tuple[StoredObject, bytes]]:
    """Return name -> (where it will lie, its bytes) of a draft's weights and samples.

    Raises AdapterFormatError for weights that are not finite, RegistryError for a bad sample name.
    """
    from cat_cluster.lora.formats import to_safetensors  # with torch: see registry.py

    draft.weights.check_finite()
    weights = to_safetensors(draft.weights, "diffusers", weights_metadata(draft, revision))
    digest = sha256(weights)
    stored = StoredObject(key=object_key(digest, ".safetensors"), size=len(weights), sha256=digest)
    objects = {WEIGHTS: (stored, weights)}
    for name, data in draft.samples.items():
        if name == WEIGHTS or not _SAMPLE_NAME.fullmatch(name):
            raise RegistryError(
                f"sample {name[:80]!r} of {draft.adapter_id} needs another name: up to 100 letters, digits and ._- , "
                f"not beginning with '.', and not {WEIGHTS!r}"
            )
        digest, suffix = sha256(data), PurePosixPath(name).suffix
        key = object_key(_owned(draft.adapter_id, digest), suffix)
        objects[name] = (StoredObject(key=key, size=len(data), sha256=digest), data)
    return objects


def remove_unnamed(manifests: ManifestReader, adapter_id: str, objects: Mapping[str, StoredObject]) -> list[str]:
    """Delete those of an adapter's objects that no manifest names, and return their keys.

    Only its own manifests are read, and those of all adapters for objects that they could name too; where one of these
    is damaged, nothing that it could name is deleted.
    """
    owned = {stored.key for name, stored in objects.items() if is_owned(adapter_id, name, stored)}
    shared = {stored.key for stored in objects.values()} - owned
    removed = _remove(manifests, adapter_id, owned) if owned else []
    return sorted([*removed, *(_remove(manifests, None, shared) if shared else [])])


def is_owned(adapter_id: str, name: str, stored: StoredObject) -> bool:
    """Say whether no other adapter can name an object of this one.

    Weights have their adapter and revision in their header. Samples are named by their adapter and their content; those
    of revisions that were published before that was so are named by their content alone.
    """
    return name == WEIGHTS or _owned(adapter_id, stored.sha256) in stored.key


def _remove(manifests: ManifestReader, adapter_id: str | None, keys: set[str]) -> list[str]:
    """Delete objects that no manifest of the adapter names, or, without one, of any; return their keys."""
    store, read = manifests.store, set[Entry]()
    named = manifests.named_objects(adapter_id, read)
    if named is None:
        return []
    removed: dict[str, bytes] = {}
    for key in sorted(keys - named):
        with suppress(ObjectNotFoundError):
            removed[key] = store.get(key)
            store.delete(key)
    # A manifest that appeared meanwhile gets its objects back; see the matching check in Registry.publish.
    named = manifests.named_objects(adapter_id, read) if removed else set()
    restored = {key for key in removed if named is None or key in named}
    for key in restored:
        store.put(key, removed[key])
    return [key for key in removed if key not in restored]


def weights_metadata(draft: AdapterDraft, revision: str) -> dict[str, str]:
    """Return the safetensors header of published weights: our own record, and what other programs show.

    It holds no time of day, so the same weights always make the same object.
    """
    tokens = ", ".join(concept.token for concept in draft.resolved.concepts)
    return {
        "cat_cluster.adapter_id": draft.adapter_id,
        "cat_cluster.revision": revision,
        "cat_cluster.base_name": draft.base_name,
        "cat_cluster.base_fingerprint": draft.base_fingerprint,
        "cat_cluster.tokens": tokens,
        **shown_metadata([FileSubject.of_draft(draft, revision)], draft.weights, draft.adapter_id),
    }


def _owned(adapter_id: str, digest: str) -> str:
    return sha256(f"{adapter_id}\n{digest}".encode())
