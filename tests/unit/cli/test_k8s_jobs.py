"""`k8s submit|logs|stop` as a person calls them: what they print, where, and how they end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cat_cluster import store as stores
from cat_cluster.cli.k8s import k8s_app
from cat_cluster.cluster import follow
from cat_cluster.cluster.kuberay import submit
from cat_cluster.errors import RunError, SpecError
from cat_cluster.runs.progress import RunProgress
from cat_cluster.runs.run import Run
from cat_cluster.spec.job import load_spec
from cat_cluster.store import LocalStore
from tests.support.api_server import ApiServer, api_server, made
from tests.support.tiny_jobs import adapter, write_photos, write_spec

URL = "s3://cat-storage/prod"


class Bucket(LocalStore):
    """A folder that calls itself a bucket."""

    @property
    def url(self) -> str:
        """The address of the bucket."""
        return URL


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(follow, "ASK_SECONDS", 0)
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(submit, "STOP_SECONDS", 0.05)
    monkeypatch.delenv("CAT_STORAGE", raising=False)
    found = Bucket(tmp_path / "bucket")
    monkeypatch.setattr(stores, "open_store", lambda url: found if url == URL else LocalStore(url))
    return found


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    with api_server() as server:
        settings = made("ConfigMap", "cat-cluster-settings", data={"CAT_STORAGE": URL})
        server.put(made("Namespace", "cat-cluster"), settings)
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path)))
        yield server


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    return write_spec(tmp_path / "spec.yaml", "pocket", [adapter("cup", write_photos(tmp_path / "photos"))])


def call(*words: object) -> Any:
    return CliRunner().invoke(k8s_app, [str(word) for word in words])


def submitted(spec: Path, *options: str) -> dict[str, Any]:
    finished = call("submit", spec, "--no-wait", "--json", *options)
    assert finished.exit_code == 0, finished.exception
    record: dict[str, Any] = json.loads(finished.stdout)
    return record


def write_state(bucket: Bucket, run_id: str, spec: Path, state: Any, **changes: Any) -> None:
    run = Run(bucket, run_id)
    run.claim()
    run.write_progress(RunProgress.begin(run_id, load_spec(spec), state=state, attempt=1).changed(**changes))


def test_submitting_says_what_was_made_and_where(spec: Path, server: ApiServer, bucket: Bucket) -> None:
    finished = call("submit", spec, "--no-wait", "--json")
    record = json.loads(finished.stdout)
    assert record == {
        "run_id": record["run_id"],
        "outcome": "submitted",
        "job": record["job"],
        "storage": URL,
    }
    assert ("rayjobs", "cat-cluster", record["job"]) in server.objects
    assert f"storage {URL}, as ConfigMap cat-cluster-settings says" in finished.stderr
    assert f"submitted {record['run_id']} as RayJob {record['job']}" in finished.stderr
    assert submitted(spec)["outcome"] == "already running"


@pytest.mark.parametrize("around", ["photos", "photos/10_sks cup"])
def test_what_a_folders_name_says_is_told_before_it_is_uploaded(
    tmp_path: Path, server: ApiServer, bucket: Bucket, around: str
) -> None:
    write_photos(tmp_path / "photos" / "10_sks cup")
    spec = write_spec(tmp_path / "spec.yaml", "pocket", [adapter("cup", tmp_path / around)])
    told = "warning: adapter cup, token sks: images: the 10 of '10_sks cup'"
    submitted = call("submit", spec, "--no-wait")
    assert submitted.exit_code == 0, submitted.exception
    assert told in submitted.stderr
    rendered = call("render", spec, "--upload", "--storage", URL)
    assert rendered.exit_code == 0, rendered.exception
    assert told in rendered.stderr


def test_a_run_is_followed_to_its_end(spec: Path, server: ApiServer, bucket: Bucket) -> None:
    record = submitted(spec)
    write_state(bucket, record["run_id"], spec, "failed", reason="no memory", permanent=True)
    finished = call("submit", spec, "--json")
    assert finished.exit_code == 1
    assert json.loads(finished.stdout)["state"] == "failed"
    assert "already on its way as RayJob" in finished.stderr
    assert "failed, attempt 1: no memory" in finished.stderr


def test_a_run_that_is_done_ends_well(
    spec: Path, server: ApiServer, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = submitted(spec)
    write_state(bucket, record["run_id"], spec, "done")
    monkeypatch.setattr(submit, "is_done", lambda progress, store: True)
    finished = call("submit", spec)
    assert finished.exit_code == 0
    assert "is already done; --force runs it again" in finished.stderr


def test_a_suspended_job_is_not_waited_for(spec: Path, server: ApiServer, bucket: Bucket) -> None:
    finished = call("submit", spec, "--suspend", "--json")
    assert json.loads(finished.stdout)["outcome"] == "submitted"


def test_an_interrupt_detaches(spec: Path, server: ApiServer, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    job = submitted(spec)["job"]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(follow, "follow_run", interrupt)
    finished = call("submit", spec)
    assert finished.exit_code == 130
    assert f"stop it    cat-cluster k8s stop {job} --namespace cat-cluster --context test" in finished.stderr
    assert ("rayjobs", "cat-cluster", job) in server.objects


def test_a_folder_is_refused_where_it_was_given(spec: Path, server: ApiServer, bucket: Bucket) -> None:
    finished = call("submit", spec, "--storage", spec.parent / "new")
    assert isinstance(finished.exception, SpecError)
    assert "is a folder of this machine, and a cluster in Kubernetes cannot see it" in str(finished.exception)


def test_logs_are_those_of_a_run_or_a_job(spec: Path, server: ApiServer, bucket: Bucket) -> None:
    record = submitted(spec)
    nothing = call("logs", record["run_id"])
    assert isinstance(nothing.exception, RunError)
    labels = {"batch.kubernetes.io/job-name": record["job"]}
    submitter = made("Pod", "s", labels=labels, spec={"containers": [{"name": "ray-job-submitter"}]})
    server.put(submitter)
    server.logs["s"] = "step 1/40\n"
    for target in (record["run_id"], record["job"]):
        assert call("logs", target).stdout == "step 1/40\n"


def test_a_job_is_stopped_though_its_storage_is_away(spec: Path, server: ApiServer, bucket: Bucket) -> None:
    job = submitted(spec)["job"]
    settings = server.objects["configmaps", "cat-cluster", "cat-cluster-settings"]
    settings["data"]["AWS_ENDPOINT_URL"] = "http://s3:8333"  # no such Service
    finished = call("stop", job)
    assert finished.exit_code == 0, finished.exception
    assert (
        f"has no such one: correct AWS_ENDPOINT_URL there, or set it in this shell; RayJob {job} is" in finished.stderr
    )
    assert ("rayjobs", "cat-cluster", job) not in server.objects


def test_stopping_takes_the_storage_from_the_job(spec: Path, server: ApiServer, bucket: Bucket) -> None:
    record = submitted(spec)
    write_state(bucket, record["run_id"], spec, "running")
    finished = call("stop", record["run_id"])
    assert finished.exit_code == 0, finished.exception
    assert f"asked attempt 1 of {record['run_id']} to stop" in finished.stderr
    assert f"stopped RayJob {record['job']}" in finished.stderr
    assert ("rayjobs", "cat-cluster", record["job"]) not in server.objects
    assert Run(bucket, record["run_id"]).progress().state == "stopped"
    assert submitted(spec)["outcome"] == "submitted"
