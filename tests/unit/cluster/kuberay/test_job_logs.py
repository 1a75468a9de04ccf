"""Logs of a RayJob's pods: the right pod and container, or what there is instead."""

from __future__ import annotations

from typing import Any

import pytest

from cat_cluster.cluster.kuberay.job_logs import log_of, pods_of_part
from cat_cluster.errors import RunError
from tests.support.fake_kubernetes import FakeApi, made


def job(**status: str) -> dict[str, Any]:
    return made("RayJob", "tea", status=status)


def submitter(name: str, created: str) -> dict[str, Any]:
    return made("Pod", name, labels={"batch.kubernetes.io/job-name": "tea"}, created=created)


def of_cluster(name: str, kind: str, cluster: str = "tea-1") -> dict[str, Any]:
    return made("Pod", name, labels={"ray.io/cluster": cluster, "ray.io/node-type": kind})


def test_each_part_has_its_pods_and_container() -> None:
    pods = [
        of_cluster("w1", "worker"),
        of_cluster("w0", "worker"),
        of_cluster("h", "head"),
        of_cluster("x", "head", "b"),
    ]
    api: Any = FakeApi(submitter("s2", "2026-01-02"), submitter("s1", "2026-01-01"), *pods)
    api.logs = {("s2", "ray-job-submitter"): "driver", ("h", "ray-head"): "head", ("w0", "ray-worker"): "worker"}
    running = job(jobDeploymentStatus="Running", rayClusterName="tea-1")
    assert pods_of_part(api, running, "driver") == ["s2"]
    assert pods_of_part(api, running, "head") == ["h"]
    assert pods_of_part(api, running, "workers") == ["w0", "w1"]
    assert "".join(log_of(api, "s2", "driver")) == "driver"
    assert "".join(log_of(api, "w0", "workers")) == "worker"


def test_what_is_there_instead_is_named() -> None:
    api: Any = FakeApi(of_cluster("h", "head"))
    with pytest.raises(RunError, match=r"\(Running\) has no pod for the log of its driver: there is that of its head"):
        pods_of_part(api, job(jobDeploymentStatus="Running", rayClusterName="tea-1"), "driver")
    empty: Any = FakeApi()
    with pytest.raises(RunError, match="none of its pods is there yet"):
        pods_of_part(empty, job(), "head")
    with pytest.raises(RunError, match="its pods are gone"):
        pods_of_part(empty, job(jobDeploymentStatus="Failed", rayClusterName="tea-1"), "workers")
