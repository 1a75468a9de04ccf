"""Loss curves of a pack: means per adapter and concept over bins of steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    """Loss curves of a pack, kept as means over at most 100 bins of steps per concept."""

    def __init__(self, tasks: Sequence[AdapterTask], steps: Sequence[int]) -> None:
        """steps: of each adapter's training."""
        self._tasks = tasks
        self._bins = {task.adapter_id: _bin_size(own) for task, own in zip(tasks, steps, strict=True)}
        # adapter id -> token -> bin -> [identity sum, identity rows, cat sum, cat rows, outside sum, outside rows]
        self._sums: dict[str, dict[str, dict[int, list[float]]]] = {
            task.adapter_id: {concept.token: {} for concept in task.concepts} for task in tasks
        }

    def record(self, done: Mapping[str, int], batch: Batch, losses: RowLosses) -> dict[str, dict[str, ConceptLoss]]:
        """Add the losses of a step and return this step's means per adapter and token.

        done: adapter id -> its steps with this one.
        """
        step_sums: dict[str, dict[str, list[float]]] = {}
        sums_of_row = []
        for adapter, concept in zip(batch.adapter_B.tolist(), batch.concept_B.tolist(), strict=True):
            task = self._tasks[adapter]
            of_adapter = step_sums.setdefault(task.adapter_id, {})
            sums_of_row.append(of_adapter.setdefault(task.concepts[concept].token, [0.0] * _SUMS))
        for row, loss in enumerate(losses.identity_B.tolist()):
            sums_of_row[row][0] += loss
            sums_of_row[row][1] += 1
        held = zip(batch.cat_row_M.tolist(), losses.cat_M.tolist(), batch.outside_M.tolist(), strict=True)
        for row, loss, outside in held:
            place = 4 if outside else 2
            sums_of_row[row][place] += loss
            sums_of_row[row][place + 1] += 1
        for adapter_id, tokens in step_sums.items():
            bin_index = (done[adapter_id] - 1) // self._bins[adapter_id]
            for token, sums in tokens.items():
                total = self._sums[adapter_id][token].setdefault(bin_index, [0.0] * _SUMS)
                total[:] = [a + b for a, b in zip(total, sums, strict=True)]
        return {a: {t: _means(sums) for t, sums in tokens.items()} for a, tokens in step_sums.items()}

    def of(self, adapter_id: str) -> dict[str, Any]:
        """Return the curves of an adapter: {"steps": [...], "<token>": {"identity": [...], "cat": [...]}}.

        Concepts with masks have "outside" too.
        """
        return _curves(self._sums[adapter_id], self._bins[adapter_id])

    def to_json(self, adapter_id: str) -> dict[str, Any]:
        """Return an adapter's sums as JSON for its checkpoint."""
        return {t: {str(i): sums for i, sums in bins.items()} for t, bins in self._sums[adapter_id].items()}

    def restore(self, adapter_id: str, saved: Mapping[str, Any]) -> None:
        """Continue from the sums of a checkpoint."""
        self._sums[adapter_id] = _sums_from(saved)


def curves(saved: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Return the curves, as `LossCurves.of` does, of the sums that a checkpoint of a run of `steps` steps holds."""
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
