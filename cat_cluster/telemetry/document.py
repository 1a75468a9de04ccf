"""docs/metrics.md, made from the definitions."""

from __future__ import annotations

from collections.abc import Sequence

from cat_cluster.telemetry.recording import MOST_SERIES, OTHER
from cat_cluster.telemetry.specs import LABELS, SERVING_METRICS, TRAINING_METRICS, MetricSpec


def metrics_document() -> str:
    """Return docs/metrics.md: every metric and every label, as Markdown."""
    training, serving = _metrics_table(TRAINING_METRICS), _metrics_table(SERVING_METRICS)
    labels_table = ["| label | values | what it is |", "|---|---|---|"]
    for name, label in LABELS.items():
        values = ", ".join(f"`{value}`" for value in label.values) or "any such"
        labels_table.append(f"| `{name}` | {values} | {label.help} |")
    return "\n".join([_INTRODUCTION, *training, "\n## Serving\n", *serving, _LABELS, *labels_table, ""])


def _metrics_table(specs: Sequence[MetricSpec]) -> list[str]:
    table = ["| metric | kind | unit | labels | what it is |", "|---|---|---|---|---|"]
    for spec in specs:
        labels = ", ".join(f"`{name}`" for name in spec.labels) or "none"
        table.append(f"| `{spec.name}` | {spec.kind} | {spec.unit} | {labels} | {spec.help} |")
    return table


_INTRODUCTION = """\
# Metrics

Made by `metrics_document` in `cat_cluster/telemetry/specs.py`, where each metric is defined once.

Where Ray runs, a node's metrics port shows them with `ray_` in front of each name and labels of Ray's own beside
these (`SessionName`, `NodeAddress`, `WorkerId` and more). Two things differ there: a histogram's sum is estimated from
its buckets, and a gauge that is not a number, such as the loss of an adapter that diverged, is left out.

## Training
"""

_LABELS = f"""
## Labels

A process shows at most {MOST_SERIES} combinations of label values of one metric. Further ones are recorded under
`{OTHER}`, in place of each value that is not from a fixed list: counters and histograms add up there, and a gauge shows
the last one set.
"""
