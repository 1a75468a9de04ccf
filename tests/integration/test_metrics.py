"""Metrics through a real Ray: what a process records is at its node's metrics port."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cat_cluster.telemetry import IDENTITY_LOSS, TRAINING_METRICS

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 60
RAY_LABELS = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId", "JobId"}


@pytest.fixture
def metrics_url() -> Iterator[str]:
    """The address of the metrics of a Ray node on which every metric was recorded."""
    command = [sys.executable, "-m", "tests.support.record_metrics"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
            process.communicate("", timeout=PATIENCE_SECONDS)
        finally:
            process.kill()
    assert process.returncode == 0


def scrape(url: str) -> dict[tuple[str, ...], float]:
    """Our series by name and our labels' values."""
    with urllib.request.urlopen(url, timeout=5) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    found: dict[tuple[str, ...], float] = {}
    for sample in (one for family in families for one in family.samples if one.name.startswith("ray_cat_")):
        ours = {n: v for n, v in sample.labels.items() if n not in RAY_LABELS and not n.startswith("otel_")}
        found[sample.name, *(ours[name] for name in sorted(ours))] = sample.value
    return found


def test_what_a_process_records_is_at_the_metrics_port_of_its_node(metrics_url: str) -> None:
    losses = f"ray_{IDENTITY_LOSS.name}"
    wanted = {
        ("ray_cat_training_steps_total",): 2.0,
        ("ray_cat_training_dropped_adapters_total",): 3.0,
        ("ray_cat_packs_running",): 2.0,
        ("ray_cat_store_retries_total", "read"): 2.0,
        ("ray_cat_checkpoint_seconds_count",): 1.0,
        ("ray_cat_checkpoint_seconds_bucket", "1.0"): 0.0,
        ("ray_cat_checkpoint_seconds_bucket", "2.5"): 1.0,
        (losses, "mug", "<shs>"): 2.0,
        (losses, "cup-0", "sks"): 0.0,
        (losses, "other", "other"): 7.0,
    }
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not wanted.items() <= (found := scrape(metrics_url)).items():
        assert time.monotonic() < deadline, {series: found.get(series) for series in wanted}
        time.sleep(0.2)
    assert len([name for name, *_ in found if name == losses]) == 5
    shown = {name for name, *_ in found}
    assert {f"ray_{one.name}{'_count' if one.kind == 'histogram' else ''}" for one in TRAINING_METRICS} <= shown
