"""What `k8s status` prints of a namespace and of a job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cat_cluster.cli.k8s_status import age_text
from tests.support.api_server import ApiServer, api_server
from tests.support.recorded_jobs import RECORDED, put_jobs, put_recorded, queued, typed, workload
from tests.support.tiny_jobs import CommandLine

RUN = {"cat-cluster/run": "run-0123456789ab"}


def recent(name: str, **labels: str) -> dict[str, Any]:
    job = json.loads(json.dumps(RECORDED["cpu"]["job"]))
    made = (datetime.now(UTC) - timedelta(minutes=3)).isoformat()
    job["metadata"] |= {"name": name, "labels": labels, "creationTimestamp": made}
    return dict(job)


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with api_server() as server:
        yield server


@pytest.fixture
def command(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path)))

    def call(*words: str, columns: str = "200") -> Any:
        monkeypatch.setenv("COLUMNS", columns)
        return CommandLine(monkeypatch, capsys)("k8s", "status", *words)

    return call


def test_jobs_of_a_namespace_are_a_table(command: Any, server: ApiServer) -> None:
    put_jobs(server, recent("cup", **RUN), queued("tea"))
    server.put(typed("kueue.x-k8s.io/v1beta1", "Workload", workload("tea", 10)))
    lines = command().out.splitlines()
    cup = next(line for line in lines if "cup" in line)
    assert cup.split() == ["cup", "run-0123456789ab", "starting", "0/1", "3m", "-"]
    assert "waiting in queue train, place 1" in next(line for line in lines if " tea " in line)
    done = command("--json")
    assert [one["state"] for one in json.loads(done.out)["jobs"]] == ["starting", "waiting in queue train, place 1"]
    server.forbidden.add("workloads")
    done = command()
    assert "places in queues are not known: a right is missing" in done.err
    assert "waiting in queue train" in done.out


def test_a_job_shows_its_pods_and_what_is_in_its_way(command: Any, server: ApiServer) -> None:
    put_recorded(server, "cpu")
    put_jobs(server, recent("cpu", **RUN))
    for name in ("cpu", "run-0123456789ab"):
        done = command(name)
        assert "cpu: starting, 0/1 pods ready, 3m old" in done.out
        assert "cpu-w4s7z-head-l22zm" in done.out
        assert "- Pod cpu-w4s7z-head-l22zm: no machine takes it, of 1 machine: 1 with too little cpu" in done.out
        assert "cat-cluster jobs status run-0123456789ab --storage s3://..." in done.err
    record = json.loads(command("cpu", "--json").out)
    assert record["state"] == "starting"
    assert [one["phase"] for one in record["pods"]] == ["Pending"]
    assert record["obstacles"][0]["final"] is False


def test_a_narrow_terminal_hides_nothing(command: Any, server: ApiServer) -> None:
    put_recorded(server, "cpu")
    job = recent("a-name-of-forty-seven-characters-as-kuberay-takes", **RUN)
    job["status"]["jobDeploymentStatus"] = "[red]"
    put_jobs(server, job)
    row = next(line for line in command(columns="40").out.splitlines() if "a-name" in line)
    assert row.split() == [job["metadata"]["name"], "run-0123456789ab", "[red]", "0/1", "3m", "-"]
    assert " cpu 100, memory" in command("run-0123456789ab", columns="40").out


def test_an_empty_namespace_and_a_job_that_is_not_there(command: Any) -> None:
    done = command()
    assert (done.code, done.out) == (0, "")
    assert "no RayJobs in namespace cat-cluster" in done.err
    for name in ("tea", "."):
        done = command(name)
        assert done.code == 1
        assert f"no RayJob of {name!r}" in done.err


@pytest.mark.parametrize(("seconds", "text"), [(-1, "0s"), (119, "119s"), (120, "2m"), (7300, "2h"), (400000, "4d")])
def test_ages(seconds: float, text: str) -> None:
    assert age_text(seconds) == text
