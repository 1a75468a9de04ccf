"""Publish, resolve, list, verify and delete adapters; the object store is the only database."""

from __future__ import annotations

import builtins
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING

from cat_cluster.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    AdapterNotFoundError,
    CatClusterError,
    ObjectExistsError,
    ObjectNotFoundError,
    RegistryError,
    StoreError,
)
from cat_cluster.registry.aliases import AliasBook, AliasEntry
from cat_cluster.registry.catalogue import ManifestReader
from cat_cluster.registry.manifest import (
    WEIGHTS,
    AdapterDraft,
    Manifest,
    StoredObject,
    manifest_bytes,
    parse_manifest,
    sha256,
)
from cat_cluster.registry.objects import draft_objects, remove_unnamed
from cat_cluster.registry.quarantine import Quarantine, QuarantineBook
from cat_cluster.registry.references import (
    LATEST,
    Reference,
    check_adapter_id,
    check_alias,
    manifest_key,
    parse_reference,
)
from cat_cluster.registry.summary import AdapterListing, AdapterPage, AdapterSummary
from cat_cluster.store.protocol import ObjectStore

if TYPE_CHECKING:
    from torch import nn

    from cat_cluster.lora.formats import AdapterWeights

LARGEST_PAGE = 1000


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found for one revision: how many objects it checked, and one sentence for each problem."""

    adapter_id: str
    revision: str
    objects: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True when nothing is wrong."""
        return not self.problems


class Registry:
    """The adapters in one object store.

    A manifest is written last and once, so a revision is seen whole or not at all; aliases move by appending.
    Any number of processes may share a store; none of them takes a lock.
    """

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self._aliases = AliasBook(store)
        self._catalogue = ManifestReader(store)
        self._listing = AdapterListing(store, self._catalogue, self._aliases)
        self._quarantines = QuarantineBook(store)

    def publish(self, draft: AdapterDraft) -> Manifest:
        """Store a draft as a revision and move `latest` to it unless it is rejected; return its manifest.

        A revision that is already there is returned as it is: what was published never changes.
        Raises RegistryError or AdapterFormatError for a draft that cannot be published, StoreError when the store
        refuses. After an error readers see nothing of it, or, if only the move failed, a whole revision without
        `latest`; publishing again finishes it.
        """
        if draft.resolved.id != draft.adapter_id:
            raise RegistryError(
                f"the draft of {draft.adapter_id!r} carries the spec of {draft.resolved.id!r}: use one id"
            )
        adapter_id = draft.adapter_id
        revision = draft.revision
        is_there = self.store.exists(manifest_key(adapter_id, revision))
        is_new = not is_there and self._store_revision(draft, revision)
        manifest = self._catalogue.find(adapter_id, revision)
        if is_new and manifest.status == "published":
            self._aliases.move(
                adapter_id, LATEST, revision, unless=lambda moves: any(m.revision == revision for m in islice(moves, 1))
            )
        elif not is_new:
            self.finish_publishing(manifest)
        return manifest

    def finish_publishing(self, manifest: Manifest) -> None:
        """Make the move of `latest` that a crash right after the manifest cut off; never take back a later one."""
        if manifest.status == "published":
            self._aliases.move(
                manifest.adapter_id,
                LATEST,
                manifest.revision,
                unless=lambda moves: any(entry.revision == manifest.revision for entry in moves),
            )

    def resolve(self, reference: Reference | str) -> Manifest:
        """Return the manifest that `id`, `id@alias` or `id@r-...` names; AdapterNotFoundError lists near misses."""
        wanted = parse_reference(reference)
        return self._catalogue.find(wanted.adapter_id, self._revision_named(wanted))

    def look_up(self, reference: Reference | str) -> Manifest | None:
        """Return what `resolve` would, but None if there is no such adapter, alias or revision; it never lists.

        Raises RegistryError for a malformed reference or a damaged record.
        """
        wanted = parse_reference(reference)
        revision = wanted.revision or self._aliased(wanted)
        return None if revision is None else self._catalogue.look_up(wanted.adapter_id, revision)

    def list(self) -> builtins.list[AdapterSummary]:
        """Return every adapter, sorted by id; a damaged record is named in its adapter's summary and hides no other."""
        return sorted((one for page in self.pages() for one in page.adapters), key=lambda one: one.adapter_id)

    def pages(self, limit: int | None = None, *, after: str | None = None) -> Iterator[AdapterPage]:
        """Yield pages of the first `limit` adapters behind the id `after`, or of all; each is read when asked for."""
        while True:
            page = self.page(LARGEST_PAGE if limit is None else min(limit, LARGEST_PAGE), after=after)
            yield page
            limit = None if limit is None else limit - len(page.adapters)
            if not page.has_more or limit == 0:
                return
            after = page.adapters[-1].adapter_id

    def page(self, limit: int, *, after: str | None = None) -> AdapterPage:
        """Return the first adapters behind the id `after`, in the order of their keys ("a-b" before "a").

        Of a large registry it reads what concerns these adapters alone, and not what was read before.
        """
        return self._listing.page(limit, after)

    def summary(self, adapter_id: str) -> AdapterSummary | None:
        """Return one adapter as a listing shows it, None if there is none; no other one is read."""
        return self._listing.one(adapter_id)

    def similar(self, adapter_id: str) -> builtins.list[str]:
        """Return the ids of adapters most like an unknown one, the best first; in a large registry it sees a part."""
        return self._catalogue.similar(adapter_id)

    def revisions(self, adapter_id: str) -> builtins.list[Manifest]:
        """Return the manifests of an adapter's revisions, newest first: rejected ones too, damaged ones not."""
        manifests, damaged = self._catalogue.readable(adapter_id)
        if not manifests and not damaged:
            raise self._catalogue.unknown_adapter(adapter_id)
        return manifests

    def aliases(self, adapter_id: str) -> dict[str, str]:
        """Return alias -> revision of an adapter, removed aliases left out."""
        current = {name: self._aliases.current(adapter_id, name) for name in self._aliases.names(adapter_id)}
        return {name: entry.revision for name, entry in current.items() if entry and entry.revision}

    def alias_history(self, adapter_id: str, alias: str) -> builtins.list[AliasEntry]:
        """Return every move of an alias, oldest first; setting an earlier entry's revision again rolls back."""
        return self._aliases.history(check_adapter_id(adapter_id), alias)

    def set_alias(self, adapter_id: str, alias: str, revision: str) -> AliasEntry:
        """Point an alias at a revision and return the move; a person may so name a rejected revision too."""
        check_alias(alias)
        self._catalogue.find(adapter_id, revision)
        entry = self._moved(adapter_id, alias, revision)
        if not self.store.exists(manifest_key(adapter_id, revision)):
            # A delete came between: go back, unless somebody has moved the alias on already.
            earlier = self._aliases.history(adapter_id, alias)[: entry.number - 1]
            self._aliases.move(
                adapter_id,
                alias,
                earlier[-1].revision if earlier else None,
                unless=lambda moves: next(moves).number > entry.number,
            )
            raise self._catalogue.unknown_revision(adapter_id, revision)
        return entry

    def remove_alias(self, adapter_id: str, alias: str) -> AliasEntry:
        """Take an alias away and return that move; its history stays."""
        if check_alias(alias) not in self.aliases(adapter_id):
            raise self._unknown_alias(adapter_id, alias)
        return self._moved(adapter_id, alias, None)

    def delete(self, adapter_id: str, revision: str) -> builtins.list[str]:
        """Remove a revision, then those of its objects that no other manifest names; return the keys of these.

        Refused with RegistryError while an alias points at the revision. A revision whose manifest is damaged can be
        deleted too, but leaves its objects behind, since nothing says which they are. The manifests of other adapters
        are read only for samples of an older cat-cluster, which adapters could share.
        """
        key = manifest_key(adapter_id, revision)
        self._refuse_if_aliased(adapter_id, revision)
        try:
            data = self.store.get(key)
        except ObjectNotFoundError:
            raise self._catalogue.unknown_revision(adapter_id, revision) from None
        objects: Mapping[str, StoredObject] = {}
        with suppress(RegistryError):
            objects = parse_manifest(data, key=key, adapter_id=adapter_id, revision=revision).objects
        self.store.delete(key)
        try:
            self._refuse_if_aliased(adapter_id, revision)
        except RegistryError:
            # An alias was moved here while the manifest was being removed: the alias wins.
            with suppress(ObjectExistsError):
                self.store.put(key, data, if_absent=True)
            raise
        self.release(adapter_id, revision)
        return remove_unnamed(self._catalogue, adapter_id, objects)

    def previous_revision(self, adapter_id: str, alias: str, revision: str) -> str | None:
        """Return the last revision the alias named before this one that is still there and not quarantined."""
        for earlier in self._aliases.revisions_before(check_adapter_id(adapter_id), alias, revision):
            is_there = self.store.exists(manifest_key(adapter_id, earlier))
            if is_there and self.quarantined(adapter_id, earlier) is None:
                return earlier
        return None

    def quarantine(self, adapter_id: str, revision: str, reason: str, *, by: str | None = None) -> Quarantine:
        """Take a revision out of service everywhere, and return its first record; by: this machine, if not given."""
        self._catalogue.find(adapter_id, revision)
        return self._quarantines.add(adapter_id, revision, reason, by or platform.node())

    def release(self, adapter_id: str, revision: str) -> None:
        """Put a revision back into service; one that is not quarantined is no error."""
        self._quarantines.remove(adapter_id, revision)

    def quarantined(self, adapter_id: str, revision: str) -> Quarantine | None:
        """Return why a revision is out of service, None if it is not."""
        return self._quarantines.find(adapter_id, revision)

    def read_object(self, manifest: Manifest, name: str, *, fetch: Callable[[str], bytes] | None = None) -> bytes:
        """Return an object of a revision after checking its size and digest; AdapterFormatError if it was changed.

        fetch: gets the object of a key in place of the store, such as from a cache.
        """
        if name not in manifest.objects:
            raise RegistryError(f"{manifest.name} has no object {name!r}: it has {', '.join(sorted(manifest.objects))}")
        stored = manifest.objects[name]
        remedy = f"restore {stored.key} from a backup, or delete {manifest.name} and train its spec again"
        try:
            data = (fetch or self.store.get)(stored.key)
        except ObjectNotFoundError as error:
            raise ObjectNotFoundError(
                f"{name} of {manifest.name} is missing from {self.store.url}: see that the whole storage is there "
                f"(mounted, and copied or restored to its end), or restore {stored.key} from a backup"
            ) from error
        if len(data) != stored.size:
            raise AdapterFormatError(
                f"{name} of {manifest.name} is damaged: {stored.key} has {len(data)} bytes and must have "
                f"{stored.size}; {remedy}"
            )
        if sha256(data) != stored.sha256:
            raise AdapterFormatError(
                f"{name} of {manifest.name} is damaged: the bytes of {stored.key} are not those that were published "
                f"(sha256 differs); {remedy}"
            )
        return data

    def load_weights(
        self,
        manifest: Manifest,
        *,
        base_fingerprints: Sequence[str] = (),
        unet: nn.Module | None = None,
        fetch: Callable[[str], bytes] | None = None,
    ) -> AdapterWeights:
        """Return a revision's weights after checking base, digest, finiteness, rank and, given the base, shapes.

        base_fingerprints: the digests that the base in use goes by; none means any base. unet: the base's `network`, or
        its U-Net for an adapter that changes nothing else. Raises AdapterMismatchError
        for another base model, AdapterFormatError for damaged weights.
        """
        # Not above: listings, and an ingress that has no other need of it, do without torch.
        from cat_cluster.lora.formats import check_fits, read_adapter

        if base_fingerprints and manifest.base_fingerprint not in base_fingerprints:
            raise AdapterMismatchError(
                f"{manifest.name} was trained on base {manifest.base_name!r} (fingerprint "
                f"{manifest.base_fingerprint[:12]}) and the base in use has fingerprint {base_fingerprints[0][:12]}: "
                f"use base {manifest.base_name!r} as it was then, or train the adapter again on this one"
            )
        data = self.read_object(manifest, WEIGHTS, fetch=fetch)
        try:
            weights = read_adapter(data, unet=unet)
            weights.check_finite()
        except AdapterFormatError as error:
            key = manifest.objects[WEIGHTS].key
            raise AdapterFormatError(f"weights of {manifest.name} ({key}): {error}") from error
        if weights.rank != manifest.rank:
            raise AdapterFormatError(
                f"weights of {manifest.name} have rank {weights.rank}, its manifest says {manifest.rank}: "
                "delete the revision and train its spec again"
            )
        if (changed := len(weights.of_text.layers)) != manifest.text_layers:
            raise AdapterFormatError(
                f"weights of {manifest.name} change {changed} layers of text encoders, its manifest says "
                f"{manifest.text_layers}: delete the revision and train its spec again"
            )
        if unet is not None:
            check_fits(weights, unet)
        return weights

    def verify(
        self,
        reference: Reference | str,
        *,
        base_fingerprints: Sequence[str] = (),
        unet: nn.Module | None = None,
    ) -> VerifyReport:
        """Check a revision's manifest and every object of it, and report each problem instead of raising the first."""
        wanted = parse_reference(reference)
        revision = self._revision_named(wanted)
        try:
            manifest = self._catalogue.find(wanted.adapter_id, revision)
        except AdapterNotFoundError:
            raise
        except RegistryError as error:
            return VerifyReport(wanted.adapter_id, revision, 0, (str(error),))
        problems = []
        for name in sorted(manifest.objects.keys() | {WEIGHTS}):
            try:
                if name == WEIGHTS:
                    self.load_weights(manifest, base_fingerprints=base_fingerprints, unet=unet)
                else:
                    self.read_object(manifest, name)
            except CatClusterError as error:
                problems.append(str(error))
        return VerifyReport(wanted.adapter_id, revision, len(manifest.objects), tuple(problems))

    def _store_revision(self, draft: AdapterDraft, revision: str) -> bool:
        """Write a draft's objects and then its manifest; False when another publisher's manifest came first."""
        contents = draft_objects(draft, revision)
        objects = {name: stored for name, (stored, _) in contents.items()}
        created = datetime.now(UTC).isoformat(timespec="milliseconds")
        data = manifest_bytes(draft, revision=revision, created=created, objects=objects)
        try:
            for stored, content in contents.values():
                self.store.put(stored.key, content)
            self.store.put(manifest_key(draft.adapter_id, revision), data, if_absent=True)
        except StoreError as error:
            # Give back the space; if even that fails, what is left is invisible.
            with suppress(StoreError):
                remove_unnamed(self._catalogue, draft.adapter_id, objects)
            if isinstance(error, ObjectExistsError):
                return False
            raise
        for stored, content in contents.values():
            # A delete that began before our manifest was there may have taken an object that both name.
            if not self.store.exists(stored.key):
                self.store.put(stored.key, content)
        return True

    def _moved(self, adapter_id: str, alias: str, revision: str | None) -> AliasEntry:
        entry = self._aliases.move(adapter_id, alias, revision)
        assert entry is not None  # only a move with a condition can be called off
        return entry

    def _refuse_if_aliased(self, adapter_id: str, revision: str) -> None:
        pointing = sorted(name for name, target in self.aliases(adapter_id).items() if target == revision)
        if pointing:
            names = ", ".join(repr(name) for name in pointing)
            raise RegistryError(
                f"{adapter_id}@{revision} cannot be deleted while alias {names} points at it: point the alias at "
                "another revision or remove the alias, then delete again"
            )

    def _revision_named(self, reference: Reference) -> str:
        revision = reference.revision or self._aliased(reference)
        if revision is None:
            raise self._unknown_alias(reference.adapter_id, reference.alias)
        return revision

    def _aliased(self, reference: Reference) -> str | None:
        entry = self._aliases.current(reference.adapter_id, reference.alias)
        return None if entry is None else entry.revision

    def _unknown_alias(self, adapter_id: str, alias: str) -> AdapterNotFoundError:
        return self._catalogue.unknown_alias(adapter_id, alias, self.aliases(adapter_id))
