"""Metrics through Ray: each worker records, and its node's metrics port shows them to Prometheus."""

from __future__ import annotations

from ray.util import metrics as ray_metrics

from cat_cluster.telemetry import MetricSpec, Record


class RayBackend:
    """Metrics of the Ray process this runs in: a driver, a task or an actor. Ray puts `ray_` before each name."""

    def open(self, spec: MetricSpec) -> Record:
        """Make a metric in Ray."""
        if spec.kind == "counter":
            counter = ray_metrics.Counter(spec.name, spec.help, spec.labels)
            # Ray refuses to add nothing.
            return lambda value, labels: counter.inc(value, dict(labels)) if value else None
        if spec.kind == "gauge":
            gauge = ray_metrics.Gauge(spec.name, spec.help, spec.labels)
            return lambda value, labels: gauge.set(value, dict(labels))
        histogram = ray_metrics.Histogram(spec.name, spec.help, list(spec.buckets), spec.labels)
        return lambda value, labels: histogram.observe(value, dict(labels))
