"""Stacks: several adapters on one image, each with a strength of its own; their changes add up.

A stack is named by the references of its members with a `+` between them, such as `striped-cup+clown-fish`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from cat_cluster.errors import RegistryError
from cat_cluster.registry.references import Reference, parse_reference

MAX_STRENGTH = 2.0  # of an adapter, and of all adapters of an image; 1 is as it was trained
_BETWEEN = "+"


@dataclass(frozen=True)
class StackMember:
    """An adapter of a stack, and how much of it is applied: 1 as it was trained, 0 nothing."""

    reference: Reference
    strength: float = 1.0


def parse_stack(text: str) -> tuple[Reference, ...]:
    """Return the references of `id+id@alias+...`; RegistryError for one that is none, and for an adapter twice."""
    references = tuple(parse_reference(part) for part in text.split(_BETWEEN))
    check_once_each(references)
    return references


def parse_member(text: str) -> StackMember:
    """Return what `REFERENCE` or `REFERENCE:STRENGTH` names, such as `clown-fish:0.7`; RegistryError for other text.

    A strength is 0 to MAX_STRENGTH.
    """
    name, colon, number = text.partition(":")
    try:
        strength = float(number) if colon else 1.0
    except ValueError:
        strength = math.nan
    shown = repr(text[:80])
    if _BETWEEN in name or (math.isnan(strength) and _BETWEEN in number):
        raise RegistryError(
            f"{shown} names several adapters: name each by itself, with an --adapter or a <lora:...> of its own, or "
            "one behind the other for `adapters export`"
        )
    if ":" in number:
        raise RegistryError(
            f"{shown} has two strengths: an adapter has one, for the U-Net and the text encoders alike; write one "
            f"number, such as {name[:80]}:0.7"
        )
    if not math.isfinite(strength):
        raise RegistryError(f"{shown} names no strength behind its ':': write a number, such as {name[:80]}:0.7")
    return StackMember(parse_reference(name), check_strength(strength, shown))


def check_strength(strength: float, shown: str) -> float:
    """Return a strength if it is 0 to MAX_STRENGTH, else raise RegistryError, which begins with what `shown` says."""
    if not 0 <= strength <= MAX_STRENGTH:
        raise RegistryError(f"{shown} is out of range: a strength is 0 to {MAX_STRENGTH:g}")
    return strength


def check_once_each(references: Iterable[Reference]) -> None:
    """Raise RegistryError when two references are to one adapter, even to two revisions of it."""
    counts = Counter(reference.adapter_id for reference in references)
    twice = next((adapter_id for adapter_id, count in counts.items() if count > 1), None)
    if twice is not None:
        raise RegistryError(
            f"{twice} is named twice: name each adapter of a stack once, and how much of it by strength"
        )


def stack_name(names: Iterable[str]) -> str:
    """Return the name of a stack of what these name, in their order."""
    return _BETWEEN.join(names)
