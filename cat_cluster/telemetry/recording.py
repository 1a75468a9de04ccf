"""The one way to record a metric; where values go is a backend: a prometheus_client registry here, or Ray's metrics."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cat_cluster.telemetry.specs import LABELS, TRAINING_METRICS, Kind, MetricSpec

Record = Callable[[float, Mapping[str, str]], None]
MOST_SERIES = 200  # of one metric in one process: a scrape stays small however many adapters a cluster trains
OTHER = "other"


class MetricBackend(Protocol):
    """Where values go."""

    def open(self, spec: MetricSpec) -> Record:
        """Make a metric and return what records a value of it: added to a counter, set on a gauge, or observed."""

    def forget(self, spec: MetricSpec, labels: Mapping[str, str]) -> None:
        """Show the value of a gauge with these labels no more."""


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
        self._backend, self._most_series = backend, most_series
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

    def forget(self, **labels: str) -> None:
        """Show gauges with these label values no more, as of an adapter that has left, and give others their room."""
        for spec, seen in self._seen.items():
            if spec.kind == "gauge" and labels.keys() <= set(spec.labels):
                with self._lock:
                    every = [dict(zip(spec.labels, one, strict=True)) for one in seen]
                    gone = [own for own in every if labels.items() <= own.items()]
                    seen.difference_update(tuple(own.values()) for own in gone)
                for own in gone:
                    self._backend.forget(spec, own)

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
        self._gauges: dict[MetricSpec, Gauge] = {}

    def open(self, spec: MetricSpec) -> Record:
        """Register a metric; ValueError when the registry has one of this name."""
        if spec.kind == "counter":
            counter = Counter(spec.name, spec.help, spec.labels, registry=self.registry)
            return lambda value, labels: (counter.labels(**labels) if labels else counter).inc(value)
        if spec.kind == "gauge":
            gauge = self._gauges[spec] = Gauge(spec.name, spec.help, spec.labels, registry=self.registry)
            return lambda value, labels: (gauge.labels(**labels) if labels else gauge).set(value)
        histogram = Histogram(spec.name, spec.help, spec.labels, buckets=spec.buckets, registry=self.registry)
        return lambda value, labels: (histogram.labels(**labels) if labels else histogram).observe(value)

    def forget(self, spec: MetricSpec, labels: Mapping[str, str]) -> None:
        """Show the value of a gauge with these labels no more."""
        self._gauges[spec].remove(*(labels[name] for name in spec.labels))

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
