"""Loss curves of an adapter: means per concept over bins of its steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cat_cluster.data.draws import AdapterTask, Batch
from cat_cluster.training.step import RowLosses

CURVE_POINTS = 100
_SUMS = 6  # of a bin: a sum and a count for each kind of loss


@dataclass(frozen=True)
class ConceptLoss:
    """Mean losses of one concept's rows; cat is None where none carried the CAT term, outside where none has a mask."""

    identity: float
    cat: float | None
    outside: float | None = None


class LossCurves:
    """Loss curves of one adapter, kept as means over at most 100 bins of its steps per concept."""

    def __init__(self, tokens: Iterable[str], steps: int) -> None:
        """tokens: of its concepts. steps: of its whole training."""
        self._bin = _bin_size(steps)
        # token -> bin -> [identity sum, identity rows, cat sum, cat rows, outside sum, outside rows]
        self._sums: dict[str, dict[int, list[float]]] = {token: {} for token in tokens}

    def record(self, step: int, sums: Mapping[str, Sequence[float]]) -> dict[str, ConceptLoss]:
        """Add the sums of a step, counted from 1, and return its means per token."""
        for token, own in sums.items():
            total = self._sums[token].setdefault((step - 1) // self._bin, [0.0] * _SUMS)
            total[:] = [a + b for a, b in zip(total, own, strict=True)]
        return {token: _means(own) for token, own in sums.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the sums as JSON for a checkpoint."""
        return {token: {str(i): sums for i, sums in bins.items()} for token, bins in self._sums.items()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Continue from the sums of a checkpoint."""
        self._sums = _sums_from(saved)

    def curves(self) -> dict[str, Any]:
        """Return {"steps": [...], "<token>": {"identity": [...], "cat": [...]}}; concepts with masks have "outside"."""
        return _curves(self._sums, self._bin)


def step_sums(tasks: Sequence[AdapterTask], batch: Batch, losses: RowLosses) -> list[dict[str, list[float]]]:
    """Return, for each adapter of a batch, token -> sums and counts of its rows' losses, as `record` takes them."""
    found: list[dict[str, list[float]]] = [{} for _ in tasks]
    sums_of_row = []
    for adapter, concept in zip(batch.adapter_B.tolist(), batch.concept_B.tolist(), strict=True):
        token = tasks[adapter].concepts[concept].token
        sums_of_row.append(found[adapter].setdefault(token, [0.0] * _SUMS))
    for row, loss in enumerate(losses.identity_B.tolist()):
        sums_of_row[row][0] += loss
        sums_of_row[row][1] += 1
    held = zip(batch.cat_row_M.tolist(), losses.cat_M.tolist(), batch.outside_M.tolist(), strict=True)
    for row, loss, outside in held:
        place = 4 if outside else 2
        sums_of_row[row][place] += loss
        sums_of_row[row][place + 1] += 1
    return found


def curves(saved: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Return the curves, as `LossCurves.curves` does, of the sums that a checkpoint of a run of `steps` steps holds."""
    return _curves(_sums_from(saved), _bin_size(steps))


def _bin_size(steps: int) -> int:
    return max(1, -(-steps // CURVE_POINTS))


def _sums_from(saved: Mapping[str, Any]) -> dict[str, dict[int, list[float]]]:
    # Checkpoints of the time before masks have no sums of what is outside them.
    return {
        token: {int(i): [*sums, *[0.0] * (_SUMS - len(sums))] for i, sums in bins.items()}
        for token, bins in saved.items()
    }


def _curves(tokens: Mapping[str, Mapping[int, Sequence[float]]], bin_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for token, bins in tokens.items():
        means = [_means(bins[index]) for index in sorted(bins)]
        found["steps"] = [(index + 1) * bin_size for index in sorted(bins)]
        found[token] = {
            "identity": [_finite(mean.identity) for mean in means],
            "cat": [_finite(mean.cat) for mean in means],
        }
        if any(mean.outside is not None for mean in means):
            found[token]["outside"] = [_finite(mean.outside) for mean in means]
    return found


def _means(sums: Sequence[float]) -> ConceptLoss:
    identity, cat, outside = (total / rows if rows else None for total, rows in zip(sums[::2], sums[1::2], strict=True))
    assert identity is not None  # each step of a concept has rows
    return ConceptLoss(identity, cat, outside)


def _finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None
