"""An adapter in a listing: what can be read of it, and the names of what cannot."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from cat_cluster.registry.aliases import AliasBook
from cat_cluster.registry.catalogue import ManifestReader
from cat_cluster.registry.manifest import Manifest
from cat_cluster.registry.references import LATEST


class AdapterSummary(BaseModel):
    """One adapter in a listing: its revisions (newest first), its aliases, and the manifest that `latest` names.

    damaged: revisions whose manifest cannot be read; damaged_aliases: aliases whose last record cannot be. `verify`
    says why.
    """

    model_config = ConfigDict(frozen=True)

    adapter_id: str
    revisions: tuple[str, ...]
    damaged: tuple[str, ...]
    aliases: dict[str, str]
    damaged_aliases: tuple[str, ...]
    latest: Manifest | None


def summarise(manifests: ManifestReader, aliases: AliasBook, adapter_id: str) -> AdapterSummary:
    """Return an adapter's summary; only what concerns the whole store, a StoreError, is raised."""
    readable, damaged = manifests.readable(adapter_id)
    revisions, damaged_aliases = aliases.readable(adapter_id)
    return AdapterSummary(
        adapter_id=adapter_id,
        revisions=tuple(manifest.revision for manifest in readable),
        damaged=tuple(damaged),
        aliases=revisions,
        damaged_aliases=tuple(damaged_aliases),
        latest=next((manifest for manifest in readable if manifest.revision == revisions.get(LATEST)), None),
    )
