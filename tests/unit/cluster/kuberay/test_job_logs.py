"""Logs of a RayJob's pods: the right pods and container, what there is instead, and several at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from cat_cluster.cluster.kuberay.client.api import Api
from cat_cluster.cluster.kuberay.job_logs import JobPod, pods_of_part, read_logs
from cat_cluster.errors import KubernetesError, RunError
from tests.support.api_server import ApiServer, made

PODS = [JobPod("w0", "ray-worker"), JobPod("w1", "ray-worker")]


def job(**status: str) -> dict[str, Any]:
    return made("RayJob", "tea", status=status)


def submitter(name: str, created: str) -> dict[str, Any]:
    spec = {"containers": [{"name": "mesh"}, {"name": "ray-job-submitter"}]}
    return made("Pod", name, labels={"batch.kubernetes.io/job-name": "tea"}, created=created, spec=spec)


def of_cluster(name: str, kind: str, cluster: str = "tea-1", container: str | None = None) -> dict[str, Any]:
    spec = {"containers": [{"name": container or f"ray-{kind}"}, {"name": "sidecar"}]}
    return made("Pod", name, labels={"ray.io/cluster": cluster, "ray.io/node-type": kind}, spec=spec)


def test_each_part_has_its_pods_and_container(api: Api, server: ApiServer) -> None:
    server.put(
        submitter("s2", "2026-01-02T00:00:00Z"),
        submitter("s1", "2026-01-01T00:00:00Z"),
        of_cluster("w1", "worker"),
        of_cluster("w0", "worker"),
        of_cluster("h", "head", container="their-head"),
        of_cluster("x", "head", "b"),
        of_cluster("r", "redis-cleanup"),
    )
    running = job(jobDeploymentStatus="Running", rayClusterName="tea-1")
    assert pods_of_part(api, running, "driver") == [JobPod("s2", "ray-job-submitter")]
    assert pods_of_part(api, running, "head") == [JobPod("h", "their-head")]
    assert pods_of_part(api, running, "workers") == PODS


def test_what_is_there_instead_is_named(api: Api, server: ApiServer) -> None:
    with pytest.raises(RunError, match="none of its pods is there yet"):
        pods_of_part(api, job(), "head")
    with pytest.raises(RunError, match="its pods are gone"):
        pods_of_part(api, job(jobDeploymentStatus="Failed", rayClusterName="tea-1"), "workers")
    server.put(of_cluster("h", "head"))
    with pytest.raises(RunError, match=r"\(Running\) has no pod for the log of its driver: there is that of its head"):
        pods_of_part(api, job(jobDeploymentStatus="Running", rayClusterName="tea-1"), "driver")


def read(api: Api, pods: list[JobPod], *, follow: bool = False) -> str:
    return "".join(read_logs(api, pods, follow=follow, say=print))


def test_of_several_pods_each_line_names_its_own(api: Api, server: ApiServer) -> None:
    server.logs |= {"w0": "one\ntwo", "w1": "three\n\n"}
    assert read(api, PODS[:1]) == "one\ntwo"
    first = "[pod/w0/ray-worker] one\n[pod/w0/ray-worker] two\n"
    second = "[pod/w1/ray-worker] three\n[pod/w1/ray-worker] \n"
    assert read(api, PODS) == first + second
    assert sorted(read(api, PODS, follow=True).splitlines()) == sorted((first + second).splitlines())


def test_logs_are_followed_at_once(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod whose log does not end keeps nobody waiting for another's."""
    goes_on = threading.Event()

    def log(pod: str, container: str, *, follow: bool) -> Iterator[str]:
        if pod == "w0":
            yield "he"
            assert goes_on.wait(5)
            yield "llo\n"
        else:
            yield "it has ended\n"

    monkeypatch.setattr(api, "log", log)
    lines = read_logs(api, PODS, follow=True, say=print)
    assert next(lines) == "[pod/w1/ray-worker] it has ended\n"
    goes_on.set()
    assert list(lines) == ["[pod/w0/ray-worker] hello\n"]


def test_a_line_that_does_not_end_is_shown_in_parts(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar that is drawn again and again is one line: it is neither kept whole nor held back to its end."""

    def log(pod: str, container: str, *, follow: bool) -> Iterator[str]:
        for _ in range(3 if pod == "w0" else 0):
            yield "x" * 40_000

    monkeypatch.setattr(api, "log", log)
    assert [len(line) for line in read_logs(api, PODS, follow=False, say=print)] == [80_021, 40_021]


@pytest.mark.parametrize("follow", [False, True])
def test_a_log_that_cannot_be_read_is_said_and_the_others_go_on(
    follow: bool, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    def log(pod: str, container: str, *, follow: bool) -> Iterator[str]:
        if pod == "w0":
            raise KubernetesError("w0 is waiting to start")
        yield "here\n"

    monkeypatch.setattr(api, "log", log)
    said: list[str] = []
    lines = read_logs(api, PODS, follow=follow, say=said.append)
    assert next(lines) == "[pod/w1/ray-worker] here\n"
    with pytest.raises(KubernetesError, match="1 of 2 logs could not be read to their end"):
        next(lines)
    assert said == ["w0 is waiting to start"]
