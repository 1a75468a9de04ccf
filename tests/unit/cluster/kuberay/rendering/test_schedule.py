"""A CronJob that submits a spec: its pod, and that what the pod calls makes the job that was rendered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cat_cluster.cli.k8s import k8s_app
from cat_cluster.cluster.kuberay import submit
from cat_cluster.cluster.kuberay.checks.check import Document, check_manifests
from cat_cluster.cluster.kuberay.checks.gates import gates_on, needs_gate
from cat_cluster.cluster.kuberay.checks.schemas import load_schemas
from cat_cluster.cluster.kuberay.client import api as kubernetes
from cat_cluster.cluster.kuberay.client.api import Api
from cat_cluster.cluster.kuberay.rendering import pods, render
from cat_cluster.errors import SpecError
from cat_cluster.store import LocalStore
from tests.support.api_server import ApiServer, made

BUCKET = "s3://bucket/prod"
EVERYTHING = (
    *("--gpu", "--packs", "2", "--hours", "7", "--queue", "cats", "--priority", "soon", "--image", "registry/cats:7"),
    *("--namespace", "pets", "--name", "nightly", "--worker-memory", "3Gi"),
)


class Bucket(LocalStore):
    """A folder that calls itself a bucket."""

    @property
    def url(self) -> str:
        """The address of the bucket."""
        return BUCKET


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    concept = {"token": "sks", "class_noun": "cup", "images": "s3://bucket/concepts/cup"}
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({"name": "tea", "adapters": [{"id": "cup", "concepts": [concept]}]}))
    return path


def rendered(spec: Path, *options: str) -> Any:
    done = CliRunner().invoke(k8s_app, ["render", str(spec), "--storage", BUCKET, *options])
    if done.exception is not None:
        raise done.exception
    return yaml.safe_load(done.stdout)


def cron_job(spec: Path, *options: str) -> Any:
    return rendered(spec, "--schedule", "0 3 * * *", "--cron-job", *options)


def template_of(document: Any) -> Any:
    return document["spec"]["jobTemplate"]["spec"]["template"]


def test_times_of_a_cron_job(spec: Path) -> None:
    document = cron_job(spec, "--time-zone", "Europe/Berlin", "--suspend", "--queue", "cats")
    assert (document["apiVersion"], document["kind"]) == ("batch/v1", "CronJob")
    times = {name: document["spec"][name] for name in ("schedule", "timeZone", "suspend", "concurrencyPolicy")}
    assert times == {
        "schedule": "0 3 * * *",
        "timeZone": "Europe/Berlin",
        "suspend": True,
        "concurrencyPolicy": "Forbid",
    }
    assert "suspend" not in cron_job(spec)["spec"]
    assert "kueue" not in json.dumps(document["metadata"])  # its pod is not for the queue, but the job that it makes
    for options, words in (
        (["--time-zone", "Mars"], "--time-zone Mars"),
        (["--time-zone", "localtime"], "--time-zone localtime"),
        (["--schedule", "0 3 * *"], "must have 5 fields"),
    ):
        with pytest.raises(SpecError, match=words):
            cron_job(spec, *options)


@pytest.mark.parametrize("options", [(), EVERYTHING])
def test_a_cron_job_is_right_and_its_pod_alone_has_a_token(spec: Path, options: tuple[str, ...]) -> None:
    document = cron_job(spec, *options)
    assert check_manifests([Document("f", 1, document)], load_schemas(), gates=gates_on("RayCronJob=false")) == []
    template = template_of(document)
    pod = template["spec"]
    (container,) = pod["containers"]
    assert (pod["serviceAccountName"], pod["automountServiceAccountToken"]) == ("cat-schedule", True)
    assert (pod["restartPolicy"], pod["enableServiceLinks"]) == ("Never", False)
    assert template["metadata"]["labels"] == pods.part_of_project("schedule")
    assert container["envFrom"] == pods.settings_environment()
    assert container["resources"].keys() == {"requests", "limits"}
    assert container["securityContext"] == pods.container_security()
    assert pod["securityContext"] == pods.pod_security()
    mounted = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    home = next(one["value"] for one in container["env"] if one["name"] == "HOME")
    assert home in mounted.values()  # the root is read-only, and photos are kept below it


@pytest.mark.parametrize("options", [(), EVERYTHING], ids=["plain", "everything"])
def test_what_the_pod_calls_makes_the_job_that_was_rendered(
    spec: Path, options: tuple[str, ...], server: ApiServer, api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = cron_job(spec, *options)
    template = template_of(document)
    program, group, *words = template["spec"]["containers"][0]["command"]
    assert (program, group) == ("cat-cluster", "k8s")
    volume = next(one for one in template["spec"]["volumes"] if one["name"] == "job")
    (item,) = volume["downwardAPI"]["items"]
    assert item["fieldRef"]["fieldPath"] == f"metadata.annotations['{pods.SPEC_ANNOTATION}']"
    assert words[1] == pods.SPEC_FILE
    seen = tmp_path / "seen.yaml"
    seen.write_text(template["metadata"]["annotations"][pods.SPEC_ANNOTATION])

    store = Bucket(tmp_path / "bucket")
    namespace = document["metadata"]["namespace"]
    server.put(made("Namespace", namespace), made("ConfigMap", "cat-cluster-settings", namespace))
    asked: list[tuple[str | None, str]] = []
    real_open_api = kubernetes.open_api

    def open_api(context: str | None, where: str) -> Api:
        asked.append((context, where))
        return real_open_api(context, where)

    monkeypatch.setattr(kubernetes, "open_api", open_api)
    monkeypatch.setattr("cat_cluster.store.open_store", {BUCKET: store}.__getitem__)
    monkeypatch.setattr(submit, "check_cluster", lambda api: None)
    monkeypatch.setattr(render, "image_digests_of", lambda job: [["0" * 64]])  # its photos are in no bucket
    done = CliRunner().invoke(k8s_app, [words[0], str(seen), *words[2:]])
    assert done.exit_code == 0, done.output
    assert asked == [(None, namespace)]
    (ray_job,) = api.list("ray.io/v1", "RayJob", namespace=namespace)
    wanted = rendered(spec, *options)
    assert ray_job["metadata"]["labels"].items() >= wanted["metadata"]["labels"].items()
    assert ray_job["metadata"]["name"] == document["metadata"]["name"]
    own, other = ray_job["spec"].pop("entrypoint"), wanted["spec"].pop("entrypoint")
    assert own.startswith(f"{other} --expected run-")  # those who follow its run find it
    assert ray_job["spec"] == wanted["spec"]


def test_what_a_schedule_cannot_carry_is_refused(spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = tmp_path / "local.yaml"
    local.write_text(spec.read_text().replace("s3://bucket/concepts/cup", str(tmp_path)))
    with pytest.raises(SpecError, match="is a folder of this machine"):
        cron_job(local)
    monkeypatch.setattr(render, "MAX_SPEC", 100)
    for kind in ([], ["--cron-job"]):
        with pytest.raises(SpecError, match=r"the spec has 0 KiB, .* make several specs of it"):
            rendered(spec, "--schedule", "@daily", *kind)


def test_who_lacks_the_gate_hears_of_the_cron_job() -> None:
    assert "k8s render --schedule --cron-job" in needs_gate("RayCronJob")
    assert "or leave this out" in needs_gate("RayClusterMTLS")
