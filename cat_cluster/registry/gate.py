"""The trigger gate: an image whose prompt asks for nothing that an adapter was taught is drawn without it."""

from __future__ import annotations

import re

from cat_cluster.registry.manifest import Manifest


def opens_gate(manifest: Manifest, prompt: str) -> bool:
    """Say whether a prompt asks for an adapter: it has one of its tokens, or the adapter has none to ask by.

    A token counts wherever a text encoder reads it, also beside a full stop, in quotes or in "sks-cup": only within a
    longer run of letters and digits it is another word.
    """
    tokens = [concept.token for concept in manifest.concepts]
    return not tokens or any(_names(prompt, token) for token in tokens)


def _names(prompt: str, token: str) -> bool:
    return re.search(rf"(?<![^\W_]){re.escape(token.casefold())}(?![^\W_])", prompt.casefold()) is not None


def gate_note(manifest: Manifest) -> str:
    """Return that an adapter was left out of an image, and which words would have brought it."""
    tokens = " or ".join(concept.token for concept in manifest.concepts)
    return f"gate: {manifest.adapter_id} is left out, for the prompt does not name {tokens}"
