"""What the loop says after each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from cat_cluster.training.loss_curves import ConceptLoss

_T = TypeVar("_T")


@dataclass(frozen=True)
class StepReport:
    """Progress after a step: losses[adapter id][token]; seconds is this step's wall time.

    done, steps: how many steps each adapter that had one in this step has done of its own, and how many it will do.
    alpha_scales: adapter id -> token -> the factor a drift budget puts on alpha; adapters without one are absent.
    teacher_known, teacher_asked: predictions of the base that came from a pool, and those computed in this step.
    """

    done: Mapping[str, int]
    steps: Mapping[str, int]
    seconds: float
    rows: int
    losses: dict[str, dict[str, ConceptLoss]]
    dropped: dict[str, str]
    alpha_scales: dict[str, dict[str, float]] = field(default_factory=dict)
    teacher_known: int = 0
    teacher_asked: int = 0

    @property
    def step(self) -> int:
        """The step of the adapter that is farthest."""
        return max(self.done.values())

    @property
    def ended(self) -> tuple[str, ...]:
        """The adapters that train no more after this step."""
        return tuple(name for name, done in self.done.items() if done >= self.steps[name] or name in self.dropped)

    def of(self, names: Mapping[str, str]) -> StepReport:
        """Return what it says of some adapters, each under another name: names maps those here to the new ones."""

        def own(values: Mapping[str, _T]) -> dict[str, _T]:
            return {new: values[name] for name, new in names.items() if name in values}

        return replace(
            self,
            done=own(self.done),
            steps=own(self.steps),
            losses=own(self.losses),
            dropped=own(self.dropped),
            alpha_scales=own(self.alpha_scales),
        )

    @property
    def notable(self) -> bool:
        """Whether it is the first step of an adapter, or the last."""
        return 1 in self.done.values() or bool(self.ended)
