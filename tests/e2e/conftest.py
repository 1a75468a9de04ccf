"""A real cluster: which one, what its tests found, and what they share.

The files are run in the order of the Makefile: each stands on what those before it made, and the last removes it all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, MutableMapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from jobs.benchmark.record import Start, begin, read_result, write_result
from tests.support.kubernetes import CLIENTS, IMAGE, ROOT, STRANGERS, Json, command, kubectl, objects

Figures = MutableMapping[str, str]
FILES = ("test_install", "test_network", "test_jobs", "test_schedules", "test_service", "test_removal")
_started: dict[str, Start] = {}
_cluster: dict[str, Json] = {}
_parts: list[Json] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker("e2e")
        item.add_marker(pytest.mark.timeout(1200))


@pytest.fixture(scope="session", autouse=True)
def cluster() -> str:
    """The context of the cluster that may be used up; refuses any other than E2E_CONTEXT names."""
    done = command("kubectl", "config", "current-context")
    current = done.stdout.strip()
    if done.returncode != 0 or not current:
        pytest.skip("no cluster: kubectl has no current context")
    if os.environ.get("E2E_CONTEXT") != current:
        pytest.exit(
            f"these tests fill, break and empty a cluster: where {current} may be used for that, E2E_CONTEXT={current}",
            returncode=2,
        )
    if "E2E_RECORD" in os.environ:
        _started["now"] = begin()
    return current


@pytest.fixture(scope="session", autouse=True)
def clients(cluster: str) -> None:
    """A namespace whose pods may draw, and one whose pods may not."""
    for name, labels in ((CLIENTS, {"cat-cluster/serving-client": "true"}), (STRANGERS, {})):
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
        kubectl("apply", "-f", "-", stdin=json.dumps(namespace))


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Figures:
    """What a test measured, a few words each, for the table of docs/operations.md."""
    found: Figures = {}
    request.node.user_properties.append(("figures", found))
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report: pytest.TestReport = yield
    if "now" in _started and ("now" not in _cluster or not _cluster["now"]["image"]):
        _cluster["now"] = _versions()  # while there is something in it
    if report.when == "call" or (report.when == "setup" and not report.passed):
        found = dict(item.user_properties).get("figures", {})
        function = getattr(item, "function", None)
        part = " ".join((getattr(function, "__doc__", None) or item.name).split()).rstrip(".")
        case = item.name.partition("[")[2].rstrip("]")
        _parts.append(
            {
                "part": f"{part}: {case}" if case else part,
                "test": item.nodeid,
                "outcome": report.outcome,
                "seconds": round(report.duration, 1),
                "figures": [f"{name}: {text}" if name else text for name, text in found.items()],
                **({} if "now" not in _started else asdict(_started["now"])),
            }
        )
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the result file; parts that were not run this time stay in it, with the commit at which they were."""
    if "now" not in _started:
        return
    kept = {part["test"]: part for part in (read_result("kubernetes") or {"parts": []})["parts"]}
    parts = kept | {part["test"]: part for part in _parts}
    there = {test: place for test in parts if (place := _place(test)) is not None}
    result = {"cluster": _cluster["now"], "parts": [parts[test] for test in sorted(there, key=there.__getitem__)]}
    print(f"\nwrote {write_result('kubernetes', result, _started['now'])}")


def _place(test: str) -> tuple[int, int] | None:
    """Return where a test is among all of them; None for one that is no more."""
    file, _, name = test.partition("::")
    text = (ROOT / file).read_text(encoding="utf-8") if (ROOT / file).is_file() else ""
    place = text.find(f"def {name.partition('[')[0]}(")
    return None if place < 0 else (FILES.index(Path(file).stem), place)


def _versions() -> Json:
    server = json.loads(command("kubectl", "version", "-o", "json").stdout).get("serverVersion", {})
    words = ("get", "deployments", "-A", "-o", "jsonpath={.items[*].spec.template.spec.containers[*].image}")
    operators = [image for image in command("kubectl", *words).stdout.split() if "kuberay" in image]
    images = {
        status["imageID"].rpartition("@")[2]
        for pod in objects("pods")
        for status in pod["status"].get("containerStatuses", ())
        if status["image"].endswith(IMAGE)
    }
    nodes = json.loads(command("kubectl", "get", "nodes", "-o", "json").stdout)["items"]
    return {
        "kubernetes": server.get("gitVersion", "unknown"),
        "operator": " ".join(operators) or "unknown",
        "nodes": len(nodes),
        "runtime": sorted({node["status"]["nodeInfo"]["containerRuntimeVersion"] for node in nodes}),
        "image": sorted(images),
    }
