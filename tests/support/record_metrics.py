"""A process with a Ray of its own that records every metric, prints its node's metrics address and forgets adapters.

Each line of stdin is the id of an adapter that it shows no more. In a process of its own because Ray reads how it
authenticates once, when it is first imported.
"""

from __future__ import annotations

import os
import sys

os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = "a-token-of-the-tests-that-guards-nothing"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray

from cat_cluster.telemetry import (
    DROPPED_ADAPTERS,
    IDENTITY_LOSS,
    LABELS,
    TRAINING_METRICS,
    Metrics,
)
from cat_cluster.telemetry.ray_backend import RayBackend

MOST_SERIES = 4


def main() -> None:
    """Record 2 of each metric, then more series of one than may be."""
    ray.init(
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        _system_config={"metrics_report_interval_ms": 500},
    )
    metrics = Metrics(RayBackend(), most_series=MOST_SERIES)
    record = {"gauge": metrics.set, "counter": metrics.inc, "histogram": metrics.observe}
    names = {"adapter": "mug", "token": "<shs>"} | {n: one.values[0] for n, one in LABELS.items() if one.values}
    for spec in TRAINING_METRICS:
        record[spec.kind](spec, 2.0, **{name: names[name] for name in spec.labels})
    metrics.inc(DROPPED_ADAPTERS, 0.0)  # Ray refuses zero; a counter must not
    metrics.inc(DROPPED_ADAPTERS, 1.0)
    for n in range(8):
        metrics.set(IDENTITY_LOSS, n, adapter=f"cup-{n}", token="sks")
    (node,) = ray.nodes()
    print(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", flush=True)
    for line in sys.stdin:
        metrics.forget(adapter=line.strip())
    ray.shutdown()


if __name__ == "__main__":
    main()
