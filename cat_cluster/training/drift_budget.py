"""The drift budget: alpha is adjusted per concept, so that its CAT loss keeps to a share of its identity loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from cat_cluster.data.draws import Batch
from cat_cluster.training.loss_curves import ConceptLoss

SMOOTHING = 0.1  # of the two running losses; they are noisy from step to step
STEP_SIZE = 0.05  # of log alpha per step and unit of log excess
LARGEST_SCALE = 100.0


@dataclass(frozen=True)
class DriftBudgetState:
    """The factor on a concept's alpha and the running means of its losses."""

    scale: float = 1.0
    identity: float | None = None
    cat: float | None = None


class DriftBudget:
    """The factors on alpha of the concepts of an adapter that has a drift budget; 1 of one that has none.

    After each step, with running means of the losses and budget b:

        log scale <- log scale + STEP_SIZE * clip(log(cat / (b * identity)), -1, 1),      1/100 <= scale <= 100

    which rests where cat = b * identity: the price of the constraint cat <= b * identity, found by dual ascent. It
    depends on the concept's own losses alone, so neither the pack nor an interruption changes it.
    """

    def __init__(self, budget: float | None, tokens: Sequence[str]) -> None:
        """budget: None = alpha stays as it is. tokens: of the adapter's concepts."""
        self._budget, self._tokens = budget, tuple(tokens)
        self._states = [DriftBudgetState() for _ in tokens]

    def update(self, losses: Mapping[str, ConceptLoss]) -> None:
        """Adjust the factors by the mean losses of the concepts in this step."""
        if self._budget is None:
            return
        for concept, token in enumerate(self._tokens):
            if token in losses:
                self._states[concept] = _adjusted(self._states[concept], losses[token], self._budget)

    def factor(self, concept: int) -> float:
        """Return the factor of a concept, by its place in the adapter."""
        return self._states[concept].scale

    def scales(self) -> dict[str, float]:
        """Return the factor of each token; empty without a budget."""
        if self._budget is None:
            return {}
        return {token: state.scale for token, state in zip(self._tokens, self._states, strict=True)}

    def to_json(self) -> list[list[float | None]]:
        """Return the states as JSON for a checkpoint; empty without a budget."""
        return [] if self._budget is None else [[state.scale, state.identity, state.cat] for state in self._states]

    def restore(self, saved: Sequence[Sequence[float | None]]) -> None:
        """Continue from the states of a checkpoint."""
        if saved:
            self._states = [DriftBudgetState(scale or 1.0, identity, cat) for scale, identity, cat in saved]


def weigh(batch: Batch, budgets: Sequence[DriftBudget]) -> Batch:
    """Return the batch with the factors on the weights of its CAT rows; the batch itself where nothing changes.

    budgets: of the batch's adapters.
    """
    if not any(budget.scales() for budget in budgets) or not batch.prior_prompts:
        return batch
    rows = batch.cat_row_M.tolist()
    scale = [budgets[int(batch.adapter_B[row])].factor(int(batch.concept_B[row])) for row in rows]
    return replace(batch, cat_weight_M=batch.cat_weight_M * torch.tensor(scale))


def _adjusted(state: DriftBudgetState, loss: ConceptLoss, budget: float) -> DriftBudgetState:
    if loss.cat is None or not (math.isfinite(loss.cat) and math.isfinite(loss.identity)):
        return state
    identity = _running(state.identity, loss.identity)
    cat = _running(state.cat, loss.cat)
    excess = math.log(max(cat, 1e-12) / max(budget * identity, 1e-12))
    log_scale = math.log(state.scale) + STEP_SIZE * max(-1.0, min(1.0, excess))
    limit = math.log(LARGEST_SCALE)
    return DriftBudgetState(math.exp(max(-limit, min(limit, log_scale))), identity, cat)


def _running(before: float | None, value: float) -> float:
    return value if before is None else before + SMOOTHING * (value - before)
