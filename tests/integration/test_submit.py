"""Submitting to a real Ray head with token authentication, and what the command line says of runs."""

from __future__ import annotations

import functools
import http.server
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from cat_cluster.cli import jobs as cli_jobs
from cat_cluster.cluster import follow, ray_jobs
from cat_cluster.cluster.ray_jobs import RayCluster, connect, jobs_of_run, last_job_status, open_cluster
from cat_cluster.cluster.submit import Submission, read_runtime_env, stop_run, submit_run
from cat_cluster.data.concepts import image_digests, load_concept
from cat_cluster.errors import CatClusterError, ClusterError, RunError, SpecError, SupersededError
from cat_cluster.runs.progress import RunProgress
from cat_cluster.runs.run import Attempt, FencedStore, Run, run_id_of
from cat_cluster.spec.job import JobSpec, load_spec
from cat_cluster.store import LocalStore, open_store
from jobs import train
from tests.integration.conftest import Published
from tests.support.ray_head import RayHead, free_ports, ray_head
from tests.support.tiny_jobs import adapter, open_registry, write_spec

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

END_SECONDS = 240


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head() as running:
        yield running


@pytest.fixture
def cluster(head: RayHead) -> RayCluster:
    return open_cluster(head.address, head.token)


@pytest.fixture
def refused_spec(tmp_path: Path, photos: Path) -> Path:
    """A job whose base model is nowhere: its driver says so in a moment."""
    return write_spec(tmp_path / "refused.yaml", tmp_path / "no-base", [adapter("cup", photos)])


@pytest.fixture
def refused(refused_spec: Path) -> JobSpec:
    return load_spec(refused_spec)


@pytest.fixture
def base(tmp_path: Path, tiny_base_folder: Path) -> Path:
    """A base of the test's own."""
    return shutil.copytree(tiny_base_folder, tmp_path / "base")


@pytest.fixture
def slow(tmp_path: Path, base: Path, photos: Path) -> JobSpec:
    """A job that nothing is wrong with: its driver takes seconds to load what trains."""
    return load_spec(write_spec(tmp_path / "slow.yaml", base, [adapter("cup", photos)]))


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "storage")


def digests_of(job: JobSpec) -> list[list[str]]:
    """The digests of the photos of each adapter."""
    return [image_digests([load_concept(concept) for concept in one.concepts]) for one in job.adapters]


def command(*arguments: str | Path) -> Result:
    """`cat-cluster ...` with these commands alone; an error is raised as it is."""
    app = typer.Typer()
    cli_jobs.mount_jobs(app)
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if isinstance(result.exception, CatClusterError):
        raise result.exception
    return result


def ended(run: Run) -> RunProgress:
    """How a run ended, once it has."""
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline:
        if run.progress().ended:
            return run.progress()
        time.sleep(0.2)
    raise TimeoutError(run.progress())


def job_ended(cluster: RayCluster, run_id: str) -> str:
    """The status of a run's last Ray job, once it has ended."""
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline:
        status = last_job_status(cluster, run_id)
        if status is not None and status not in ray_jobs.LIVE:
            return status
        time.sleep(0.2)
    raise TimeoutError(run_id)


def test_access_is_refused_with_the_remedy(head: RayHead, refused: JobSpec, store: LocalStore) -> None:
    with pytest.raises(ClusterError, match=r"refuses the token \(status 403\).*--token.*RAY_AUTH_TOKEN_PATH"):
        submit_run(refused, store, open_cluster(head.address, "wrong"))
    with pytest.raises(ClusterError, match=r"asks for a token, and none was given \(status 401\)"):
        submit_run(refused, store, RayCluster(head.address))
    assert store.list("") == []


def test_an_address_where_no_ray_answers(refused: JobSpec, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    (closed,) = free_ports(1)
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at http://127.0.0.1:{closed}.*check the address"):
        submit_run(refused, store, open_cluster(f"127.0.0.1:{closed}"))
    monkeypatch.setattr(ray_jobs, "CONNECT_SECONDS", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(ClusterError, match=r"no Ray cluster answers.*timed out"):
            connect(open_cluster(f"127.0.0.1:{silent.getsockname()[1]}"))
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(ClusterError, match="not as a Ray dashboard"):
            connect(open_cluster(f"http://127.0.0.1:{other.server_port}/"))
        other.shutdown()
    for address in ("ray://127.0.0.1:10001", "http://", "127.0.0.1:port"):
        with pytest.raises(ClusterError, match=r"--address.*8265"):
            open_cluster(address)
    assert store.list("") == []


def test_a_given_address_beats_the_one_in_the_environment(cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    (closed,) = free_ports(1)
    monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{closed}")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{closed}")
    assert connect(cluster).list_jobs() is not None
    assert os.environ["RAY_ADDRESS"].endswith(str(closed))


def test_the_token_comes_from_where_ray_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert open_cluster("127.0.0.1:1").token is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("home\n")
    assert open_cluster("127.0.0.1:1").token == "home"
    assert open_cluster("https://ray.example:1").token is None  # this machine's token is no business of others
    (tmp_path / "file").write_text("file\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "file"))
    assert open_cluster("https://ray.example:1").token == "file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "variable")
    assert open_cluster("127.0.0.1:1").token == "variable"
    assert open_cluster("127.0.0.1:1", "given").token == "given"
    assert "given" not in repr(open_cluster("127.0.0.1:1", "given"))
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    with pytest.raises(ClusterError, match=r"token file .*absent cannot be read"):
        open_cluster("127.0.0.1:1")


def test_a_folder_is_no_storage_for_a_remote_cluster(refused: JobSpec, store: LocalStore, photos: Path) -> None:
    remote = open_cluster("http://ray.example:8265", "token")
    with pytest.raises(SpecError, match=r"^storage: file://.*ray\.example.*--storage s3://bucket/prefix"):
        submit_run(refused, store, remote)
    assert store.list("") == []
    for address in ("127.0.0.2:1", "localhost:1", "[::1]:1"):
        assert open_cluster(address).is_loopback
    assert not remote.is_loopback


def test_a_refused_job_fails_where_everybody_can_see_it_and_may_be_submitted_again(
    refused_spec: Path, store: LocalStore, cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token or "")
    to = ("--storage", store.url, "--address", cluster.address)
    first = command("submit", refused_spec, *to, "--json")
    assert first.exit_code == 0, first.output
    submission = json.loads(first.stdout)
    run = Run(store, submission["run_id"])
    assert submission["job"] == f"{run.run_id}-1"
    assert f"jobs status {run.run_id} --wait" not in first.stdout
    assert run.read_spec().storage == store.url
    progress = ended(run)
    assert progress.state == "failed"
    assert progress.reason
    assert job_ended(cluster, run.run_id) == "FAILED"

    logs = command("jobs", "logs", run.run_id, "--address", cluster.address)
    assert "python -m jobs.train" in logs.stdout
    assert "tiny: adapters cup; storage" in logs.stdout

    waited = command("submit", refused_spec, *to, "--wait", "--json")
    assert waited.exit_code == 1
    record = json.loads(waited.stdout)
    assert (record["state"], record["alive"]) == ("failed", False)
    assert [one["id"] for one in record["adapters"]] == ["cup"]
    assert [job.submission_id for job in jobs_of_run(connect(cluster), cluster, run.run_id)] == [
        f"{run.run_id}-2",
        f"{run.run_id}-1",
    ]
    listed = json.loads(command("jobs", "list", "--storage", store.url, "--json").stdout)
    assert [one["run_id"] for one in listed["runs"]] == [run.run_id]
    status = command("jobs", "status", run.run_id, "--storage", store.url)
    assert "failed, attempt" in status.stdout
    with pytest.raises(RunError, match="already failed: there is nothing to stop"):
        command("jobs", "stop", run.run_id, "--storage", store.url)


def test_of_clients_that_submit_at_once_one_starts_the_run(
    slow: JobSpec, store: LocalStore, cluster: RayCluster
) -> None:
    def submit(_: int) -> Submission | str:
        try:
            return submit_run(slow, store, cluster)
        except RunError as error:
            return str(error)

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(submit, range(4)))
    started = [answer for answer in answers if isinstance(answer, Submission)]
    assert len(started) == 1, answers
    run = Run(store, started[0].run_id)
    assert all("already submitted" in answer and "--wait" in answer for answer in answers if isinstance(answer, str))
    assert len(jobs_of_run(connect(cluster), cluster, run.run_id)) == 1
    stop_run(run, cluster)


def test_a_run_with_a_driver_is_left_alone_unless_forced(
    refused: JobSpec, store: LocalStore, cluster: RayCluster
) -> None:
    digests = digests_of(refused)
    run = Run(store, run_id_of(refused, digests))
    attempt = run.claim()
    run.write_progress(RunProgress.begin(run.run_id, refused, state="running", attempt=attempt.number))
    with pytest.raises(RunError, match=r"is running: attempt 1 on .* s ago.*take it over with --force"):
        submit_run(refused, store, cluster)
    assert last_job_status(cluster, run.run_id) is None
    submission = submit_run(refused, store, cluster, force=True)
    assert submission.job == f"{run.run_id}-2"
    assert ended(run).state == "failed"


def test_a_finished_run_is_not_submitted_unless_an_adapter_has_gone(published: Published) -> None:
    job, store = load_spec(published.spec), LocalStore(published.storage)
    digests = digests_of(job)
    run = Run(store, run_id_of(job, digests))
    (manifest,) = open_registry(published.storage).revisions("cup")
    begun = RunProgress.begin(run.run_id, job, state="done", attempt=1)
    run.write_progress(begun.with_adapter("cup", state="published", revision=manifest.revision))
    (closed,) = free_ports(1)
    nowhere = f"http://127.0.0.1:{closed}"
    again = command("submit", published.spec, "--storage", store.url, "--address", nowhere, "--wait", "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout)["state"] == "done"
    assert submit_run(job, store, open_cluster(nowhere)) == Submission(run.run_id, "already done", None, store.url)
    before = run.progress()
    with pytest.raises(ClusterError, match="no Ray cluster answers"):
        submit_run(job, store, open_cluster(nowhere), force=True)
    assert run.progress() == before
    open_registry(published.storage).remove_alias("cup", "latest")
    open_registry(published.storage).delete("cup", manifest.revision)
    with pytest.raises(ClusterError, match="no Ray cluster answers"):
        submit_run(job, store, open_cluster(nowhere))


def test_only_named_variables_go_to_the_job(
    refused: JobSpec, store: LocalStore, cluster: RayCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-copied")
    monkeypatch.setenv("CAT_PASSED", "passed")
    file = tmp_path / "env.yaml"
    file.write_text("env_vars: {FROM_FILE: one, CAT_PASSED: replaced}\n")
    environment = read_runtime_env(file, ["GIVEN=a=b"], ["CAT_PASSED"])
    assert environment == {"env_vars": {"FROM_FILE": "one", "CAT_PASSED": "passed", "GIVEN": "a=b"}}
    assert read_runtime_env() == {}
    assert read_runtime_env(image="registry.example/cat:1") == {"image_uri": "registry.example/cat:1"}
    with pytest.raises(SpecError, match="--runtime-env, --env or --image: Ray refuses them"):
        submit_run(refused, store, cluster, runtime_env={"env_vars": {"A": 1}})
    assert [key for key in store.list("runs/") if "/progress" in key] == []
    submission = submit_run(refused, store, cluster, runtime_env=environment)
    (job,) = jobs_of_run(connect(cluster), cluster, submission.run_id)
    assert "not-to-be-copied" not in json.dumps(job.runtime_env)
    assert {**(job.runtime_env or {})["env_vars"]}.items() >= environment["env_vars"].items()
    assert (job.metadata or {})["run_id"] == submission.run_id


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env": ["NAME"]}, "--env NAME: write it as NAME=VALUE"),
        ({"pass_env": ["CAT_ABSENT"]}, "--pass-env CAT_ABSENT: this shell has no such variable"),
        ({"file": Path("absent.yaml")}, "--runtime-env absent.yaml: cannot be read"),
        ({"file": Path(__file__)}, "--runtime-env .*: (cannot be read|must hold)"),
    ],
)
def test_bad_environments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read_runtime_env(**options)  # type: ignore[arg-type]


def test_stopping_a_submitted_run_and_submitting_it_again(
    slow: JobSpec, base: Path, store: LocalStore, cluster: RayCluster
) -> None:
    submission = submit_run(slow, store, cluster)
    run = Run(store, submission.run_id)
    assert stop_run(run, cluster) == (1, [submission.job])
    assert job_ended(cluster, run.run_id) in ("STOPPED", "FAILED")
    assert run.progress().state == "stopped"
    shutil.rmtree(base)  # so that it soon ends
    again = submit_run(slow, store, cluster)
    assert again.job == f"{run.run_id}-2"
    assert not run.store.exists(run.key("stop.json"))  # the new attempt is not stopped by the old request
    assert ended(run).state == "failed"


def test_a_driver_killed_without_a_word_is_noticed(
    slow: JobSpec, store: LocalStore, cluster: RayCluster, head: RayHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "ASK_SECONDS", 0.5)
    submission = submit_run(slow, store, cluster)
    deadline = time.monotonic() + 30
    while not (drivers := head.drivers(submission.run_id)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for driver in drivers:
        driver.send_signal(signal.SIGKILL)
    run = Run(store, submission.run_id)
    with pytest.raises(RunError, match=rf"has ended \(FAILED\) without a word.*jobs logs {run.run_id} --address"):
        follow.follow_run(run, NoWatcher(), follow.RayCarrier(run, cluster))


def test_a_cluster_that_is_gone_leaves_the_state_in_the_storage(refused: JobSpec, store: LocalStore) -> None:
    run = Run(store, "run-0123456789ab")
    run.write_progress(RunProgress.begin(run.run_id, refused, state="running", attempt=1))
    (closed,) = free_ports(1)
    with pytest.raises(ClusterError, match=r"(?s)no Ray cluster answers.*in the storage.*jobs status run-0123456789ab"):
        command("jobs", "logs", run.run_id, "--address", f"127.0.0.1:{closed}")
    with pytest.raises(ClusterError, match="no Ray cluster answers"):
        command("jobs", "stop", run.run_id, "--storage", store.url, "--address", f"127.0.0.1:{closed}")
    assert store.exists(run.key("stop.json"))  # a driver that lives sees the request all the same
    stopped = command("jobs", "stop", run.run_id, "--storage", store.url, "--json")
    assert json.loads(stopped.stdout) == {"run_id": run.run_id, "attempt": 1, "jobs": []}


def test_following_ends_with_the_run_and_ctrl_c_only_detaches(refused: JobSpec, store: LocalStore) -> None:
    run = Run(store, "run-0123456789ab")
    running = RunProgress.begin(run.run_id, refused, state="running", attempt=1)
    run.write_progress(running)
    code = "import typer; from cat_cluster.cli.jobs import mount_jobs; app = typer.Typer(); mount_jobs(app); app()"
    arguments = [sys.executable, "-c", code, "jobs", "status", run.run_id, "--wait", "--storage", store.url]

    def start() -> subprocess.Popen[str]:
        # A shell that puts the tests into the background has them ignore interrupts, and children inherit that.
        heed = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        pipe = subprocess.PIPE
        return subprocess.Popen(arguments, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed)

    detached, follower = start(), start()
    time.sleep(4)
    detached.send_signal(signal.SIGINT)
    out, err = detached.communicate(timeout=30)
    assert detached.returncode == 130, err
    assert out == ""
    assert "detached; the run continues" in err
    assert f"cat-cluster jobs status {run.run_id} --wait --storage {store.url}" in err
    assert run.progress() == running
    run.write_progress(running.changed(state="done").with_adapter("cup", state="published", revision="r-0123456789ab"))
    out, err = follower.communicate(timeout=30)
    assert follower.returncode == 0, err
    assert "published cup r-0123456789ab" in err


def test_photos_go_to_the_bucket_and_the_driver_finds_them_there(
    refused: JobSpec, s3_bucket: str, cluster: RayCluster
) -> None:
    storage = open_store(f"{s3_bucket}/prod")
    names = [name for name in os.environ if name.startswith("AWS_")]
    submission = submit_run(refused, storage, cluster, runtime_env=read_runtime_env(pass_env=names))
    run = Run(storage, submission.run_id)
    (key,) = storage.list("inputs/")
    assert run.read_spec().adapters[0].concepts[0].images == f"{storage.url}/{key}"
    assert run_id_of(run.read_spec(), digests_of(run.read_spec())) == submission.run_id
    assert (ended(run).state, storage.list("inputs/")) == ("failed", [key])
    reason = run.progress().reason or ""
    assert "no-base" in reason, reason  # it got past storage, spec and photos


def test_a_job_is_trained_and_published(
    tmp_path: Path, tiny_base_folder: Path, photos: Path, store: LocalStore, cluster: RayCluster
) -> None:
    spec = write_spec(tmp_path / "spec.yaml", tiny_base_folder, [adapter("cup", photos)])
    to = ("--storage", store.url, "--address", cluster.address, "--token", cluster.token or "")
    finished = command("submit", spec, *to, "--wait", "--json")
    assert finished.exit_code == 0, finished.output
    record = json.loads(finished.stdout)
    (cup,) = record["adapters"]
    assert (record["state"], record["attempt"], cup["state"], cup["step"]) == ("done", 1, "published", 3)
    assert open_registry(tmp_path / "storage").resolve("cup").revision == cup["revision"]
    claim = Run(store, record["run_id"]).claim_of(1)
    assert claim is not None
    assert claim.job == f"{record['run_id']}-1"
    again = command("submit", spec, *to, "--json")
    assert json.loads(again.stdout)["outcome"] == "already done"


def test_each_attempt_has_one_driver_in_a_bucket_too(s3_bucket: str) -> None:
    barrier = threading.Barrier(4)

    def claim(_: int) -> list[Attempt]:
        run = Run(open_store(f"{s3_bucket}/race"), "run-0123456789ab")
        barrier.wait()
        return [run.claim() for _ in range(3)]

    with ThreadPoolExecutor(4) as threads:
        attempts = [attempt for claimed in threads.map(claim, range(4)) for attempt in claimed]
    assert sorted(attempt.number for attempt in attempts) == list(range(1, 13))
    for attempt in attempts:
        store = pickle.loads(pickle.dumps(FencedStore(attempt)))
        if attempt.number == 12:
            store.put("checkpoint", b"1")
        else:
            with pytest.raises(SupersededError):
                store.put("checkpoint", b"1")


def test_the_entry_point_names_what_is_wrong(
    refused_spec: Path, store: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert train.main([str(refused_spec), "--storage", store.url]) == 1
        assert "no-base" in capsys.readouterr().out
        assert train.main(["--run", "run-0123456789ab", "--storage", store.url]) == 1
        assert "a folder of another machine is another folder" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            train.main([])
    finally:
        signal.signal(signal.SIGTERM, handler)


@pytest.mark.chaos
def test_a_run_that_is_stopped_and_then_taken_over_ends_once(
    tmp_path: Path, photos: Path, store: LocalStore, cluster: RayCluster
) -> None:
    training = {"steps": 120, "rank": 4}
    spec = write_spec(
        tmp_path / "spec.yaml", "pocket", [adapter("cup", photos)], training=training, cluster={"checkpoint_every": 10}
    )
    job = load_spec(spec)
    first = submit_run(job, store, cluster)
    run = Run(store, first.run_id)
    stopped_at = trained(run, 1, 25)
    assert stop_run(run, cluster) == (1, [first.job])
    assert ended(run).state == "stopped"
    assert job_ended(cluster, run.run_id) == "STOPPED"

    second = submit_run(job, store, cluster)
    trained(run, 2, stopped_at - 10)  # it goes on from the last checkpoint
    third = submit_run(job, store, cluster, force=True)
    final = ended(run)
    assert (final.state, final.attempt, final.adapter("cup").step) == ("done", 3, 120)
    assert [run.claim_of(number).job for number in (1, 2, 3)] == [first.job, second.job, third.job]  # type: ignore[union-attr]
    assert connect(cluster).get_job_status(second.job or "") == "FAILED"
    (manifest,) = open_registry(tmp_path / "storage").revisions("cup")
    assert manifest.revision == final.adapter("cup").revision
    assert store.list("checkpoints/") == []


def trained(run: Run, attempt: int, step: int) -> int:
    """The step at which an attempt is, once it is past `step`."""
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline:
        progress = run.progress()
        if progress.attempt == attempt and progress.state == "running" and progress.adapter("cup").step > step:
            return progress.adapter("cup").step
        time.sleep(0.1)
    raise TimeoutError(run.progress())


class NoWatcher:
    """Looks at nothing."""

    def show(self, progress: RunProgress) -> None:
        pass

    def message(self, text: str) -> None:
        pass
