"""Every metric the project exports, its name, unit and help text in one place, and the one way to record it.

Names follow Prometheus: prefix `cat_`, base units, `_total` for counters. What records them is a backend: a
prometheus_client registry here, or Ray's metrics in `cat_cluster.cluster.ray_metrics`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

Kind = Literal["counter", "gauge", "histogram"]
Record = Callable[[float, Mapping[str, str]], None]

MOST_SERIES = 200  # of one metric in one process: a scrape stays small however many adapters a cluster trains
OTHER = "other"


@dataclass(frozen=True)
class LabelSpec:
    """A label: its help text, and the values it may have. Those of a pattern are many, and are bounded in number."""

    help: str
    values: tuple[str, ...] = ()
    pattern: str | None = None

    def allows(self, value: str) -> bool:
        """Whether the label may have this value."""
        return value in self.values if self.pattern is None else re.fullmatch(self.pattern, value) is not None


# The patterns are those of the job spec: whatever a job may name is a label value.
LABELS: Mapping[str, LabelSpec] = {
    "adapter": LabelSpec("Adapter id.", pattern=r"[a-z0-9][a-z0-9-]{0,62}"),
    "token": LabelSpec("Token of the concept within its adapter.", pattern=r"[^\s,{}]+"),
    "operation": LabelSpec("What was asked of the store.", ("read", "write", "list", "delete")),
    "result": LabelSpec("hit: the prediction was kept; miss: the base model was asked.", ("hit", "miss")),
    "state": LabelSpec(
        "Where an adapter of the job stands.",
        ("waiting", "training", "evaluating", "published", "already published", "rejected", "failed"),
    ),
}


@dataclass(frozen=True)
class MetricSpec:
    """One metric. unit: a base unit for people; labels: keys of LABELS; buckets: upper ends, for a histogram only."""

    name: str
    kind: Kind
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"cat_[a-z]+(_[a-z]+)*", self.name):
            raise ValueError(f"metric {self.name!r}: write cat_ and words of a-z joined by _")
        if self.name.endswith("_total") != (self.kind == "counter"):
            raise ValueError(f"metric {self.name!r}: a counter's name ends in _total, and no other's does")
        if self.unit in ("seconds", "bytes") and not re.search(rf"_{self.unit}(_total)?$", self.name):
            raise ValueError(f"metric {self.name!r}: its name must end in its unit {self.unit}")
        if not set(self.labels) <= LABELS.keys():
            raise ValueError(f"metric {self.name!r}: labels {sorted(set(self.labels) - LABELS.keys())} are not known")
        if (self.kind == "histogram") != bool(self.buckets) or list(self.buckets) != sorted({*self.buckets}):
            raise ValueError(f"metric {self.name!r}: a histogram has rising buckets, and no other metric has any")


STEPS = MetricSpec("cat_training_steps_total", "counter", "steps", "Optimiser steps done.")
ROWS = MetricSpec("cat_training_rows_total", "counter", "rows", "Rows trained on, with and without the token.")
STEPS_PER_SECOND = MetricSpec(
    "cat_training_steps_per_second", "gauge", "steps per second", "Speed of the last step; checkpoints do not count."
)
ROWS_PER_SECOND = MetricSpec(
    "cat_training_rows_per_second", "gauge", "rows per second", "Rows of the last step over its time."
)
IDENTITY_LOSS = MetricSpec(
    "cat_training_identity_loss",
    "gauge",
    "squared error",
    "Mean identity loss of the concept's rows in the last step.",
    ("adapter", "token"),
)
CAT_LOSS = MetricSpec(
    "cat_training_cat_loss",
    "gauge",
    "squared error",
    "Mean CAT loss of the concept's rows in the last step that had any.",
    ("adapter", "token"),
)
DROPPED_ADAPTERS = MetricSpec(
    "cat_training_dropped_adapters_total", "counter", "adapters", "Adapters given up because training diverged."
)
TEACHER_CACHE = MetricSpec(
    "cat_teacher_cache_requests_total",
    "counter",
    "predictions",
    "Predictions of the base model that training asked for.",
    ("result",),
)
CHECKPOINT_SECONDS = MetricSpec(
    "cat_checkpoint_seconds",
    "histogram",
    "seconds",
    "Time to write one checkpoint of one adapter to the store.",
    buckets=(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
)
CHECKPOINT_BYTES = MetricSpec("cat_checkpoint_bytes_total", "counter", "bytes", "Bytes of checkpoints written.")
STORE_RETRIES = MetricSpec(
    "cat_store_retries_total", "counter", "requests", "Requests to the object store sent again.", ("operation",)
)
PACKS_RUNNING = MetricSpec("cat_packs_running", "gauge", "packs", "Packs that are training now.")
ADAPTERS = MetricSpec("cat_adapters", "gauge", "adapters", "Adapters of the job by state.", ("state",))
EVALUATION_SECONDS = MetricSpec(
    "cat_evaluation_seconds",
    "histogram",
    "seconds",
    "Time to measure one adapter.",
    buckets=(1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0),
)

TRAINING_METRICS: tuple[MetricSpec, ...] = (
    STEPS,
    ROWS,
    STEPS_PER_SECOND,
    ROWS_PER_SECOND,
    IDENTITY_LOSS,
    CAT_LOSS,
    DROPPED_ADAPTERS,
    TEACHER_CACHE,
    CHECKPOINT_SECONDS,
    CHECKPOINT_BYTES,
    STORE_RETRIES,
    PACKS_RUNNING,
    ADAPTERS,
    EVALUATION_SECONDS,
)


class MetricBackend(Protocol):
    """Where values go."""

    def open(self, spec: MetricSpec) -> Record:
        """Make a metric and return what records a value of it: added to a counter, set on a gauge, or observed."""


class Metrics:
    """Records metrics of one process; safe to call from any thread.

    A metric has at most `most_series` combinations of label values. Any further one is recorded with "other" in
    place of each value that is not from a fixed list, so that a long life among many adapters stays bounded; a
    gauge's "other" is the last one set.
    """

    def __init__(
        self,
        backend: MetricBackend,
        specs: Sequence[MetricSpec] = TRAINING_METRICS,
        *,
        most_series: int = MOST_SERIES,
    ) -> None:
        self._most_series = most_series
        self._records = {spec: backend.open(spec) for spec in specs}
        self._seen: dict[MetricSpec, set[tuple[str, ...]]] = {spec: set() for spec in specs}
        self._lock = threading.Lock()

    def set(self, spec: MetricSpec, value: float, **labels: str) -> None:
        """Set a gauge, in its own unit. Raises ValueError for another kind, or for labels the metric has not."""
        self._record(spec, "gauge", value, labels)

    def inc(self, spec: MetricSpec, value: float = 1.0, **labels: str) -> None:
        """Add to a counter, in its own unit. Raises ValueError for another kind, wrong labels, or a negative value."""
        if not value >= 0.0:
            raise ValueError(f"{spec.name} cannot grow by {value}")
        self._record(spec, "counter", value, labels)

    def observe(self, spec: MetricSpec, value: float, **labels: str) -> None:
        """Count a value in a histogram, in its own unit. Raises ValueError for another kind or wrong labels."""
        self._record(spec, "histogram", value, labels)

    def _record(self, spec: MetricSpec, kind: Kind, value: float, labels: Mapping[str, str]) -> None:
        if spec.kind != kind:
            raise ValueError(f"{spec.name} is a {spec.kind}, not a {kind}")
        if labels.keys() != set(spec.labels):
            raise ValueError(f"{spec.name} has the labels {list(spec.labels)}, got {sorted(labels)}")
        for name, text in labels.items():
            if not LABELS[name].allows(text):
                raise ValueError(f"{spec.name}: {text!r} cannot be the label {name}: {LABELS[name].help}")
        self._records[spec](float(value), self._bounded(spec, labels))

    def _bounded(self, spec: MetricSpec, labels: Mapping[str, str]) -> Mapping[str, str]:
        combination, seen = tuple(labels[name] for name in spec.labels), self._seen[spec]
        with self._lock:
            if combination in seen:
                return labels
            if len(seen) < self._most_series:
                seen.add(combination)
                return labels
        return {name: text if LABELS[name].pattern is None else OTHER for name, text in labels.items()}


class PrometheusBackend:
    """Metrics in a prometheus_client registry of their own, for a process that serves `/metrics` itself."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry

    def open(self, spec: MetricSpec) -> Record:
        """Register a metric; ValueError when the registry has one of this name."""
        if spec.kind == "counter":
            counter = Counter(spec.name, spec.help, spec.labels, registry=self.registry)
            return lambda value, labels: (counter.labels(**labels) if labels else counter).inc(value)
        if spec.kind == "gauge":
            gauge = Gauge(spec.name, spec.help, spec.labels, registry=self.registry)
            return lambda value, labels: (gauge.labels(**labels) if labels else gauge).set(value)
        histogram = Histogram(spec.name, spec.help, spec.labels, buckets=spec.buckets, registry=self.registry)
        return lambda value, labels: (histogram.labels(**labels) if labels else histogram).observe(value)

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


def metrics_document() -> str:
    """Return docs/metrics.md: every metric and every label, as Markdown."""
    metrics = ["| metric | kind | unit | labels | what it is |", "|---|---|---|---|---|"]
    for spec in TRAINING_METRICS:
        labels = ", ".join(f"`{name}`" for name in spec.labels) or "none"
        metrics.append(f"| `{spec.name}` | {spec.kind} | {spec.unit} | {labels} | {spec.help} |")
    labels_table = ["| label | values | what it is |", "|---|---|---|"]
    for name, label in LABELS.items():
        values = ", ".join(f"`{value}`" for value in label.values) or "any such"
        labels_table.append(f"| `{name}` | {values} | {label.help} |")
    return "\n".join([_INTRODUCTION, *metrics, _LABELS, *labels_table, ""])


_INTRODUCTION = """\
# Metrics

Made by `metrics_document` in `cat_cluster/telemetry.py`, where each metric is defined once.

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
