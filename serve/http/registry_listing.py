"""The registry as HTTP reads it: one listing for all requests within a few seconds, never one per request."""

from __future__ import annotations

import asyncio
import difflib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping

from cat_cluster.errors import AdapterNotFoundError, RegistryError
from cat_cluster.registry import AdapterSummary, Manifest, Registry
from cat_cluster.registry.references import Reference, parse_reference

TTL_S = 5.0
_KEPT = 256  # manifests of revisions that are not `latest`


class RegistryListing:
    """The adapters there are, at most TTL_S old; the store is read in a thread, by one reader at a time."""

    def __init__(
        self, registry: Registry, *, ttl_s: float = TTL_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.registry = registry
        self._ttl_s = ttl_s
        self._clock = clock
        self._reading: asyncio.Task[Mapping[str, AdapterSummary]] | None = None
        self._read_at = 0.0
        self._manifests: OrderedDict[str, Manifest] = OrderedDict()

    async def adapters(self) -> Mapping[str, AdapterSummary]:
        """Return every adapter by id; StoreError when the store cannot be read, which is kept as long as a success."""
        reading = self._reading
        if reading is None or (reading.done() and self._clock() - self._read_at >= self._ttl_s):
            self._reading = reading = asyncio.create_task(self._read())
        return await asyncio.shield(reading)  # cancelling one waiter does not cancel the read

    async def summary(self, reference: str) -> tuple[AdapterSummary, str]:
        """Return the adapter and the revision that a reference names.

        AdapterNotFoundError lists what there is; RegistryError for an alias whose record cannot be read.
        """
        parsed, adapters = parse_model(reference), await self.adapters()
        summary = adapters.get(parsed.adapter_id)
        if summary is None:
            near = difflib.get_close_matches(parsed.adapter_id, adapters, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else "GET /v1/adapters lists those there are"
            raise AdapterNotFoundError(f"no adapter {parsed.adapter_id!r}: {hint}")
        if parsed.revision is None and parsed.alias in summary.damaged_aliases:
            raise RegistryError(
                f"the record of alias {parsed.alias!r} of {parsed.adapter_id} cannot be read: name a revision, or see "
                f"`cat-cluster adapters verify {parsed}`"
            )
        revision = parsed.revision or summary.aliases.get(parsed.alias)
        if revision is None or revision not in (*summary.revisions, *summary.damaged):
            raise AdapterNotFoundError(
                f"no {reference!r}: {parsed.adapter_id} has the aliases {', '.join(sorted(summary.aliases)) or 'none'} "
                f"and the revisions {', '.join(summary.revisions[:8]) or 'none'}"
            )
        return summary, revision

    async def manifest(self, reference: str) -> tuple[AdapterSummary, Manifest]:
        """Return the adapter and the manifest that a reference names; RegistryError for a damaged manifest."""
        summary, revision = await self.summary(reference)
        if summary.latest is not None and summary.latest.revision == revision:
            return summary, summary.latest
        name = f"{summary.adapter_id}@{revision}"
        if name not in self._manifests:
            self._manifests[name] = await asyncio.to_thread(self.registry.resolve, name)
            if len(self._manifests) > _KEPT:
                self._manifests.popitem(last=False)
        return summary, self._manifests[name]

    async def _read(self) -> Mapping[str, AdapterSummary]:
        try:
            return {summary.adapter_id: summary for summary in await asyncio.to_thread(self.registry.list)}
        finally:
            self._read_at = self._clock()


def parse_model(reference: str) -> Reference:
    """Return the parts of a reference; what cannot be one names nothing, so it is AdapterNotFoundError."""
    try:
        return parse_reference(reference)
    except RegistryError as error:
        raise AdapterNotFoundError(str(error)) from None
