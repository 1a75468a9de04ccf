"""What a worker shows of the adapters that it trains; Ray's metrics are stood in for, as they need a Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cat_cluster.cluster.messages import OrderedAdapter
from cat_cluster.cluster.monitor import PackMonitor
from cat_cluster.spec.sections import MonitoringSpec
from cat_cluster.store import LocalStore
from cat_cluster.telemetry import Metrics, PrometheusBackend
from cat_cluster.training.loss_curves import ConceptLoss
from cat_cluster.training.step_report import StepReport
from tests.unit.cluster.test_driver import prepared


@pytest.mark.parametrize("reports", [True, False])
def test_the_losses_of_an_adapter_that_has_left_are_shown_no_more(tmp_path: Path, reports: bool) -> None:
    backend, store = PrometheusBackend(), LocalStore(tmp_path)
    messages: Any = type("Messages", (), {"put": lambda *_: None})()
    names = {f"run-{number:012d}-1/{name}": name for number, name in enumerate(("cup", "mug"))}
    with PackMonitor(messages, Metrics(backend), reports=reports, all_draw=False, upload_every=50) as monitor:
        for name, adapter_id in names.items():
            one = prepared(adapter_id)
            one.concepts = ()
            ordered = OrderedAdapter(name, one.resolved, one.revision, name.partition("/")[0], 1, MonitoringSpec())
            monitor.admit(ordered, one, store)
        losses = {name: {"sks": ConceptLoss(0.5, 0.25)} for name in names}
        report = StepReport(dict.fromkeys(names, 3), dict.fromkeys(names, 9), 0.5, 2, losses, {})
        monitor.step(report, dict.fromkeys(names, 1))
        monitor.dismiss(next(iter(names)))
        shown = backend.exposition().decode()
        for loss in ("identity", "cat"):
            assert f'cat_training_{loss}_loss{{adapter="cup"' not in shown
            assert (f'cat_training_{loss}_loss{{adapter="mug",token="sks"}}' in shown) == reports
