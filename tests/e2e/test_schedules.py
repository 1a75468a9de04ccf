"""What starts by the clock, and what waits in a queue: CronJob, RayCronJob, nightly probes, Kueue."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import Figures
from tests.support.kubernetes import (
    NAMESPACE,
    ROOT,
    STANDING_WORKERS,
    STORAGE,
    Json,
    command,
    kubectl,
    name_of,
    objects,
    pods,
    s3_access,
    shell,
    wait_until,
)

PHOTOS = ROOT / "out" / "demo" / "photos" / "striped-cup"
BUCKET_PHOTOS = f"{STORAGE}/e2e-photos"
UPLOAD = """
import pathlib, sys
from cat_cluster.store import open_store
store = open_store(sys.argv[2])
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    store.put(path.name, path.read_bytes())
"""
QUEUE = "e2e"
EVERY_MINUTE = "* * * * *"


@pytest.fixture(scope="module")
def spec_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes the spec of a job whose photos are in the bucket."""
    with shell(f"{s3_access()}{shlex.join([sys.executable, '-c', UPLOAD, str(PHOTOS), BUCKET_PHOTOS])}") as done:
        assert done.returncode == 0, done.stderr

    def write(name: str) -> Path:
        one = {"token": "sks", "class_noun": "cup", "images": BUCKET_PHOTOS}
        spec = {
            "name": name,
            "base": "pocket",
            "adapters": [{"id": name, "concepts": [one]}],
            "training": {"steps": 20, "rank": 4, "rows_per_concept": 1, "seed": int(time.time())},  # a new run
            "evaluation": {"enabled": False},
        }
        path = tmp_path_factory.mktemp(name) / "spec.yaml"
        path.write_text(yaml.safe_dump(spec), encoding="utf-8")
        return path

    return write


@pytest.fixture
def emptied() -> Iterator[None]:
    """What runs on a schedule, and its RayJobs, go when the test ends."""
    yield
    for kind in ("cronjob", "raycronjob"):
        kubectl("delete", kind, "--all", "--ignore-not-found")
    for job in timed_jobs():
        kubectl("delete", "rayjob", name_of(job), "--wait=false", "--ignore-not-found")  # or with its schedule


def rendered(spec: Path, *options: str) -> str:
    """What `k8s render` writes, as `k8s check --server` has found it right."""
    done = command("cat-cluster", "k8s", "render", str(spec), "--storage", STORAGE, "--name", "timed", *options)
    assert done.returncode == 0, done.stderr
    words = ("cat-cluster", "k8s", "check", "-", "--server", "--namespace", NAMESPACE, "--gates", "RayCronJob")
    check = command(*words, stdin=done.stdout)
    assert check.returncode == 0, check.stderr
    return done.stdout


def started(cron_job: str, name: str, seconds: float = 300) -> str:
    """Start a CronJob now; what its pod, which must succeed, wrote."""
    kubectl("create", "job", f"--from=cronjob/{cron_job}", name)

    def ended() -> Json | None:
        status: Json = objects("job", name)[0].get("status", {})
        return status if status.get("succeeded") or status.get("failed") else None

    status = wait_until(f"the end of Job {name}", ended, seconds)
    log = kubectl("logs", f"job/{name}")
    assert status.get("succeeded"), log
    return log


def timed_jobs() -> list[Json]:
    return [job for job in objects("rayjob") if name_of(job).startswith("timed")]


def status_of(job: Json) -> Json:
    found: Json = objects("rayjob", name_of(job))[0].get("status", {})
    return found


@pytest.mark.usefixtures("emptied")
def test_a_cron_job_submits(spec_of: Callable[[str], Path], figures: Figures) -> None:
    """`render --schedule --cron-job`: its pod submits the job with role `training-jobs` alone, and not twice"""
    kubectl("apply", "-f", "-", stdin=rendered(spec_of("timed"), "--schedule", "0 3 * * *", "--cron-job"))
    said = [started("timed", "timed-now")]
    (job,) = timed_jobs()
    said.append(started("timed", "timed-again"))
    wait_until("an adapter", lambda: status_of(job).get("jobStatus") == "SUCCEEDED", 420)
    said.append(started("timed", "timed-done"))
    assert [one["metadata"]["uid"] for one in timed_jobs()] == [job["metadata"]["uid"]]
    found = [word for word, log in zip(("submitted", "already on its way", "done"), said, strict=True) if word in log]
    figures[""] = ", then ".join(found)
    assert len(found) == len(said), said


@pytest.mark.usefixtures("emptied")
def test_a_ray_cron_job_starts(spec_of: Callable[[str], Path]) -> None:
    """`render --schedule`: KubeRay makes a RayJob of a RayCronJob at its minute"""
    if "RayCronJob=true" not in command("kubectl", "get", "deployments", "-A", "-o", "json").stdout:
        pytest.skip("the operator's feature gate RayCronJob is off")
    kubectl("apply", "-f", "-", stdin=rendered(spec_of("timed"), "--schedule", EVERY_MINUTE))
    jobs = wait_until("a RayJob", timed_jobs, 150)
    wait_until("its cluster", lambda: status_of(jobs[0]).get("rayClusterName"), 60)


@pytest.mark.usefixtures("emptied")
def test_nightly_probes(tmp_path: Path, figures: Figures) -> None:
    """`nightly-probes`: its pod asks for a probe of each adapter through the policies, and says how each is"""
    away = Path(os.path.relpath(ROOT / "k8s", tmp_path))
    kustomization = {
        "namespace": NAMESPACE,
        "resources": [str(away / "overlays/local")],
        "components": [str(away / "components/nightly-probes")],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), encoding="utf-8")
    kubectl("apply", "-k", str(tmp_path))
    try:
        log = started("nightly-probes", "probes-now", 600)
    finally:
        kubectl("delete", "networkpolicy", "nightly-probes", "nightly-probes-to-doors")
    assert "ok: striped-cup" in log, log
    figures[""] = log.splitlines()[-1]


@pytest.fixture
def queue() -> Iterator[None]:
    """A queue of Kueue with room for one small job."""
    if command("kubectl", "get", "crd", "workloads.kueue.x-k8s.io").returncode != 0:
        pytest.skip("the cluster has no Kueue")
    version = "kueue.x-k8s.io/v1beta2"
    resources = [{"name": "cpu", "nominalQuota": "2"}, {"name": "memory", "nominalQuota": "8Gi"}]
    flavor = {"name": QUEUE, "resources": resources}
    kinds: list[Json] = [
        {"kind": "ResourceFlavor", "metadata": {"name": QUEUE}},
        {
            "kind": "ClusterQueue",
            "metadata": {"name": QUEUE},
            "spec": {
                "namespaceSelector": {},
                "resourceGroups": [{"coveredResources": ["cpu", "memory"], "flavors": [flavor]}],
            },
        },
        {"kind": "LocalQueue", "metadata": {"name": QUEUE}, "spec": {"clusterQueue": QUEUE}},
    ]
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": [{"apiVersion": version, **one} for one in kinds]})
    kubectl("apply", "-f", "-", stdin=text)
    yield
    kubectl("delete", "-f", "-", stdin=text)


@pytest.mark.usefixtures("queue", "emptied")  # jobs go before their queue
def test_a_queue(spec_of: Callable[[str], Path], figures: Figures) -> None:
    """Kueue: of two jobs one runs, `k8s status` says of the other why it waits, and it runs when the first has gone"""

    def submit(name: str) -> None:
        words = ("--storage", STORAGE, "--name", name, "--queue", QUEUE, "--no-wait", "--force")
        done = command("cat-cluster", "k8s", "submit", str(spec_of(name)), *words)
        assert done.returncode == 0, done.stderr

    def obstacles(name: str) -> str:
        done = command("cat-cluster", "k8s", "status", name, "--namespace", NAMESPACE, "--json")
        assert done.returncode == 0, done.stderr
        return " ".join(one["text"] for one in json.loads(done.stdout)["obstacles"])

    def is_admitted(name: str) -> bool:
        return not objects("rayjob", name)[0]["spec"].get("suspend")

    submit("timed-first")
    wait_until("an admitted job", lambda: is_admitted("timed-first"), 60)
    submit("timed-second")
    waits = wait_until("words of the queue", lambda: obstacles("timed-second"), 60)
    assert QUEUE in waits
    assert not is_admitted("timed-second")
    figures["waiting"] = waits
    kubectl("delete", "rayjob", "timed-first", seconds=400)
    wait_until("the second job", lambda: is_admitted("timed-second"), 60)


def test_the_standing_cluster_has_shrunk() -> None:
    """`cat-training`, which grew for a job, is back at one pod"""
    # The worker goes 300 s after the job (idleTimeoutSeconds of k8s/base/cluster.yaml), while the tests above run.
    wait_until("one worker again", lambda: len(pods(STANDING_WORKERS)) == 1, 480)
