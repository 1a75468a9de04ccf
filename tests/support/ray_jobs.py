"""Several commands in one process, which starts Ray once: `python -m tests.support.ray_jobs PLAN RESULTS`.

PLAN is a JSON list of commands, RESULTS what became of each by name. In a process of its own because Ray reads how it
authenticates when it is imported, and once for all commands because starting Ray costs more than most of them.
"""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("RAY_AUTH_TOKEN", "a-token-of-the-tests-that-guards-nothing")

import ray

from cat_cluster.cli.app import main
from cat_cluster.cluster import driver, engine_room
from cat_cluster.cluster.messages import Messages, Order
from cat_cluster.cluster.trainer import PackSpec
from cat_cluster.errors import StoreError
from cat_cluster.registry import Registry

CPUS = 2
METRICS_SECONDS = 20.0


def start_ray() -> None:
    """Start the Ray that all commands after this use, with metrics reported often."""
    ray.init(
        num_cpus=CPUS,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        logging_level="ERROR",
        _system_config={"metrics_report_interval_ms": 2000, "idle_worker_killing_time_threshold_ms": 600000},
    )


def run(arguments: list[str]) -> dict[str, Any]:
    """Run `cat-cluster` in this process: its exit code, its output, and which packs went to workers."""
    packs: list[dict[str, Any]] = []
    trained: dict[int, list[str]] = {}
    start_pack, give = engine_room.start_pack, Messages.give

    def noted(pack: PackSpec) -> Any:
        packs.append({"ids": trained[pack.number], "workers": pack.workers})
        return start_pack(pack)

    def given(self: Messages, pack: int, order: Order) -> None:
        known = trained.setdefault(pack, [])
        known += [one.resolved.id for one in order.adapters if one.resolved.id not in known]
        give(self, pack, order)

    out, err, started, code = io.StringIO(), io.StringIO(), time.monotonic(), 0
    with (
        patch.object(engine_room, "start_pack", noted),
        patch.object(Messages, "give", given),
        patch.object(sys, "argv", ["cat-cluster", *arguments]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    seconds = time.monotonic() - started
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "packs": packs, "seconds": seconds}


@contextmanager
def damaged_after_check(path: Path) -> Iterator[None]:
    """Let a photo turn bad once the driver has read it and before any worker does."""
    prepare = driver.prepare

    def prepare_then_damage(*given: Any) -> Any:
        prepared = prepare(*given)
        path.write_bytes(b"no image any more")
        return prepared

    with patch.object(driver, "prepare", prepare_then_damage):
        yield


@contextmanager
def store_away() -> Iterator[None]:
    """Let every publication in this process fail, so that only the checkpoints are stored."""
    with patch.object(Registry, "publish", side_effect=StoreError("the store is away")):
        yield


def metrics_text() -> str:
    """The node's metrics as they are."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=5) as answer:
        text: str = answer.read().decode()
    return text


def values(text: str) -> dict[str, float]:
    """The sum of each metric's series."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            series, value = line.rsplit(" ", 1)
            name = series.split("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found


def scrape(wanted: Mapping[str, float]) -> dict[str, float]:
    """The node's metrics, as soon as each wanted one is there with its value or more, or after a while without."""
    deadline = time.monotonic() + METRICS_SECONDS
    while True:
        found = values(metrics_text())
        if all(found.get(name, 0.0) >= least for name, least in wanted.items()) or time.monotonic() > deadline:
            return found
        time.sleep(0.25)


@contextmanager
def names_seen() -> Iterator[set[str]]:
    """The names of all metrics that the node shows meanwhile: Ray drops a gauge 20 s after its process has ended."""
    names: set[str] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(2.0):
            with suppress(OSError):
                names.update(values(metrics_text()))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield names
    finally:
        ended.set()
        thread.join()


def run_plan(plan: list[dict[str, Any]]) -> dict[str, Any]:
    """Run the commands in their order; those before the first one that needs Ray go without."""
    results = {}
    for one in plan:
        if "--in-process" not in one["arguments"] and not ray.is_initialized():
            start_ray()
        with ExitStack() as stack:
            if "damage" in one:
                stack.enter_context(damaged_after_check(Path(one["damage"])))
            if one.get("store_away"):
                stack.enter_context(store_away())
            stack.enter_context(patch.dict(os.environ, one.get("environment", {})))
            seen = stack.enter_context(names_seen()) if "metrics" in one else None
            results[one["name"]] = run(one["arguments"])
        if seen is not None:
            results[one["name"]] |= {"metrics": scrape(one["metrics"]), "seen": sorted(seen)}
    return results


if __name__ == "__main__":
    plan_file, results_file = map(Path, sys.argv[1:])
    try:
        results_file.write_text(json.dumps(run_plan(json.loads(plan_file.read_text()))))
    finally:
        ray.shutdown()
