"""Logs of a RayJob's pods: the right pod and container, or what there is instead."""

from __future__ import annotations

from typing import Any

import pytest

from cat_cluster.cluster.kuberay.job_logs import JobPod, pods_of_part
from cat_cluster.errors import RunError
from tests.support.fake_kubernetes import FakeApi, made


def job(**status: str) -> dict[str, Any]:
    return made("RayJob", "tea", status=status)


def submitter(name: str, created: str) -> dict[str, Any]:
    spec = {"containers": [{"name": "mesh"}, {"name": "ray-job-submitter"}]}
    return made("Pod", name, labels={"batch.kubernetes.io/job-name": "tea"}, created=created, spec=spec)


def of_cluster(name: str, kind: str, cluster: str = "tea-1", container: str | None = None) -> dict[str, Any]:
    spec = {"containers": [{"name": container or f"ray-{kind}"}, {"name": "sidecar"}]}
    return made("Pod", name, labels={"ray.io/cluster": cluster, "ray.io/node-type": kind}, spec=spec)


def test_each_part_has_its_pods_and_container() -> None:
    pods = [
        of_cluster("w1", "worker"),
        of_cluster("w0", "worker"),
        of_cluster("h", "head", container="their-head"),
        of_cluster("x", "head", "b"),
    ]
    api: Any = FakeApi(submitter("s2", "2026-01-02"), submitter("s1", "2026-01-01"), *pods)
    running = job(jobDeploymentStatus="Running", rayClusterName="tea-1")
    assert pods_of_part(api, running, "driver") == [JobPod("s2", "ray-job-submitter")]
    assert pods_of_part(api, running, "head") == [JobPod("h", "their-head")]
    assert pods_of_part(api, running, "workers") == [JobPod("w0", "ray-worker"), JobPod("w1", "ray-worker")]


def test_what_is_there_instead_is_named() -> None:
    api: Any = FakeApi(of_cluster("h", "head"))
    with pytest.raises(RunError, match=r"\(Running\) has no pod for the log of its driver: there is that of its head"):
        pods_of_part(api, job(jobDeploymentStatus="Running", rayClusterName="tea-1"), "driver")
    empty: Any = FakeApi()
    with pytest.raises(RunError, match="none of its pods is there yet"):
        pods_of_part(empty, job(), "head")
    with pytest.raises(RunError, match="its pods are gone"):
        pods_of_part(empty, job(jobDeploymentStatus="Failed", rayClusterName="tea-1"), "workers")
