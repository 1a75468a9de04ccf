"""How many steps an edit makes; without torch, for those who only say so."""

from __future__ import annotations

from cat_cluster.errors import SpecError

# Those of diffusers' StableDiffusionImg2ImgPipeline and StableDiffusionInpaintPipeline.
DEFAULT_STRENGTH, DEFAULT_MASKED_STRENGTH = 0.8, 1.0


def edit_strength(given: float | None, *, masked: bool) -> float:
    """Return the strength of an edit, None: the default one. Raises SpecError where it is not above 0 and at most 1."""
    if given is None:
        return DEFAULT_MASKED_STRENGTH if masked else DEFAULT_STRENGTH
    if not 0.0 < given <= 1.0:
        raise SpecError(f"strength: {given:g} is out of range; an edit's is above 0 and at most 1")
    return given


def steps_made(steps: int, strength: float) -> int:
    """Return how many of the steps an edit makes, the last int(steps * strength); SpecError when that is none."""
    made = min(int(steps * strength), steps)
    if made < 1:
        raise SpecError(f"strength: {strength:g} of {steps} steps leaves none to make; raise it, or ask for more steps")
    return made
