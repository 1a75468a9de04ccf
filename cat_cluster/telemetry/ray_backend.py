"""Metrics through Ray: each worker records, and its node's metrics port shows them to Prometheus."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

from prometheus_client import CollectorRegistry
from ray.util import metrics as ray_metrics

from cat_cluster.telemetry import MetricSpec, PrometheusBackend, Record

AGAIN_S = 5.0


class RayBackend:
    """Metrics of the Ray process this runs in: a driver, a task or an actor. Ray puts `ray_` before each name.

    Ray's agent drops a gauge 20 seconds after it was last set, although the process lives: a thread sets each again.
    """

    def __init__(self) -> None:
        self._gauges: dict[MetricSpec, ray_metrics.Gauge] = {}
        self._last: dict[tuple[MetricSpec, tuple[tuple[str, str], ...]], float] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def open(self, spec: MetricSpec) -> Record:
        """Make a metric in Ray."""
        if spec.kind == "counter":
            counter = ray_metrics.Counter(spec.name, spec.help, spec.labels)
            # Ray refuses to add nothing.
            return lambda value, labels: counter.inc(value, dict(labels)) if value else None
        if spec.kind == "gauge":
            self._gauges[spec] = ray_metrics.Gauge(spec.name, spec.help, spec.labels)
            return lambda value, labels: self._set(spec, value, labels)
        histogram = ray_metrics.Histogram(spec.name, spec.help, list(spec.buckets), spec.labels)
        return lambda value, labels: histogram.observe(value, dict(labels))

    def forget(self, spec: MetricSpec, labels: Mapping[str, str]) -> None:
        """Set a gauge with these labels no more; Ray shows its last value for a while yet."""
        with self._lock:
            self._last.pop((spec, tuple(sorted(labels.items()))), None)

    def _set(self, spec: MetricSpec, value: float, labels: Mapping[str, str]) -> None:
        with self._lock:
            self._last[spec, tuple(sorted(labels.items()))] = value
            self._gauges[spec].set(value, dict(labels))
            if self._thread is None:
                self._thread = threading.Thread(target=self._set_again, name="ray-gauges", daemon=True)
                self._thread.start()

    def _set_again(self) -> None:
        while True:
            time.sleep(AGAIN_S)
            with self._lock:
                for (spec, labels), value in self._last.items():
                    self._gauges[spec].set(value, dict(labels))


class RayAndPrometheusBackend:
    """Metrics for Ray's ports, where clusters scrape, and for `/metrics` of the ingress, where people look."""

    def __init__(self) -> None:
        self._ray, self._own = RayBackend(), PrometheusBackend(CollectorRegistry())
        self.exposition = self._own.exposition

    def forget(self, spec: MetricSpec, labels: Mapping[str, str]) -> None:
        """Show the value of a gauge with these labels no more, in both."""
        self._ray.forget(spec, labels)
        self._own.forget(spec, labels)

    def open(self, spec: MetricSpec) -> Record:
        """Record a value in both."""
        ray_record, own_record = self._ray.open(spec), self._own.open(spec)

        def record(value: float, labels: Mapping[str, str]) -> None:
            ray_record(value, labels)
            own_record(value, labels)

        return record
