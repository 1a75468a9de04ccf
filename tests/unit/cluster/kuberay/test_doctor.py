"""What `k8s doctor` says of a cluster that lacks one thing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from cat_cluster.cluster.kuberay import doctor
from cat_cluster.cluster.kuberay.checks.security import restricted_findings
from cat_cluster.cluster.kuberay.client.api import Api
from cat_cluster.cluster.kuberay.doctor import SECRETS, Finding, examine
from tests.support.api_server import ApiServer, api_server, made

Json = dict[str, Any]
EMBEDDED = {"rayClusterConfig": {"gcsFaultToleranceOptions": {"backend": "rocksdb"}}}
ANSWER = {"reaches_api": False, "storage": "s3://cat-storage/prod", "bucket": None}


def operator(*arguments: str, namespace: str = "kuberay-system", ready: int = 1) -> Json:
    container = {"name": "operator", "image": "kuberay/operator:v1.7.0", "args": list(arguments)}
    spec = {"template": {"spec": {"containers": [container]}}}
    return made("Deployment", "kuberay-operator", namespace, spec=spec, status={"readyReplicas": ready})


@pytest.fixture
def server() -> Iterator[ApiServer]:
    """A cluster that is fit."""
    with api_server() as server:
        server.put(operator("--feature-gates=GCSFaultToleranceEmbeddedStorage=true"))
        namespace = made("Namespace", "cat-cluster", labels={"pod-security.kubernetes.io/enforce": "restricted"})
        fast = made("StorageClass", "fast")
        fast["metadata"]["annotations"] = {"storageclass.kubernetes.io/is-default-class": "true"}
        node = made("Node", "node1", status={"allocatable": {"cpu": "8", "nvidia.com/gpu": "2"}})
        server.put(namespace, fast, node, *(made("Secret", name) for name in SECRETS))
        backend = {"gcsFaultToleranceOptions": {"properties": {"backend": {}}}}
        server.schemas["io.ray.v1.RayCluster"] = {"properties": {"spec": {"properties": backend}}}
        server.on_create = ends_with(server, ANSWER)
        yield server


def ends_with(server: ApiServer, answer: Json) -> Callable[[Json], None]:
    def run(pod: Json) -> None:
        pod["status"] = {"phase": "Succeeded"}
        server.logs[pod["metadata"]["name"]] = f"a warning\n{json.dumps(answer)}\n"

    return run


def problems(api: Api) -> list[Finding]:
    return [one for one in examine(api) if one.state != "ok"]


def test_a_cluster_that_is_fit(api: Api, server: ApiServer) -> None:
    found = list(examine(api))
    assert {one.state for one in found} == {"ok"}
    assert [one.text for one in found if one.subject == "GPUs"] == ["2 on 1 of 1 nodes"]
    assert not api.list("v1", "Pod"), "the pod that looked from inside is left"


def without_operator(server: ApiServer) -> None:
    del server.objects["deployments", "kuberay-system", "kuberay-operator"]


def embedded_without_gate(server: ApiServer) -> None:
    server.put(operator(), made("RayService", "cat-serving", spec=EMBEDDED))


@pytest.mark.parametrize(
    ("break_it", "subject", "words"),
    [
        pytest.param(without_operator, "KubeRay's operator", "is not there", id="no operator"),
        pytest.param(lambda s: s.put(operator(ready=0)), "KubeRay's operator", "is not ready", id="not ready"),
        pytest.param(lambda s: s.put(operator(namespace="other")), "KubeRay's operator", "undo each other", id="two"),
        pytest.param(embedded_without_gate, "feature gates", "EmbeddedStorage is off, which RayService", id="gate"),
        pytest.param(lambda s: s.schemas.clear(), "KubeRay's CRDs", "older than 1.6", id="old definitions"),
        pytest.param(lambda s: s.kinds.pop("ray.io/v1"), "KubeRay's CRDs", "are not installed", id="no definitions"),
        pytest.param(lambda s: s.put(made("Namespace", "cat-cluster")), "namespace", "restricted", id="pod security"),
        pytest.param(
            lambda s: s.objects.pop(("secrets", "cat-cluster", SECRETS[0])),
            f"Secret {SECRETS[0]}",
            "secrets.sh",
            id="secret",
        ),
        pytest.param(
            lambda s: s.objects.pop(("storageclasses", "", "fast")), "storage class", "wait for ever", id="class"
        ),
    ],
)
def test_what_lacks_is_named_with_its_remedy(
    break_it: Callable[[ApiServer], object], subject: str, words: str, api: Api, server: ApiServer
) -> None:
    break_it(server)
    found = problems(api)
    assert [one.subject for one in found if one.state == "problem"] == [subject]
    assert words in found[0].text


def test_the_older_release_is_fit_and_named(api: Api, server: ApiServer) -> None:
    server.put(operator("--feature-gates=RayJobDeletionPolicy=true,AsyncJobInfoQuery=true"))
    fields = {"authOptions": {"properties": {"secretName": {}}}}
    server.schemas["io.ray.v1.RayCluster"] = {"properties": {"spec": {"properties": fields}}}
    found = {one.subject: one for one in examine(api)}
    assert {one.state for one in found.values()} == {"ok"}
    assert "of 1.6" in found["KubeRay's CRDs"].text
    assert "AsyncJobInfoQuery" in found["feature gates"].text


def test_an_operator_elsewhere_is_not_let_in(api: Api, server: ApiServer) -> None:
    without_operator(server)
    server.put(operator(namespace="other"))
    assert [one.subject for one in problems(api)] == ["KubeRay's operator"]


def test_a_namespace_that_is_not_there_ends_it(api: Api, server: ApiServer) -> None:
    del server.objects["namespaces", "", "cat-cluster"]
    last = list(examine(api))[-1]
    assert (last.subject, last.state) == ("namespace", "problem")
    assert "k8s/base/namespace.yaml" in last.text


def test_an_old_server(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "version", lambda: "v1.29.1-gke.5")
    assert [one.text for one in problems(api)] == [
        "v1.29.1-gke.5 is older than 1.33, for which the manifests are written: upgrade it"
    ]


def test_who_may_see_little_is_told_what_was_not_seen(api: Api, server: ApiServer) -> None:
    server.forbidden |= {"deployments", "secrets", "storageclasses", "nodes", "namespaces"}
    found = problems(api)
    assert {one.state for one in found} == {"unknown"}
    unseen = {"KubeRay's operator", "feature gates", "namespace", *(f"Secret {name}" for name in SECRETS)}
    assert {one.subject for one in found} == unseen | {"storage class", "GPUs"}


def test_rights_that_lack(api: Api, server: ApiServer) -> None:
    server.forbidden.add("rayjobs")
    assert (
        "you may not get rayjobs, list rayjobs, create rayjobs, patch rayjobs, delete rayjobs" in problems(api)[0].text
    )


@pytest.mark.parametrize(
    ("change", "subject", "words"),
    [
        ({"reaches_api": True}, "network policies", "are not enforced"),
        ({"bucket": "cannot be reached"}, "bucket", "s3://cat-storage/prod from inside: cannot be reached"),
    ],
)
def test_what_is_found_from_inside(change: Json, subject: str, words: str, api: Api, server: ApiServer) -> None:
    server.on_create = ends_with(server, {**ANSWER, **change})
    (found,) = problems(api)
    assert (found.subject, found.state) == (subject, "problem")
    assert words in found.text


def test_a_pod_that_cannot_start(api: Api, server: ApiServer) -> None:
    waiting = {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}
    server.on_create = lambda pod: pod.update(status={"phase": "Pending", "containerStatuses": [{"state": waiting}]})
    found = problems(api)
    assert [one.state for one in found] == ["unknown", "unknown"]
    assert "does not start: no such image; see --image" in found[0].text
    assert not api.list("v1", "Pod")


def test_a_trainer_may_ask_too(api: Api, server: ApiServer) -> None:
    server.forbidden |= {"deployments", "nodes", "rayclusters"}  # no right of role training-jobs
    answer = server.answer

    def no_schemas(method: str, path: str, query: Mapping[str, str], body: Json | None) -> tuple[int, Any]:
        refused = (403, {"message": 'forbidden: User "ada" cannot get path'})
        return refused if path.startswith("/openapi") else answer(method, path, query, body)

    server.answer = no_schemas  # type: ignore[method-assign]
    found = problems(api)
    assert {one.state for one in found} == {"unknown"}
    assert {"KubeRay's CRDs", "GPUs"} <= {one.subject for one in found}


def test_a_node_that_has_just_come(api: Api, server: ApiServer) -> None:
    server.put(made("Node", "node2", status={}))
    assert not problems(api)


@pytest.mark.parametrize(
    ("log", "says"),
    [(f"{json.dumps(ANSWER)}\na late warning\n", None), ("", "its log is empty"), ("Killed\n", "an answer: Killed")],
)
def test_the_answer_is_found_among_what_else_is_in_the_log(
    log: str, says: str | None, api: Api, server: ApiServer
) -> None:
    end = server.on_create
    server.on_create = lambda pod: (end(pod), server.logs.update({pod["metadata"]["name"]: log}))
    found = problems(api)
    assert [one.state for one in found] == ([] if says is None else ["unknown", "unknown"])
    assert says is None or says in found[0].text


def test_the_pod_has_the_standing_clusters_image_and_is_restricted(api: Api, server: ApiServer) -> None:
    head = {"template": {"spec": {"containers": [{"image": "registry.example/cat:7"}]}}}
    server.put(made("RayCluster", doctor.STANDING_CLUSTER, spec={"headGroupSpec": head}))
    pods: list[Json] = []
    end = server.on_create
    server.on_create = lambda pod: (pods.append(json.loads(json.dumps(pod))), end(pod))
    assert not problems(api)
    assert pods[0]["spec"]["containers"][0]["image"] == "registry.example/cat:7"
    assert not list(restricted_findings(pods[0]))
