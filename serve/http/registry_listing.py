"""The registry as HTTP reads it: pages of adapters, and one adapter by its name, each at most a few seconds old."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from cat_cluster.errors import AdapterNotFoundError, RegistryError
from cat_cluster.registry import LARGEST_PAGE, AdapterPage, AdapterSummary, Manifest, ManifestHead, Registry
from cat_cluster.registry.references import Reference, parse_reference
from cat_cluster.registry.stacks import parse_stack
from serve.http.recent import Recent

TTL_S = 5.0
_PAGES, _NAMES, _MANIFESTS = 8, 1024, 64  # how many are remembered


@dataclass(frozen=True)
class _Wanted:
    """A page: its first `limit` adapters behind the id `after`; served: only those with a `latest` revision."""

    limit: int
    after: str | None
    served: bool


class RegistryListing:
    """The adapters there are, at most TTL_S old; the store is read in threads, those of names apart from pages'."""

    def __init__(
        self, registry: Registry, *, ttl_s: float = TTL_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.registry = registry
        pages, names = ThreadPoolExecutor(2, "registry-pages"), ThreadPoolExecutor(4, "registry-names")
        self._pages = Recent(self._read_page, pages, ttl_s=ttl_s, most=_PAGES, clock=clock)
        self._summaries = Recent(registry.summary, names, ttl_s=ttl_s, most=_NAMES, clock=clock)
        self._similar = Recent(registry.similar, names, ttl_s=ttl_s, most=_NAMES, clock=clock)
        self._manifests = Recent(self._read_manifest, names, ttl_s=ttl_s, most=_MANIFESTS, clock=clock)

    async def page(self, limit: int, after: str | None = None, *, served: bool = False) -> AdapterPage:
        """Return the first `limit` adapters behind the id `after`; served: only those with a `latest` revision.

        Raises StoreError when the store cannot be read, which is kept as long as a success.
        """
        return await self._pages.get(_Wanted(limit, after, served))

    async def summary(self, reference: Reference | str) -> tuple[AdapterSummary, str]:
        """Return the adapter and the revision that a reference names; of the store only this adapter is read.

        AdapterNotFoundError says what there is; RegistryError for an alias whose record cannot be read.
        """
        parsed = parse_model(reference)
        summary = await self._summaries.get(parsed.adapter_id)
        if summary is None:
            near = await self._similar.get(parsed.adapter_id)
            hint = f"did you mean {', '.join(near)}?" if near else "GET /v1/adapters lists those there are"
            raise AdapterNotFoundError(f"no adapter {parsed.adapter_id!r}: {hint}")
        if parsed.revision is None and parsed.alias in summary.damaged_aliases:
            raise RegistryError(
                f"the record of alias {parsed.alias!r} of {parsed.adapter_id} cannot be read: name a revision, or see "
                f"`cat-cluster adapters verify {parsed}`"
            )
        revision = parsed.revision or summary.aliases.get(parsed.alias)
        if revision is None or revision not in (*summary.revisions, *summary.damaged):
            aliases, revisions = ", ".join(sorted(summary.aliases)), ", ".join(summary.revisions[:8])
            raise AdapterNotFoundError(
                f"no {str(reference)!r}: {parsed.adapter_id} has the aliases {aliases or 'none'} and the revisions "
                f"{revisions or 'none'}"
            )
        return summary, revision

    async def head(self, reference: str) -> tuple[AdapterSummary, ManifestHead]:
        """Return the adapter and what a listing shows of the revision that a reference names; see `manifest`."""
        summary, revision = await self.summary(reference)
        if summary.latest is not None and summary.latest.revision == revision:
            return summary, summary.latest
        return summary, await self._manifests.get(Reference(summary.adapter_id, revision))

    async def manifest(self, reference: str) -> tuple[AdapterSummary, Manifest]:
        """Return the adapter and the manifest that a reference names; RegistryError for a damaged manifest."""
        summary, revision = await self.summary(reference)
        return summary, await self._manifests.get(Reference(summary.adapter_id, revision))

    def _read_manifest(self, revision: Reference) -> Manifest:
        manifest = self.registry.look_up(revision)
        if manifest is None:
            raise AdapterNotFoundError(f"no '{revision}': it has been deleted")
        return manifest

    def _read_page(self, wanted: _Wanted) -> AdapterPage:
        """Read on until there is one adapter more than wanted, or none."""
        found: list[AdapterSummary] = []
        after, step = wanted.after, wanted.limit + 1
        while True:
            page = self.registry.page(min(step, LARGEST_PAGE), after=after)
            found += [one for one in page.adapters if one.latest is not None or not wanted.served]
            if len(found) > wanted.limit or not page.has_more:
                return AdapterPage(tuple(found[: wanted.limit]), len(found) > wanted.limit)
            after, step = page.adapters[-1].adapter_id, 2 * step


def parse_model(reference: Reference | str) -> Reference:
    """Return the parts of a reference; what cannot be one names nothing, so it is AdapterNotFoundError."""
    try:
        return parse_reference(reference)
    except RegistryError as error:
        told = str(error)
    with suppress(RegistryError):
        parse_stack(str(reference))
        told = f"{str(reference)[:80]!r} is a stack, which has no entry of its own: name each of its adapters by itself"
    raise AdapterNotFoundError(told)
