"""What is taken without a word, and nothing comes of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from cat_cluster.cluster.kuberay.checks.check import Document, check_manifests
from cat_cluster.cluster.kuberay.checks.gates import gates_on
from cat_cluster.cluster.kuberay.checks.schemas import load_schemas
from cat_cluster.cluster.kuberay.rendering.render import RenderOptions, render_job
from cat_cluster.spec.job import JobSpec

GROUP = ("rayClusterSpec", "workerGroupSpecs", 0)
SUBMITTER = ("submitterPodTemplate", "spec", "restartPolicy")


def ray_job(*path: str | int, **changes: Any) -> dict[str, Any]:
    """A rendered job of 3 characters, with fields at a path of its spec set, or removed where they are None."""
    concept = {"token": "sks", "class_noun": "cup", "images": "s3://bucket/concepts/cup"}
    spec = JobSpec.model_validate({"name": "t", "adapters": [{"id": "cup", "concepts": [concept]}]})
    document: dict[str, Any] = copy.deepcopy(render_job(spec, "s3://bucket/prod", RenderOptions(name="tea")))
    holder: Any = document["spec"]
    for part in path:
        holder = holder[part]
    for name, value in changes.items():
        if value is None:
            del holder[name]
        else:
            holder[name] = value
    return document


def fields(document: dict[str, Any]) -> list[str]:
    findings = check_manifests([Document("a", 1, document)], load_schemas(), gates=gates_on("RayCronJob"))
    return [finding.field for finding in findings]


@pytest.mark.parametrize(
    "name",
    ["a_b", "a b", "a" * 64, "headgroup", "-a", "a-", "ä", "_", f"{'a' * 38}_b"],
)
def test_a_group_whose_pods_cannot_be_named(name: str) -> None:
    assert fields(ray_job(*GROUP, groupName=name)) == ["spec.rayClusterSpec.workerGroupSpecs[0].groupName"]


@pytest.mark.parametrize("name", ["a", "GPU", "a.b", "7", "", "a" * 63, "head-group", f"{'a' * 50}_b"])
def test_a_group_whose_pods_can(name: str) -> None:
    """Capitals are lowered, and what is cut off from a pod's name may have an underscore."""
    assert fields(ray_job(*GROUP, groupName=name)) == []


@pytest.mark.parametrize("hosts", [0, -1])
def test_a_group_without_hosts(hosts: int) -> None:
    assert fields(ray_job(*GROUP, numOfHosts=hosts)) == ["spec.rayClusterSpec.workerGroupSpecs[0].numOfHosts"]
    assert fields(ray_job(*GROUP, numOfHosts=2)) == []


@pytest.mark.parametrize("policy", ["Always", "never", "", None])
def test_a_submitter_that_is_no_job(policy: str | None) -> None:
    place = "spec.submitterPodTemplate.spec.restartPolicy"
    assert fields(ray_job(*SUBMITTER[:2], restartPolicy=policy)) == [place]
    assert fields(ray_job(*SUBMITTER[:2], restartPolicy="OnFailure")) == []


def test_a_template_that_is_not_used_may_be_any() -> None:
    document = ray_job(*SUBMITTER[:2], restartPolicy=None)
    document["spec"]["submissionMode"] = "HTTPMode"
    assert fields(document) == []


def test_modes() -> None:
    assert fields(ray_job(submissionMode="InteractiveMode", backoffLimit=0)) == []
    assert fields(ray_job(submissionMode="InteractiveMode", backoffLimit=2)) == ["spec.backoffLimit"]
    assert fields(ray_job(submissionMode="k8sJobMode")) == ["spec.submissionMode"]


@pytest.mark.parametrize("resources", ["{a", "[1]", "1"])
def test_resources_that_ray_cannot_read(resources: str) -> None:
    assert fields(ray_job(entrypointResources=resources)) == ["spec.entrypointResources"]
    assert fields(ray_job(entrypointResources='{"a": 1}', entrypointNumGpus=0.5)) == []
    assert fields(ray_job(entrypointNumGpus=-0.5)) == ["spec.entrypointNumGpus"]


def test_managers_at_any_depth() -> None:
    assert fields(ray_job("rayClusterSpec", managedBy="me")) == ["spec.rayClusterSpec.managedBy"]
    assert fields(ray_job(managedBy="")) == ["spec.managedBy"]
    assert fields(ray_job(managedBy="kueue.x-k8s.io/multikueue")) == []


def test_the_job_of_a_schedule_is_held_against_the_same_rules() -> None:
    job = ray_job()
    cron = {**job, "kind": "RayCronJob", "spec": {"schedule": "0 3 * * *", "jobTemplate": job["spec"]}}
    assert fields(cron) == []
    assert fields({**cron, "metadata": {"name": "a" * 37}}) == ["metadata.name"]
    broken = ray_job(*GROUP, groupName="a_b")["spec"]
    assert fields({**cron, "spec": {**cron["spec"], "jobTemplate": broken}}) == [
        "spec.jobTemplate.rayClusterSpec.workerGroupSpecs[0].groupName"
    ]
    head = cron["spec"]["jobTemplate"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    head["hostNetwork"] = True
    assert fields(cron) == ["spec.jobTemplate.rayClusterSpec.headGroupSpec.template.spec.hostNetwork"]


def test_names_that_kubernetes_makes_leave_room_for_their_end() -> None:
    job = ray_job()
    for prefix, fits in (("a" * 42, True), ("a" * 43, False)):
        assert fields({**job, "metadata": {"generateName": prefix}}) == ([] if fits else ["metadata.generateName"])
