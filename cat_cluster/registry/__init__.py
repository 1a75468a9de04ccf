"""The registry: adapters with immutable revisions, movable aliases and verified loading, all in the object store."""

from __future__ import annotations

from cat_cluster.registry.aliases import AliasEntry
from cat_cluster.registry.manifest import AdapterDraft, Manifest, ManifestHead, revision_of
from cat_cluster.registry.quarantine import Quarantine
from cat_cluster.registry.references import Reference
from cat_cluster.registry.registry import LARGEST_PAGE, Registry, VerifyReport
from cat_cluster.registry.summary import AdapterPage, AdapterSummary

__all__ = [
    "LARGEST_PAGE",
    "AdapterDraft",
    "AdapterPage",
    "AdapterSummary",
    "AliasEntry",
    "Manifest",
    "ManifestHead",
    "Quarantine",
    "Reference",
    "Registry",
    "VerifyReport",
    "revision_of",
]
