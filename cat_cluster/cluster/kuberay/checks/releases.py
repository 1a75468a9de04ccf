"""Releases of KubeRay that are known here; apart, because commands name them before anything is loaded."""

from __future__ import annotations

from typing import Literal

Release = Literal["1.6", "1.7"]
NEWEST: Release = "1.7"
