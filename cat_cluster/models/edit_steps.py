"""How many steps an edit makes; without torch, for those who only say so."""

from __future__ import annotations

from cat_cluster.errors import SpecError

# Those of diffusers' StableDiffusionImg2ImgPipeline and StableDiffusionInpaintPipeline.
DEFAULT_STRENGTH, DEFAULT_MASKED_STRENGTH = 0.8, 1.0


def edit_strength(given: float | None, *, masked: bool) -> float:
    """Return the strength of an edit; None: the default one."""
    if given is None:
        return DEFAULT_MASKED_STRENGTH if masked else DEFAULT_STRENGTH
    return given


def steps_made(steps: int, strength: float) -> int:
    """Return how many of the steps an edit makes, the last int(steps * strength).

    Raises SpecError when that is none, or the strength is not above 0 and at most 1.
    """
    if not 0.0 < strength <= 1.0:
        raise SpecError(f"strength: {strength:g} is out of range; an edit's is above 0 and at most 1")
    made = min(int(steps * strength), steps)
    if made < 1:
        raise SpecError(f"strength: {strength:g} of {steps} steps leaves none to make; raise it, or ask for more steps")
    return made
