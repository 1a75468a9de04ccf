"""docs/operations.md from an empty namespace to a picture, by its own commands."""

from __future__ import annotations

import base64
import json

import pytest

from tests.e2e.conftest import Figures
from tests.support.kubernetes import (
    STORAGE,
    command,
    documented,
    is_ready,
    kubectl,
    name_of,
    objects,
    pods,
    shell,
    wait_until,
)

ADAPTER = "striped-cup"


def test_namespace_secrets_and_overlay() -> None:
    """Step 4: namespace, Secrets and overlay `local`, without a warning"""
    with shell(documented("**4. Namespace, Secrets, overlay**")[0]) as done:
        assert done.returncode == 0, done.stderr
        assert "warning" not in (done.stdout + done.stderr).lower(), done.stderr


def test_all_of_it_starts(figures: Figures) -> None:
    """S3 server, service and standing cluster start in what they ask for"""
    wait_until("an S3 server that is ready", lambda: any(map(is_ready, pods("app.kubernetes.io/name=s3"))))
    wait_until("a service that is ready", lambda: any(map(is_ready, objects("rayservice", "cat-serving"))), 420)
    wait_until(
        "a standing cluster with its worker",
        lambda: sum(map(is_ready, pods("ray.io/cluster=cat-training"))) == 2,
    )
    restarts = {
        name_of(pod): status["restartCount"]
        for pod in pods("app.kubernetes.io/part-of=cat-cluster")
        for status in pod["status"]["containerStatuses"]
    }
    assert not any(restarts.values()), restarts
    figures[""] = f"{len(restarts)} containers, none restarted"


def test_a_second_apply_changes_nothing() -> None:
    """A second apply, and one server-side, change nothing and conflict with nobody"""
    before = {name_of(one): one["metadata"]["generation"] for one in objects("rayservice,raycluster,rayjob")}
    kubectl("apply", "-k", "k8s/overlays/local")
    kubectl("apply", "--server-side", "--force-conflicts", "-k", "k8s/overlays/local")
    kubectl("apply", "--server-side", "-k", "k8s/overlays/local")
    assert {name_of(one): one["metadata"]["generation"] for one in objects("rayservice,raycluster,rayjob")} == before


@pytest.mark.parametrize("overlay", ["local", "aws", "gpu"])
def test_the_server_takes_every_manifest(overlay: str) -> None:
    """`k8s check --server` finds nothing in an overlay"""
    text = command("kubectl", "kustomize", f"k8s/overlays/{overlay}").stdout
    words = ("--server", "--namespace", "cat-cluster", "--gates", "GCSFaultToleranceEmbeddedStorage")
    done = command("cat-cluster", "k8s", "check", "-", *words, stdin=text)
    assert done.returncode == 0, done.stderr


def test_the_first_job(figures: Figures) -> None:
    """Step 5: `k8s submit` from a spec to a published adapter, and the same again says that it is done"""
    first = command(
        "cat-cluster", "k8s", "submit", "jobs/specs/single.yaml", "--storage", STORAGE, "--json", seconds=900
    )
    assert first.returncode == 0, first.stderr
    run = json.loads(first.stdout)
    assert (run["state"], run["adapters"][0]["id"]) == ("done", ADAPTER)
    figures["kps"] = f"{run['adapters'][0]['metrics']['kps']:.3f}"
    again = command("cat-cluster", "k8s", "submit", "jobs/specs/single.yaml", "--storage", STORAGE, seconds=120)
    assert again.returncode == 0, again.stderr
    assert "done" in again.stdout + again.stderr


def test_the_first_picture() -> None:
    """Step 6: a picture of the published adapter through the door, by its commands"""
    forward, rest = documented("**6. A picture.**")[0].split("&\n", 1)
    with shell(f"{forward}&\nsleep 5\n{rest}") as done:
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout[done.stdout.index("{") :])
    assert base64.b64decode(answer["data"][0]["b64_json"]).startswith(b"\x89PNG")


def test_a_doctor_finds_nothing() -> None:
    """`k8s doctor` finds the cluster fit"""
    done = command("cat-cluster", "k8s", "doctor", "--namespace", "cat-cluster", seconds=300)
    assert done.returncode == 0, done.stdout + done.stderr
