"""The trigger gate: an image whose prompt asks for nothing that an adapter was taught is drawn without it."""

from __future__ import annotations

from cat_cluster.data.concepts import has_token
from cat_cluster.registry.manifest import Manifest


def opens_gate(manifest: Manifest, prompt: str) -> bool:
    """Say whether a prompt asks for an adapter: it has one of its tokens, or the adapter has none to ask by."""
    tokens = [concept.token for concept in manifest.concepts]
    return not tokens or any(has_token(prompt, token) for token in tokens)


def gate_note(manifest: Manifest) -> str:
    """Return that an adapter was left out of an image, and which words would have brought it."""
    tokens = " or ".join(concept.token for concept in manifest.concepts)
    return f"gate: {manifest.adapter_id} is left out, for the prompt does not name {tokens}"
