"""Quality gates: the conditions on its metrics that an adapter must meet to be published."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cat_cluster.errors import SpecError
from cat_cluster.spec.fields import CONDITION


def check_gates(require: Mapping[str, str] | None, metrics: Mapping[str, Any]) -> list[str]:
    """Return one sentence per gate that fails, in the order of `require`; none when the adapter may be published.

    require: metric -> ">=" or "<=" and a number, as `evaluation.require` has it; None means no gate. metrics: values
    by name, as `Evaluation.to_json()` has them. A value that is missing, None or not finite fails its gate: what was
    not measured is not shown to be good. Raises SpecError for a condition of another form.
    """
    failures = (_failure(metric, condition, metrics) for metric, condition in (require or {}).items())
    return [failure for failure in failures if failure is not None]


def _failure(metric: str, condition: str, metrics: Mapping[str, Any]) -> str | None:
    parts = CONDITION.fullmatch(condition.strip())
    if parts is None:
        raise SpecError(f"evaluation.require: {metric} has {condition!r}; write >= or <= and a number, as in '>=0.1'")
    comparison, limit = parts[1], float(parts[2])
    needed = f"it must be {comparison} {parts[2]}"
    if metric not in metrics:
        return f"{metric} was not measured, and {needed}"
    value = metrics[metric]
    if value is None:
        return f"{metric} is not known, for the judge cannot tell it, and {needed}"
    if not math.isfinite(value):
        return f"{metric} is {value}, which is no measurement, and {needed}"
    if _holds(value, comparison, limit):
        return None
    # A short number that would pass, as 0.1 for 0.09999, would make the sentence absurd: then all digits.
    short = f"{value:.4g}"
    shown = repr(float(value)) if _holds(float(short), comparison, limit) else short
    return f"{metric} is {shown}, and {needed}"


def _holds(value: float, comparison: str, limit: float) -> bool:
    return value >= limit if comparison == ">=" else value <= limit
