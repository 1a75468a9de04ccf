"""A job that failed for good and is started again by KubeRay on a new cluster ends there at once, and not for ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cat_cluster.runs.entering import image_digests_of
from cat_cluster.runs.progress import RunProgress
from cat_cluster.runs.progress_writer import ProgressWriter
from cat_cluster.runs.run import Expectation, Run, run_id_of
from cat_cluster.runs.tries import end_untried
from cat_cluster.spec.job import JobSpec, load_spec
from cat_cluster.store import open_store
from jobs import train
from tests.support.tiny_jobs import adapter, write_photos, write_spec

RETRIES = 2


@pytest.fixture
def job(tmp_path: Path) -> JobSpec:
    photos = write_photos(tmp_path / "photos")
    return load_spec(write_spec(tmp_path / "spec.yaml", tmp_path / "no-base", [adapter("cup", photos)]))


@pytest.fixture
def run(tmp_path: Path, job: JobSpec) -> Run:
    return Run(open_store((tmp_path / "store").as_uri()), run_id_of(job, image_digests_of(job)))


def started_as(monkeypatch: pytest.MonkeyPatch, submission: str) -> None:
    metadata = {"metadata": {"job_submission_id": submission}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(metadata))


def fail(run: Run, job: JobSpec, submission: str | None, *, permanent: bool = True) -> None:
    """What the driver of an attempt leaves that trained, and could not."""
    attempt = run.claim(job=submission)
    with ProgressWriter(attempt, RunProgress.begin(run.run_id, job, state="running", attempt=attempt.number)) as writer:
        writer.adapter("cup", state="failed", reason="out of memory: all of it", permanent=permanent)


def test_a_job_that_failed_for_good_is_not_tried_on_the_next_clusters(run: Run, job: JobSpec) -> None:
    fail(run, job, "tea-1a2b3c4d-aaaaa")
    for number in (2, 3):
        ended = end_untried(run, RETRIES, f"tea-1a2b3c4d-bbbb{number}")
        assert ended is not None
        assert ended == run.progress()
        assert (ended.state, ended.attempt, ended.untried) == ("failed", number, number - 1)
        assert ended.adapter("cup").reason == "out of memory: all of it"
        claim = run.claim_of(number)
        assert claim is not None
        assert claim.job == f"tea-1a2b3c4d-bbbb{number}"
    # KubeRay has given up by now: whoever starts the job now has their reasons.
    assert end_untried(run, RETRIES, "tea-1a2b3c4d-ccccc") is None
    assert run.last_attempt() == 3


@pytest.mark.parametrize("how", ["may pass", "another job", "submitted", "no job", "rendered again", "new version"])
def test_whatever_may_go_better_now_is_tried(run: Run, job: JobSpec, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    fail(run, job, None if how == "submitted" else "tea-1a2b3c4d-aaaaa", permanent=how != "may pass")
    job_id = "tea-5e6f7a8b-bbbbb" if how == "another job" else "tea-1a2b3c4d-bbbbb"
    if how == "rendered again":
        run.expect(Expectation(job="RayJob tea", look="kubectl", after=1))
    if how == "new version":
        monkeypatch.setattr("cat_cluster.runs.tries.package_version", lambda: "99.0")
    assert end_untried(run, RETRIES, None if how == "no job" else job_id) is None
    assert run.last_attempt() == 1


def test_an_older_record_or_none_stops_nothing(run: Run, job: JobSpec) -> None:
    assert end_untried(run, RETRIES, "tea-1a2b3c4d-bbbbb") is None
    fail(run, job, "tea-1a2b3c4d-aaaaa")
    record = json.loads(run.store.get(run.progress_key(1)))
    old = {name: value for name, value in record.items() if name not in ("permanent", "untried")}
    run.store.put(run.progress_key(1), json.dumps(old).encode())
    assert end_untried(run, RETRIES, "tea-1a2b3c4d-bbbbb") is None
    run.store.put(run.progress_key(1), b"{")
    assert end_untried(run, RETRIES, "tea-1a2b3c4d-bbbbb") is None


@pytest.mark.parametrize("expected", [True, False])
def test_the_driver_of_such_a_try_ends_before_it_loads_anything(
    tmp_path: Path,
    run: Run,
    job: JobSpec,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    expected: bool,
) -> None:
    fail(run, job, "tea-1a2b3c4d-aaaaa")
    started_as(monkeypatch, "tea-1a2b3c4d-bbbbb")
    monkeypatch.setattr(train, "_train", lambda *_: pytest.fail("it was tried"))
    waits = ["--expected", run.run_id] if expected else []
    arguments = [str(tmp_path / "spec.yaml"), "--storage", run.store.url, *waits]
    assert train.main([*arguments, "--retries", "2"]) == 1
    assert "not tried again, since attempt 1 failed for good: cup: out of memory: all of it" in capsys.readouterr().out
    assert run.progress().untried == 1
    monkeypatch.setattr(train, "_train", lambda *_: 0)
    assert train.main(arguments) == 0  # nobody says that it starts by itself
