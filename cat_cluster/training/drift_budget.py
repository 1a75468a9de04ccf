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
    """The factors on alpha of every concept of a pack whose adapter has a drift budget.

    After each step, with running means of the losses and budget b:

        log scale <- log scale + STEP_SIZE * clip(log(cat / (b * identity)), -1, 1),      1/100 <= scale <= 100

    which rests where cat = b * identity: the price of the constraint cat <= b * identity, found by dual ascent. It
    depends on the concept's own losses alone, so neither the pack nor an interruption changes it.
    """

    def __init__(self, budgets: Sequence[float | None], tokens: Sequence[Sequence[str]]) -> None:
        """budgets: one per adapter, None = alpha stays as it is. tokens: of each adapter's concepts."""
        self._budgets = tuple(budgets)
        self._tokens = tuple(tuple(own) for own in tokens)
        self._states = [[DriftBudgetState() for _ in own] for own in self._tokens]

    def weigh(self, batch: Batch) -> Batch:
        """Return the batch with the factors on the weights of its CAT rows; the batch itself where nothing changes."""
        if all(budget is None for budget in self._budgets) or not batch.prior_prompts:
            return batch
        rows = batch.cat_row_M.tolist()
        scale = [self._states[int(batch.adapter_B[row])][int(batch.concept_B[row])].scale for row in rows]
        return replace(batch, cat_weight_M=batch.cat_weight_M * torch.tensor(scale))

    def update(self, adapter: int, losses: Mapping[str, ConceptLoss]) -> None:
        """Adjust the factors of one adapter by the mean losses of its concepts in this step."""
        budget = self._budgets[adapter]
        if budget is None:
            return
        for concept, token in enumerate(self._tokens[adapter]):
            if token in losses:
                self._states[adapter][concept] = _adjusted(self._states[adapter][concept], losses[token], budget)

    def scales(self, adapter: int) -> dict[str, float]:
        """Return the factor of each token of an adapter with a budget; empty without one."""
        if self._budgets[adapter] is None:
            return {}
        return {token: s.scale for token, s in zip(self._tokens[adapter], self._states[adapter], strict=True)}

    def to_json(self, adapter: int) -> list[list[float | None]]:
        """Return an adapter's states as JSON for its checkpoint; empty without a budget."""
        if self._budgets[adapter] is None:
            return []
        return [[state.scale, state.identity, state.cat] for state in self._states[adapter]]

    def restore(self, adapter: int, saved: Sequence[Sequence[float | None]]) -> None:
        """Continue from the states of a checkpoint."""
        if saved:
            self._states[adapter] = [DriftBudgetState(scale or 1.0, identity, cat) for scale, identity, cat in saved]


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
