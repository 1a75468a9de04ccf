"""What the study should reach: ratios of CAT to plain LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Aim:
    """The ratio of CAT to plain LoRA that a metric should reach: at most for drift, at least for the others."""

    metric: str
    ratio: float

    @property
    def text(self) -> str:
        """The aim as a table says it."""
        sign = "\N{LESS-THAN OR EQUAL TO}" if self.metric == "base_drift" else "\N{GREATER-THAN OR EQUAL TO}"
        return f"{sign} {self.ratio:g}x"

    def measured(self, scores: Mapping[str, Any]) -> list[float | None] | None:
        """Return [estimate, low, high] of the ratio in CAT's scores; None where a judge cannot tell.

        diversity_ratio is a ratio itself, to the base, and stands for its own.
        """
        score = scores.get(self.metric)
        if score is None or self.metric == "diversity_ratio":
            return score and [score["estimate"], *score["interval"]]
        found: list[float | None] | None = score["ratio"]
        return found

    def reached_by(self, ratio: float) -> bool:
        """Whether a measured ratio is enough."""
        return ratio <= self.ratio if self.metric == "base_drift" else ratio >= self.ratio


_AIMS = (
    Aim("kps", 1.5),
    Aim("identity_gain", 0.9),
    Aim("identity_similarity", 0.98),
    Aim("base_drift", 0.4),
    Aim("diversity_ratio", 0.9),
)
AIMS: dict[str, Sequence[Aim]] = {
    "single": _AIMS,
    "joint": tuple(Aim("base_drift", 0.5) if aim.metric == "base_drift" else aim for aim in _AIMS),
    "photos": _AIMS,
}
