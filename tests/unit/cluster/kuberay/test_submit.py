"""A spec on a cluster of Kubernetes: made once per run, found again, stopped, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cat_cluster.cluster.kuberay import submit
from cat_cluster.cluster.kuberay.client.api import Api
from cat_cluster.cluster.kuberay.client.jobs import find_job, run_of, storage_of_run
from cat_cluster.cluster.kuberay.rendering.render import RenderOptions
from cat_cluster.cluster.kuberay.submit import KubernetesSubmission, check_cluster, stop_job, submit_to_kubernetes
from cat_cluster.errors import KubernetesError, RunError, StoreError
from cat_cluster.runs.progress import RunProgress
from cat_cluster.runs.run import Run
from cat_cluster.spec.job import JobSpec
from cat_cluster.store import LocalStore
from tests.support.api_server import ApiServer, made
from tests.support.tiny_jobs import write_photos


class Bucket(LocalStore):
    """A folder that calls itself a bucket."""

    @property
    def url(self) -> str:
        """The address of the bucket."""
        return "s3://bucket/prod"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(submit, "STOP_SECONDS", 0.05)
    monkeypatch.setattr(submit, "GONE_SECONDS", 0.05)
    return Bucket(tmp_path / "bucket")


@pytest.fixture
def job(tmp_path: Path) -> JobSpec:
    photos = str(write_photos(tmp_path / "cups"))
    concept = {"token": "sks", "class_noun": "cup", "images": photos}
    return JobSpec.model_validate({"name": "tea", "adapters": [{"id": "cup", "concepts": [concept]}]})


def submitted(api: Api, job: JobSpec, store: Bucket, *, force: bool = False, **options: Any) -> KubernetesSubmission:
    return submit_to_kubernetes(api, job, store, RenderOptions(**options), force=force)


def record(run: Run, job: JobSpec, state: Any, attempt: int = 1) -> None:
    run.claim()
    run.write_progress(RunProgress.begin(run.run_id, job, state=state, attempt=attempt))


def the_job(api: Api) -> dict[str, Any]:
    (found,) = api.list("ray.io/v1", "RayJob")
    return found


def set_status(server: ApiServer, **status: str) -> None:
    for one in server.objects.values():
        one["status"] = status


def deletions(server: ApiServer) -> int:
    return sum(asked.startswith("DELETE ") for asked in server.asked)


def test_a_spec_becomes_a_job_that_is_found_by_its_run(job: JobSpec, store: Bucket, api: Api) -> None:
    made_now = submitted(api, job, store)
    assert made_now.outcome == "submitted"
    found = find_job(api, made_now.run.run_id)
    assert found["metadata"]["name"] == made_now.job == find_job(api, str(made_now.job))["metadata"]["name"]
    assert (run_of(found), storage_of_run(found)) == (made_now.run.run_id, "s3://bucket/prod")
    expected = made_now.run.expectation()
    assert expected is not None
    assert str(made_now.job) in expected.job
    assert store.list("inputs/")


def test_a_job_that_is_there_is_not_made_again(job: JobSpec, store: Bucket, api: Api, server: ApiServer) -> None:
    first = submitted(api, job, store)
    set_status(server, jobDeploymentStatus="Running")
    again = submitted(api, job, store)
    assert (again.outcome, again.job) == ("already running", first.job)
    assert deletions(server) == 0


def test_a_run_that_is_done_is_said_to_be(
    job: JobSpec, store: Bucket, api: Api, server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = submitted(api, job, store).run
    record(run, job, "done")
    monkeypatch.setattr(submit, "is_done", lambda progress, store: progress.state == "done")
    assert submitted(api, job, store).outcome == "already done"
    assert submitted(api, job, store, force=True).outcome == "submitted"
    assert deletions(server) == 1
    assert (run.progress().state, run.progress().attempt) == ("waiting", 2)  # who follows it does not see the old end
    said: list[str] = []
    stop_job(api, the_job(api), run, said.append)
    assert said == []  # there is no driver to ask
    assert run.progress().state == "stopped"


def test_a_failed_job_is_made_again_when_that_is_asked_for(
    job: JobSpec, store: Bucket, api: Api, server: ApiServer
) -> None:
    first = submitted(api, job, store)
    set_status(server, jobDeploymentStatus="Failed", reason="DeadlineExceeded", message="too\n long")
    with pytest.raises(
        RunError, match=rf"{first.job} has ended as Failed \(DeadlineExceeded: too long\); .*--force makes"
    ):
        submitted(api, job, store)
    assert submitted(api, job, store, force=True).outcome == "submitted"
    assert deletions(server) == 1
    assert "status" not in the_job(api)


def test_a_stopped_job_is_made_again_by_itself(job: JobSpec, store: Bucket, api: Api, server: ApiServer) -> None:
    first = submitted(api, job, store)
    record(first.run, job, "stopped")
    set_status(server, jobDeploymentStatus="Complete", jobStatus="STOPPED")
    assert submitted(api, job, store).outcome == "submitted"
    expected = first.run.expectation()
    assert expected is not None
    assert expected.after == 1


def test_a_suspended_job_is_started_by_submitting_it_again(
    job: JobSpec, store: Bucket, api: Api, server: ApiServer
) -> None:
    submitted(api, job, store, suspend=True)
    set_status(server, jobDeploymentStatus="Suspended")
    assert submitted(api, job, store, suspend=True).outcome == "already running"
    assert submitted(api, job, store).outcome == "submitted"
    assert the_job(api)["spec"]["suspend"] is False


def changed_photos(job: JobSpec, folder: Path) -> JobSpec:
    """The same spec, as it is when its photos at an address have changed."""
    (adapter,) = job.adapters
    (concept,) = adapter.concepts
    photos = str(write_photos(folder, seed=1))
    return job.model_copy(
        update={
            "adapters": (adapter.model_copy(update={"concepts": (concept.model_copy(update={"images": photos}),)}),)
        }
    )


@pytest.mark.parametrize(
    "status",
    [
        {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"},
        {"jobDeploymentStatus": "Failed", "reason": "AppFailed"},
        {"jobDeploymentStatus": "Suspended"},
    ],
)
def test_an_ended_job_of_the_same_name_is_made_again_for_new_photos(
    status: dict[str, str], job: JobSpec, store: Bucket, api: Api, server: ApiServer, tmp_path: Path
) -> None:
    suspended = "Suspended" in status.values()
    first = submitted(api, job, store, name="nightly", suspend=suspended)
    set_status(server, **status)
    second = submitted(api, changed_photos(job, tmp_path / "more"), store, name="nightly")
    assert (second.outcome, second.job) == ("submitted", "nightly")
    assert second.run.run_id != first.run.run_id
    assert run_of(the_job(api)) == second.run.run_id
    assert deletions(server) == 1


def test_a_job_at_work_is_not_mistaken_for_that_of_new_photos(
    job: JobSpec, store: Bucket, api: Api, server: ApiServer, tmp_path: Path
) -> None:
    first = submitted(api, job, store, name="nightly")
    set_status(server, jobDeploymentStatus="Running")
    new = changed_photos(job, tmp_path / "more")
    with pytest.raises(RunError, match=rf"RayJob nightly is at work on {first.run.run_id}, .* submit again when it"):
        submitted(api, new, store, name="nightly")
    assert run_of(the_job(api)) == first.run.run_id
    set_status(server, jobDeploymentStatus="Complete")
    assert submitted(api, new, store, name="nightly").outcome == "submitted"


def test_a_job_in_a_queue_is_left_to_its_queue(job: JobSpec, store: Bucket, api: Api, server: ApiServer) -> None:
    submitted(api, job, store, queue="cats")
    the_one = next(iter(server.objects.values()))
    the_one["spec"]["suspend"] = True
    assert submitted(api, job, store, queue="cats").outcome == "already running"
    assert the_one["spec"]["suspend"] is True


def test_a_run_that_something_else_works_on_is_refused(
    job: JobSpec, store: Bucket, api: Api, server: ApiServer
) -> None:
    first = submitted(api, job, store)
    with pytest.raises(RunError, match=rf"RayJob {first.job} is at work on {first.run.run_id} already: stop it first"):
        submitted(api, job, store, packs=2)
    server.objects.clear()
    record(first.run, job, "running")
    with pytest.raises(RunError, match="is running: attempt 1"):
        submitted(api, job, store)
    assert submitted(api, job, store, force=True).outcome == "submitted"


def test_a_job_that_does_not_go_is_said(job: JobSpec, store: Bucket, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted(api, job, store)
    monkeypatch.setattr(api, "delete", lambda *_: True)
    with pytest.raises(KubernetesError, match="KubeRay's operator has to let it go"):
        submitted(api, job, store, force=True)


def test_stopping_asks_the_run_and_deletes_the_job(job: JobSpec, store: Bucket, api: Api, server: ApiServer) -> None:
    run = submitted(api, job, store).run
    record(run, job, "running")
    said: list[str] = []
    stop_job(api, the_job(api), run, said.append)
    assert said == [f"asked attempt 1 of {run.run_id} to stop"]
    assert server.objects == {}
    assert store.exists(run.key("stop.json"))
    assert run.progress().state == "stopped"  # its driver had no time left to say so
    assert submitted(api, job, store).outcome == "submitted"
    assert not store.exists(run.key("stop.json"))


def test_a_job_that_was_stopped_before_it_started_is_awaited_no_more(
    job: JobSpec, store: Bucket, api: Api, server: ApiServer
) -> None:
    run = submitted(api, job, store).run
    stop_job(api, the_job(api), run, lambda text: None)
    assert run.expectation() is None
    assert server.objects == {}


def test_a_job_is_stopped_also_when_the_store_is_away(
    job: JobSpec, store: Bucket, api: Api, server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = submitted(api, job, store).run

    def away(*_: object) -> None:
        raise StoreError("the store is away")

    monkeypatch.setattr(Run, "last_record", away)
    said: list[str] = []
    stop_job(api, the_job(api), run, said.append)
    assert server.objects == {}
    assert "the store is away; RayJob" in said[0]


def test_an_ended_job_is_not_stopped(api: Api) -> None:
    ended = made("RayJob", "tea", status={"jobDeploymentStatus": "Complete"})
    with pytest.raises(RunError, match="RayJob tea has ended as Complete: there is nothing to stop"):
        stop_job(api, ended, None, print)


def test_what_is_missing_in_a_cluster_is_named_before_anything_is_uploaded(api: Api, server: ApiServer) -> None:
    with pytest.raises(KubernetesError, match="has no namespace cat-cluster: make it and apply an overlay"):
        check_cluster(api)
    server.forbidden.add("namespaces")  # who has rights in a namespace alone may not see it
    check_cluster(api)
    server.forbidden.add("rayjobs")
    with pytest.raises(KubernetesError, match=r"patch, delete of rayjobs\.ray\.io; Role training-jobs"):
        check_cluster(api)


def test_a_cluster_without_kuberay_is_named(api: Api, server: ApiServer) -> None:
    del server.kinds["ray.io/v1"]
    with pytest.raises(KubernetesError, match="no kind RayJob"):
        check_cluster(api)


def test_a_run_of_several_jobs_means_the_one_at_work(api: Api, server: ApiServer) -> None:
    labels = {"cat-cluster/run": "run-0123456789ab"}
    ended = {"jobDeploymentStatus": "Failed"}
    old = made("RayJob", "old", labels=labels, created="2026-01-01T00:00:00Z")
    server.put(old, made("RayJob", "new", labels=labels, created="2026-01-02T00:00:00Z", status=ended))
    assert find_job(api, "run-0123456789ab")["metadata"]["name"] == "old"
    old["status"] = ended
    assert find_job(api, "run-0123456789ab")["metadata"]["name"] == "new"
    with pytest.raises(RunError, match=r"no RayJob of 'run-ffffffffffff': it has new \(run-0123456789ab\), old"):
        find_job(api, "run-ffffffffffff")


@pytest.mark.parametrize(
    "words",
    [
        'strict decoding error: unknown field "spec.rayClusterSpec.authOptions"',
        "failed to create typed patch object: .spec.rayClusterSpec.authOptions: field not declared in schema",
    ],
)
def test_definitions_that_are_too_old_are_told(
    words: str, job: JobSpec, store: Bucket, server: ApiServer, api: Api
) -> None:
    server.refused["PATCH rayjobs"] = (400, words)
    with pytest.raises(KubernetesError, match=r"definitions in the cluster of context test are too old: .*authOptions"):
        submitted(api, job, store)
    server.refused["PATCH rayjobs"] = (400, "something else")
    with pytest.raises(KubernetesError) as other:
        submitted(api, job, store)
    assert "too old" not in str(other.value)
