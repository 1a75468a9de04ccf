"""Pocket-SD, the small Stable Diffusion that ships with the project: its weights, its world and its judges."""

from __future__ import annotations

from pathlib import Path

__all__ = ["weights_path"]


def weights_path() -> Path:
    """The shipped diffusers folder of Pocket-SD."""
    return Path(__file__).resolve().parent / "weights"
