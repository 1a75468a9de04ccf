"""The generator of every random draw of training: named keys in, a stream of numbers out."""

from __future__ import annotations

import hashlib

import numpy as np


def keyed_generator(*key: str | int) -> np.random.Generator:
    """Return a counter-based generator (Philox) whose stream is a function of `key` alone."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
