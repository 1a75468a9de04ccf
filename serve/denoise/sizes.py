"""Image sizes that a service offers; each is a bucket of its own, since rows of one call share a shape.

Without torch, for an ingress.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cat_cluster.errors import SpecError

if TYPE_CHECKING:
    from cat_cluster.models.base_model import BaseModel

Pixels = tuple[int, int]


def parse_sizes(sizes: Sequence[str] | None, base: BaseModel) -> tuple[Pixels, ...]:
    """Return (width, height) of each size, the base's own first; None: its own, landscape and portrait.

    Raises SpecError for a size that this base's U-Net cannot halve down to its lowest level.
    """
    side, unit = base.resolution, base.size_unit
    if sizes is None:
        width, height = base.landscape
        return tuple(dict.fromkeys([(side, side), (width, height), (height, width)]))
    found = [parse_size(size) for size in sizes]
    for width, height in found:
        if width % unit or height % unit:
            raise SpecError(f"sizes: {width}x{height} does not fit this base; each side must be a multiple of {unit}")
    return tuple(dict.fromkeys([(side, side), *found]))


def parse_size(text: str) -> Pixels:
    """Return (width, height) of "WxH"; SpecError for anything else."""
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if match is None:
        raise SpecError(
            f"size: {text[:40]!r} is not a size; write it as WIDTHxHEIGHT in pixels, as in 512x512, or auto"
        )
    return int(match[1]), int(match[2])


def chosen_size(wanted: Pixels | None, served: Sequence[Pixels]) -> Pixels:
    """Return the size of an image, one of those served; None: the first, the base's own. SpecError for any other."""
    if wanted is None:
        return served[0]
    if wanted not in served:
        offered = ", ".join(f"{width}x{height}" for width, height in served)
        raise SpecError(f"size: {wanted[0]}x{wanted[1]} is not served; choose one of {offered}")
    return wanted
