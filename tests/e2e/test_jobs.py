"""Jobs on the cluster: what is killed while they train, what they cannot get, and a standing cluster that grows."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import Figures
from tests.support.kubernetes import (
    ROOT,
    STANDING_WORKERS,
    STORAGE,
    Json,
    command,
    documented,
    is_ready,
    kubectl,
    name_of,
    objects,
    pods,
    s3_access,
    shell,
    wait_until,
)

PHOTOS = ROOT / "out" / "demo" / "photos" / "striped-cup"


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    """Where a test writes its spec."""
    return tmp_path / "spec.yaml"


def write_spec(
    path: Path, name: str, *, steps: int = 20, rows: int = 1, workers: object = 1, checkpoint_every: int = 100
) -> None:
    one = {"token": "sks", "class_noun": "cup", "images": str(PHOTOS)}
    spec = {
        "name": name,
        "base": "pocket",
        "adapters": [{"id": name, "concepts": [one]}],
        "training": {"steps": steps, "rank": 4, "rows_per_concept": rows, "seed": int(time.time())},  # a new run
        "evaluation": {"prompts": ["{} on a table"], "images_per_prompt": 2},
        "cluster": {"workers": workers, "checkpoint_every": checkpoint_every},
    }
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")


def submit(spec: Path, *options: str, seconds: float = 900) -> subprocess.CompletedProcess[str]:
    return command("cat-cluster", "k8s", "submit", str(spec), "--storage", STORAGE, *options, seconds=seconds)


def job_of(name: str) -> Json:
    found = [job for job in objects("rayjob") if name_of(job).startswith(f"{name}-")]
    assert len(found) == 1, [name_of(job) for job in found]
    return found[0]


@pytest.fixture
def removed() -> Iterator[list[str]]:
    """Names of specs whose RayJobs go when the test ends."""
    names: list[str] = []
    yield names
    for job in objects("rayjob"):
        if any(name_of(job).startswith(f"{name}-") for name in names):
            kubectl("delete", "rayjob", name_of(job), "--wait=false")


def ray_pods(cluster: str, kind: str) -> list[Json]:
    return [pod for pod in pods(f"ray.io/cluster={cluster},ray.io/node-type={kind}") if is_ready(pod)]


def cluster_of(name: str) -> str:
    return str(job_of(name).get("status", {}).get("rayClusterName", ""))


def steps_of(name: str) -> list[int]:
    """The steps in the log of a job's last driver."""
    words = ("cat-cluster", "k8s", "logs", name_of(job_of(name)), "--namespace", "cat-cluster")
    return [int(step) for step in re.findall(r" step (\d+)/", command(*words).stdout)]


def test_what_is_killed_while_it_trains(spec_file: Path, removed: list[str], figures: Figures) -> None:
    """One job that loses its worker, its head and the S3 server, and is done in the end"""
    removed.append("kills")
    write_spec(spec_file, "kills", steps=600, checkpoint_every=20)
    began = submit(spec_file, "--no-wait", "--json")
    assert began.returncode == 0, began.stderr
    first = wait_until("a cluster", lambda: cluster_of("kills"))
    worker = wait_until("a worker", lambda: ray_pods(first, "worker"), 240)[0]
    wait_until("a step", lambda: steps_of("kills"), 300)
    kubectl("delete", "pod", name_of(worker), "--grace-period=0", "--force")
    wait_until(
        "another worker", lambda: ray_pods(first, "worker") and name_of(ray_pods(first, "worker")[0]) != name_of(worker)
    )
    kubectl("delete", "pod", "s3-0", "--grace-period=0", "--force")
    wait_until("an S3 server", lambda: any(map(is_ready, pods("app.kubernetes.io/name=s3"))))
    kubectl("delete", "pod", "-l", f"ray.io/cluster={first},ray.io/node-type=head", "--grace-period=0", "--force")
    done = submit(spec_file, "--json")
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout)
    assert (run["state"], run["attempt"] > 1) == ("done", True)
    went_on = steps_of("kills")[0]
    assert went_on > 1
    figures[""] = f"attempt {run['attempt']} was first heard of in step {went_on}"


def test_too_little_memory(spec_file: Path, removed: list[str], figures: Figures) -> None:
    """A worker with 850 MiB: one sentence that says what it had, what it needs and what to change"""
    removed.append("small")
    write_spec(spec_file, "small")
    done = submit(spec_file, "--worker-memory", "850Mi")
    assert done.returncode == 1
    reasons = [line for line in done.stderr.splitlines() if "memory" in line]
    assert any("--worker-memory" in line for line in reasons), done.stderr
    figures[""] = reasons[-1].strip()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(["--worker-cpu", "70"], "cpu", id="cpu"),
        pytest.param(["--gpu"], "nvidia.com/gpu", id="gpu"),
        pytest.param(["--image", "registry.invalid/none:1"], "image", id="image"),
        pytest.param(["--worker-cpu", "90"], "quota", id="quota"),
    ],
)
def test_why_nothing_moves(options: list[str], words: str, spec_file: Path, removed: list[str]) -> None:
    """`k8s status` says in words what a cluster cannot give"""
    removed.append("waits")
    write_spec(spec_file, "waits")
    began = submit(spec_file, "--no-wait", *options)
    assert began.returncode == 0, began.stderr
    name = name_of(job_of("waits"))

    def obstacles() -> str:
        done = command("cat-cluster", "k8s", "status", name, "--namespace", "cat-cluster", "--json")
        assert done.returncode == 0, done.stderr
        return " ".join(one["text"] for one in json.loads(done.stdout)["obstacles"])

    wait_until(f"words of {words}", lambda: words in obstacles().lower(), 180)
    kubectl("delete", "rayjob", name)


def test_the_standing_cluster_grows(spec_file: Path) -> None:
    """`submit` of a job of one worker to four: `cat-training` grows by a pod of two CPUs for it"""
    write_spec(spec_file, "grows", workers=[1, 4], rows=4, steps=120)  # a worker for each row
    assert len(pods(STANDING_WORKERS)) == 1
    script = documented("**`cat-cluster submit`** goes through")[0].replace("jobs/specs/batch.yaml", str(spec_file))
    forward, rest = script.split("&\n", 1)

    def submitted() -> str:
        with shell(f"{s3_access()}{forward}&\nsleep 5\n{rest}", seconds=900) as done:
            return "" if done.returncode == 0 else done.stdout + done.stderr

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(submitted)
        wait_until("two workers", lambda: len(pods(STANDING_WORKERS)) == 2 or job.done(), 400)
        workers, problem = len(pods(STANDING_WORKERS)), job.result()
    assert not problem
    assert workers == 2
