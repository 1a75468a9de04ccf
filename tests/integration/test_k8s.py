"""The manifests of k8s/, offline: valid strictly, and in step with the code."""

from __future__ import annotations

import copy
import importlib
import json
import random
import re
import shutil
import tomllib
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cat_cluster.cluster.kuberay.checks.check import Document, check_manifests, read_manifests
from cat_cluster.cluster.kuberay.checks.gates import DEFAULT_GATES, EMBEDDED_STORAGE
from cat_cluster.cluster.kuberay.checks.schemas import Schemas
from cat_cluster.cluster.kuberay.rendering import pods as kuberay_pods
from cat_cluster.cluster.kuberay.rendering import render as kuberay
from cat_cluster.cluster.kuberay.rendering.render import RenderOptions, render_job
from cat_cluster.cluster.kuberay.rendering.sizes import Overrides
from cat_cluster.settings import Settings
from cat_cluster.spec.job import JobSpec, load_spec
from jobs import train
from serve.http.access import ADMIN_KEYS, API_KEYS
from serve.settings import Deployment
from tests.support.manifests import (
    CUSTOM,
    K8S,
    PLACES,
    ROOT,
    built,
    built_in,
    clusters,
    contents,
    job,
    lines,
    of_kind,
    pods,
    ray_pods,
    scheduled_pod,
    serve_config,
    values,
)

# Fields whose keys are names of the writer's own: a misspelled one is another name.
FREE = {"labels", "annotations", "matchLabels", "data", "limits", "requests", "rayStartParams", "nodeSelector", "hard"}
FUZZED = 40  # keys of each document


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("place", PLACES)
def test_every_document_is_right(place: str, schemas: Schemas) -> None:
    """What needs a feature gate that is off by default is the state of a head that outlives itself, and is said."""
    findings = check_manifests(built(place), schemas, gates=DEFAULT_GATES | {EMBEDDED_STORAGE})
    assert not findings, lines(findings)
    fields = [finding.field for finding in check_manifests(built(place), schemas)]
    embedded = place in ("overlays/gpu", "overlays/aws")
    assert fields == (["spec.rayClusterConfig.gcsFaultToleranceOptions.backend"] if embedded else [])


@pytest.mark.parametrize("instead", ["  - ../../components/gcs-ft\n", None])
@pytest.mark.parametrize("place", ["overlays/gpu", "overlays/aws"])
def test_one_line_says_where_the_head_keeps_its_state(
    place: str, instead: str | None, tmp_path: Path, schemas: Schemas
) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    overlay = tmp_path / "k8s" / "overlays" / "gpu" / "kustomization.yaml"
    line = "  - ../../components/gcs-embedded\n"
    before, is_there, after = overlay.read_text().partition(line)
    assert is_there
    overlay.write_text(before + (instead or "  []\n") + after)
    documents = built_in(tmp_path / "k8s", place)
    findings = check_manifests(documents, schemas)
    assert not findings, lines(findings)
    service = next(one.content for one in documents if one.content["kind"] == "RayService")
    options = service["spec"]["rayClusterConfig"].get("gcsFaultToleranceOptions")
    if instead is None:
        assert options is None
    else:
        assert set(options["redisPassword"]) == {"valueFrom"}
        assert "redis" in {one.content["metadata"]["name"] for one in documents}


@pytest.mark.parametrize(
    ("workers", "options"),
    [
        (2, RenderOptions()),
        (1, RenderOptions(gpu=True, packs=3)),
        ([1, 4], RenderOptions(gpu=True)),
        (
            2,
            RenderOptions(
                suspend=True, name="later", namespace="other", image=f"registry.example/cats@sha256:{'0a' * 32}"
            ),
        ),
        (2, RenderOptions(queue="cats", priority="soon", hours=1)),
        (1, RenderOptions(sizes=Overrides(worker_cpu="500m", worker_memory="1.5Gi", head_memory="4G"))),
    ],
)
def test_every_rendered_job_is_right(workers: Any, options: RenderOptions, schemas: Schemas) -> None:
    ray_job = render_job(job(workers), "s3://bucket/prod", options)
    findings = check_manifests([Document("job", 1, ray_job)], schemas)
    assert not findings, lines(findings)
    assert ray_job["metadata"]["namespace"] == options.namespace


def test_the_job_of_the_base_is_what_render_writes() -> None:
    spec = load_spec(K8S / "base" / "specs" / "batch.yaml")
    assert spec.storage is not None
    ray_job = render_job(spec, spec.storage, RenderOptions(name="batch", suspend=True))
    (there,) = (document.content for document in read_manifests([K8S / "base" / "job.yaml"]))
    assert ray_job == there, "render it again: the first lines of k8s/base/specs/batch.yaml say how"


def keys(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of the keys that a schema knows."""
    if isinstance(value, dict):
        for name, below in value.items():
            yield (*path, name)
            is_map = name in FREE or (path == ("spec",) and name == "selector" and "matchLabels" not in below)
            is_map = is_map or (name == "resources" and "requests" not in below)  # Ray's, of a group
            if not is_map:
                yield from keys(below, (*path, name))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from keys(below, (*path, index))


def misspelled(content: dict[str, Any], path: tuple[Any, ...], how: random.Random) -> dict[str, Any]:
    changed = copy.deepcopy(content)
    holder: Any = changed
    for part in path[:-1]:
        holder = holder[part]
    name, at = path[-1], how.randrange(len(path[-1]))
    holder[how.choice([name[:at] + name[at] + name[at:], name[:at] + "Q" + name[at + 1 :], name + "s"])] = holder.pop(
        name
    )
    return changed


@pytest.mark.parametrize("place", ["overlays/aws", "overlays/local"])
def test_a_misspelled_field_at_any_depth_is_refused(place: str, schemas: Schemas) -> None:
    how = random.Random(7)
    for document in built(place):
        found = list(keys(document.content))
        few = FUZZED if document.content["kind"] in CUSTOM else 4  # those of Kubernetes take 30 ms each
        for path in how.sample(found, min(few, len(found))):
            changed = misspelled(document.content, path, how)
            assert check_manifests([Document(place, 1, changed)], schemas), f"{document.title}: {path}"


def test_check_refuses_values_of_the_wrong_kind(schemas: Schemas) -> None:
    how = random.Random(8)
    for document in built("overlays/aws"):
        if document.content["kind"] not in CUSTOM:
            continue
        numbers = [path for path in keys(document.content) if type(at(document.content, path)) in (int, bool)]
        for path in how.sample(numbers, 20):
            changed = copy.deepcopy(document.content)
            at(changed, path[:-1])[path[-1]] = {"not": "this"}
            assert check_manifests([Document("aws", 1, changed)], schemas), path


def at(content: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        content = content[part]
    return content


@pytest.mark.parametrize("place", PLACES)
def test_entry_points_are_in_the_code(place: str) -> None:
    config = serve_config(place)
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    Deployment.model_validate(application["args"])
    for ray_job in of_kind(place, "RayJob"):
        words = ray_job["spec"]["entrypoint"].split()
        assert words[:3] == ["python", "-m", "jobs.train"]
        assert util.find_spec(words[2]) is not None
        assert train._options(words[3:]).spec == kuberay_pods.SPEC_FILE
        head = ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
        JobSpec.model_validate(yaml.safe_load(head["metadata"]["annotations"][kuberay_pods.SPEC_ANNOTATION]))


@pytest.mark.parametrize("place", PLACES)
def test_a_second_apply_changes_nothing(place: str) -> None:
    """What the operator and the autoscaler write into an object is written as they write it, or left to them."""
    for one, spec in clusters(place):
        for group in spec["workerGroupSpecs"]:
            assert group["scaleStrategy"] == {}, one["metadata"]["name"]
            assert ("replicas" in group) != bool(spec.get("enableInTreeAutoscaling")), one["metadata"]["name"]
    for pod in pods(place):
        for container in pod["containers"]:
            for amounts in container["resources"].values():
                assert {type(amount) for amount in amounts.values()} == {str}, container["name"]


@pytest.mark.parametrize("place", PLACES)
def test_what_pods_refer_to_is_there(place: str) -> None:
    names = {
        kind: {one["metadata"]["name"] for one in of_kind(place, kind)} for kind in ("ConfigMap", "ServiceAccount")
    }
    priorities = {one["metadata"]["name"]: one["value"] for one in of_kind(place, "PriorityClass")}
    made = re.findall(r"make_secret ([a-z0-9-]+)|create secret generic ([a-z0-9-]+)", (K8S / "secrets.sh").read_text())
    secrets = {name for pair in made for name in pair if name}
    for labels, pod in ray_pods(place):
        assert pod["serviceAccountName"] in names["ServiceAccount"]
        assert pod["priorityClassName"] == f"cat-cluster-{labels['app.kubernetes.io/component']}"
        assert pod["priorityClassName"] in priorities
    assert priorities["cat-cluster-serving"] > priorities["cat-cluster-training"]
    _, scheduled = scheduled_pod()
    assert scheduled["serviceAccountName"] in names["ServiceAccount"]
    assert scheduled["priorityClassName"] in priorities
    for one in of_kind(place, "RoleBinding"):
        for subject in one["subjects"]:
            if subject["kind"] == "ServiceAccount":
                assert subject["name"] in names["ServiceAccount"]
                assert subject["namespace"] == one["metadata"]["namespace"]
    for one in contents(place):
        found = [ref["name"] for key in ("secretRef", "secretKeyRef") for ref in values(one, key)]
        assert {*found, *values(one, "secretName")} <= secrets, one["metadata"]["name"]
        configured = [ref["name"] for ref in values(one, "configMapRef")]
        assert set(configured) <= names["ConfigMap"]


@pytest.mark.parametrize("place", PLACES)
def test_settings_are_those_of_the_code(place: str) -> None:
    known = {f"CAT_{name.upper()}" for name in Settings.model_fields}
    named = {one["name"] for pod in pods(place) for one in values(pod, "env") for one in one}
    settings = next(one for one in of_kind(place, "ConfigMap") if one["metadata"]["name"] == "cat-cluster-settings")
    ours = {name for name in {*named, *settings["data"]} if name.startswith("CAT_")}
    assert ours <= known
    assert {"CAT_CACHE_DIR", "CAT_STORAGE"} <= ours
    script = (K8S / "secrets.sh").read_text()
    assert all(f"{name}=%s" in script for name in (API_KEYS, ADMIN_KEYS))
    storage = serve_config(place)["applications"][0]["args"]["settings"]["storage"]
    assert storage == settings["data"]["CAT_STORAGE"]


@pytest.mark.parametrize("place", PLACES)
def test_secrets_are_named_and_never_written(place: str) -> None:
    assert not of_kind(place, "Secret")
    for one in contents(place):
        for entries in values(one, "env"):
            for entry in entries:
                if re.search(r"KEY|TOKEN|PASSWORD|SECRET", entry["name"]):
                    assert "value" not in entry, entry["name"]
        for password in values(one, "redisPassword"):
            assert set(password) == {"valueFrom"}
    for _, spec in clusters(place):
        assert spec["authOptions"]["mode"] == "token"
        assert spec["authOptions"]["secretName"]


def test_aws_reads_no_stored_key() -> None:
    assert "cat-cluster-s3" not in json.dumps(contents("overlays/aws"))
    for one in of_kind("overlays/aws", "ServiceAccount"):
        assert one["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].startswith("arn:aws:iam::")


def test_local_needs_no_gpu_and_reaches_its_own_bucket() -> None:
    assert "nvidia.com/gpu" not in json.dumps([one for one, _ in clusters("overlays/local")])
    service = next(one for one in of_kind("overlays/local", "Service") if one["metadata"]["name"] == "s3")
    settings = next(one for one in of_kind("overlays/local", "ConfigMap") if "AWS_ENDPOINT_URL" in one["data"])
    port = service["spec"]["ports"][0]["port"]
    assert settings["data"]["AWS_ENDPOINT_URL"] == f"http://{service['metadata']['name']}:{port}"
    (server,) = of_kind("overlays/local", "StatefulSet")
    bucket = next(one for one in server["spec"]["template"]["spec"]["containers"][0]["args"] if "bucket" in one)
    assert settings["data"]["CAT_STORAGE"].startswith(f"s3://{bucket.partition('=')[2]}/")


@pytest.mark.parametrize("place", PLACES)
def test_versions_agree(place: str) -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    assert pinned[1] == kuberay.RAY_VERSION
    assert {spec["rayVersion"] for _, spec in clusters(place)} == {pinned[1]}
    ours = [image for pod in pods(place) for image in values(pod, "image") if "cat-cluster" in image]
    assert ours
    assert {image.rpartition(":")[2].removesuffix("-gpu") for image in ours} == {project()["version"]}
    for pod in pods(place):
        for image in values(pod, "image"):
            assert image.rpartition(":")[2] not in ("", "latest", image)
