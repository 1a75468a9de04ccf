"""Evaluation prompts: templates in which {} stands for the subject, with its token or without."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from cat_cluster.errors import EvaluationError

# Never a prompt that training saw: the general prompts of the prior-prompt mixture begin with "a photo of".
POCKET_TEMPLATES = (
    "a picture of a {} on grass",
    "a picture of a {} on sand",
    "a picture of a {} in snow",
    "a picture of a {} at night",
    "a picture of a {} at sunset",
    "a picture of a {} on a table",
)
GENERAL_TEMPLATES = (
    "a picture of a {} on a wooden table",
    "a picture of a {} on a sandy beach",
    "a picture of a {} in the snow",
    "a picture of a {} in a forest",
    "a picture of a {} on a city street at night",
    "a picture of a {} in front of a brick wall",
    "a watercolor painting of a {}",
    "an illustration of a {} on a white background",
)
# Rare strings of the same look as a token: what any unknown word brings, a decoy brings too.
DECOYS = ("wjq", "xvk", "bzg", "qhp")


def evaluation_prompts(prompts: str | Sequence[str], *, pocket: bool) -> tuple[str, ...]:
    """Return the templates that the spec field `evaluation.prompts` names; refuses one that has not exactly one {}."""
    if prompts == "default":
        return POCKET_TEMPLATES if pocket else GENERAL_TEMPLATES
    chosen = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not chosen:
        raise EvaluationError("evaluation.prompts is empty: give at least one prompt, or default")
    for template in chosen:
        if template.count("{}") != 1:
            raise EvaluationError(
                f'evaluation.prompts: {template!r} must hold {{}} once, where the subject ("sks cup") goes, '
                'for example "a picture of a {} in snow"'
            )
    return chosen


def fill(template: str, class_noun: str, trigger: str | None) -> str:
    """Return the prompt: the trigger goes before the class noun, and nothing does for None."""
    return template.replace("{}", class_noun if trigger is None else f"{trigger} {class_noun}")


def decoy(tokens: Sequence[str]) -> str:
    """Return a decoy that is none of the tokens."""
    taken = {token.lower() for token in tokens}
    words = (word * times for times in itertools.count(1) for word in DECOYS)
    return next(word for word in words if word not in taken)
