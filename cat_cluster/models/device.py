"""The torch device that a setting means."""

from __future__ import annotations

import torch

from cat_cluster.errors import SpecError


def choose_device(name: str) -> str:
    """Return the torch device for a setting: `auto` means CUDA where there is one, else the CPU."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise SpecError(f"device {name!r}: this torch sees no CUDA device; set CAT_DEVICE=cpu or auto")
    return name
