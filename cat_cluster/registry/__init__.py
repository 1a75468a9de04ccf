"""The registry: adapters with immutable revisions, movable aliases and verified loading, all in the object store."""

from __future__ import annotations

from cat_cluster.registry.aliases import AliasEntry
from cat_cluster.registry.manifest import AdapterDraft, Manifest, revision_of
from cat_cluster.registry.quarantine import Quarantine
from cat_cluster.registry.references import Reference
from cat_cluster.registry.registry import Registry, VerifyReport
from cat_cluster.registry.summary import AdapterSummary

__all__ = [
    "AdapterDraft",
    "AdapterSummary",
    "AliasEntry",
    "Manifest",
    "Quarantine",
    "Reference",
    "Registry",
    "VerifyReport",
    "revision_of",
]
