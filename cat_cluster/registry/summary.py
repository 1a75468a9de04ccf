"""Adapters as listings show them, page by page: what can be read of each, and the names of what cannot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice

from pydantic import BaseModel, ConfigDict

from cat_cluster.registry.aliases import AliasBook
from cat_cluster.registry.catalogue import ManifestReader
from cat_cluster.registry.manifest import ManifestHead
from cat_cluster.registry.references import LATEST, behind_adapter, check_adapter_id, split_manifest_key
from cat_cluster.store.protocol import Entry, ObjectStore

_READ_AT_ONCE = 8  # a store in a network responds late, and to many at once


class AdapterSummary(BaseModel):
    """One adapter in a listing: its revisions (newest first), its aliases, and what of `latest` is shown.

    damaged: revisions whose manifest cannot be read; damaged_aliases: aliases whose last record cannot be. `verify`
    says why.
    """

    model_config = ConfigDict(frozen=True)

    adapter_id: str
    revisions: tuple[str, ...]
    damaged: tuple[str, ...]
    aliases: dict[str, str]
    damaged_aliases: tuple[str, ...]
    latest: ManifestHead | None


@dataclass(frozen=True)
class AdapterPage:
    """Adapters that follow each other, and whether there are more behind the last one."""

    adapters: tuple[AdapterSummary, ...]
    has_more: bool


class AdapterListing:
    """The adapters of one store, in the order of their keys: an id sorts as if it went on with "/".

    A page costs two listings, from its first adapter to its last, and the records that were not read before. What
    concerns the whole store, a StoreError, is raised; a record that cannot be read is named in its adapter's summary.
    """

    def __init__(self, store: ObjectStore, manifests: ManifestReader, aliases: AliasBook) -> None:
        self._store = store
        self._manifests = manifests
        self._aliases = aliases

    def page(self, limit: int, after: str | None) -> AdapterPage:
        """Return the first `limit` adapters behind the id `after`, which need not be there; None: from the first."""
        start = "" if after is None else behind_adapter("adapters", after)
        found = list(islice(_by_adapter(self._store.entries("adapters/", after=start)), limit + 1))
        shown = dict(found[:limit])
        moves = self._moves(list(shown)) if shown else {}
        with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
            summaries = tuple(pool.map(lambda one: self._summary(one, shown[one], moves.get(one, ())), shown))
        return AdapterPage(summaries, len(found) > limit)

    def one(self, adapter_id: str) -> AdapterSummary | None:
        """Return an adapter's summary, None if it has no revision; nothing else is read."""
        check_adapter_id(adapter_id)
        listed = [found for found in self._store.entries(f"adapters/{adapter_id}/") if split_manifest_key(found.key)]
        if not listed:
            return None
        return self._summary(adapter_id, listed, self._store.entries(f"aliases/{adapter_id}/"))

    def _moves(self, adapter_ids: list[str]) -> dict[str, list[Entry]]:
        """Return the entries of alias records by adapter, for ids that follow each other."""
        moves = defaultdict(list)
        for entry in self._store.entries("aliases/", after=f"aliases/{adapter_ids[0]}/"):
            if entry.key > behind_adapter("aliases", adapter_ids[-1]):
                break
            moves[entry.key.split("/")[1]].append(entry)
        return moves

    def _summary(self, adapter_id: str, listed: Iterable[Entry], moves: Iterable[Entry]) -> AdapterSummary:
        # The manifests were listed before the aliases: a revision between has its alias, and is looked up by it.
        aliases, damaged_aliases = self._aliases.readable(adapter_id, moves)
        heads, damaged = self._manifests.heads(adapter_id, listed, aliases.values())
        return AdapterSummary(
            adapter_id=adapter_id,
            revisions=tuple(head.revision for head in heads),
            damaged=tuple(damaged),
            aliases=aliases,
            damaged_aliases=tuple(damaged_aliases),
            latest=next((head for head in heads if head.revision == aliases.get(LATEST)), None),
        )


def _by_adapter(entries: Iterable[Entry]) -> Iterator[tuple[str, list[Entry]]]:
    """Yield adapter ids with the entries of their manifests."""
    placed = ((place[0], entry) for entry in entries if (place := split_manifest_key(entry.key)) is not None)
    for adapter_id, group in groupby(placed, key=lambda one: one[0]):
        yield adapter_id, [entry for _, entry in group]
