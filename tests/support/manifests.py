"""The manifests of k8s/ as kubectl puts them together, and parts of them."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cat_cluster.cluster.kuberay.checks.check import Document, ManifestFinding
from cat_cluster.cluster.kuberay.checks.security import pods_of
from cat_cluster.cluster.kuberay.rendering.render import RenderOptions, render_job
from cat_cluster.cluster.kuberay.rendering.schedule import cron_job
from cat_cluster.spec.job import JobSpec
from serve.settings import Deployment

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
PLACES = ["base", "overlays/local", "overlays/gpu", "overlays/aws"]
CUSTOM = {"RayCluster": ("spec",), "RayJob": ("spec", "rayClusterSpec"), "RayService": ("spec", "rayClusterConfig")}


@functools.cache
def built(place: str) -> tuple[Document, ...]:
    """The documents of a kustomization."""
    return built_in(K8S, place)


def built_in(folder: Path, place: str) -> tuple[Document, ...]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed, which puts the manifests together: install it to run this")
    done = subprocess.run([kubectl, "kustomize", str(folder / place)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    documents = [one for one in yaml.safe_load_all(done.stdout) if one]
    return tuple(Document(place, number, one) for number, one in enumerate(documents, 1))


def contents(place: str) -> list[dict[str, Any]]:
    return [document.content for document in built(place)]


def of_kind(place: str, *kinds: str) -> list[dict[str, Any]]:
    return [one for one in contents(place) if one["kind"] in kinds]


def users_service(place: str) -> dict[str, Any]:
    """The Service that users connect to."""
    return next(one for one in of_kind(place, "Service") if one["metadata"]["name"] == "cat-serving")


def clusters(place: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each of KubeRay's objects with its cluster's spec."""
    for one in of_kind(place, *CUSTOM):
        spec = one
        for part in CUSTOM[one["kind"]]:
            spec = spec[part]
        yield one, spec


def ray_pods(place: str) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Each pod of Ray's with the labels it will wear: the template's and the operator's."""
    for one, spec in clusters(place):
        groups = [("head", spec["headGroupSpec"])] + [("worker", group) for group in spec["workerGroupSpecs"]]
        for role, group in groups:
            own = {"ray.io/node-type": role, "ray.io/cluster": one["metadata"]["name"]}
            own["ray.io/group"] = group.get("groupName", "headgroup")
            yield {**group["template"]["metadata"]["labels"], **own}, group["template"]["spec"]


def pods(place: str) -> Iterator[dict[str, Any]]:
    for one in contents(place):
        for _, pod in pods_of(one):
            yield pod


def values(document: Any, key: str) -> Iterator[Any]:
    """Every value of a key, at any depth."""
    if isinstance(document, dict):
        for name, value in document.items():
            if name == key:
                yield value
            yield from values(value, key)
    elif isinstance(document, list):
        for value in document:
            yield from values(value, key)


def serving(place: str) -> dict[str, dict[str, Any]]:
    """The worker groups of the service by their names."""
    (service,) = of_kind(place, "RayService")
    return {group["groupName"]: group for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}


def deployment(place: str) -> Deployment:
    return Deployment.model_validate(serve_config(place)["applications"][0]["args"])


def serve_config(place: str) -> dict[str, Any]:
    (service,) = of_kind(place, "RayService")
    return yaml.safe_load(service["spec"]["serveConfigV2"])  # type: ignore[no-any-return]


def job(workers: Any, images: str = "s3://bucket/concepts/cup") -> JobSpec:
    concept = {"token": "sks", "class_noun": "cup", "images": images}
    fields = {"name": "tea", "adapters": [{"id": "cup", "concepts": [concept]}], "cluster": {"workers": workers}}
    return JobSpec.model_validate(fields)


def scheduled_pod() -> tuple[dict[str, str], dict[str, Any]]:
    """The labels and the spec of the pod that submits a job on a schedule."""
    ray_job = render_job(job(1), "s3://bucket/prod", RenderOptions())
    template = cron_job(ray_job, RenderOptions(), "@daily", None)["spec"]["jobTemplate"]["spec"]["template"]
    return template["metadata"]["labels"], template["spec"]


def lines(findings: list[ManifestFinding]) -> str:
    return "\n".join(map(str, findings))
