"""What an API server is asked about manifests, and how its answers become findings; its words are those of 1.34."""

from __future__ import annotations

import json
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import yaml

from cat_cluster.cluster.kuberay.checks.check import Document
from cat_cluster.cluster.kuberay.server_check import ask_server, pod_templates
from cat_cluster.errors import KubernetesError
from tests.support.tiny_jobs import CommandLine

CONTAINER: dict[str, Any] = {"name": "a", "image": "cat-cluster:0.2.0"}
POD: dict[str, Any] = {"spec": {"containers": [CONTAINER], "serviceAccountName": "cat-training"}}
CLUSTER: dict[str, Any] = {
    "headGroupSpec": {"template": {"metadata": {"labels": {"a": "b"}}, **POD}},
    "workerGroupSpecs": [{"groupName": "cpu", "template": POD}],
}
SECURITY = (
    'pods "tea-x" is forbidden: violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false (container '
    '"a" must set securityContext.allowPrivilegeEscalation=false)'
)
QUOTA = (
    'pods "tea-x" is forbidden: exceeded quota: training, requested: requests.cpu=2, used: requests.cpu=900m, limited: '
    "requests.cpu=4"
)
NO_ACCOUNT = (
    'pods "tea-x" is forbidden: error looking up service account cats/cat-training: serviceaccount "cat-training" not '
    "found"
)
NO_RIGHT = 'pods is forbidden: User "tea" cannot create resource "pods" in API group "" in the namespace "cats"'


def job(**spec: Any) -> dict[str, Any]:
    spec = {"rayClusterSpec": CLUSTER, "submitterPodTemplate": POD, **spec}
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "tea"}, "spec": spec}


def documents(*contents: dict[str, Any]) -> list[Document]:
    return [Document("a.yaml", number, content) for number, content in enumerate(contents, 1)]


class Server:
    """The border of Api: what was asked, and refusals by the kind of what is asked about."""

    context, namespace = "lab", "cats"

    def __init__(self, **refusals: KubernetesError) -> None:
        self._refusals = refusals
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def resource(self, api_version: str, kind: str) -> object | None:
        return None if kind in ("PodMonitor", "Cup") else object()

    def apply(self, document: dict[str, Any], *, dry_run: bool) -> None:
        self._ask("apply", document, dry_run)

    def create(self, document: dict[str, Any], *, dry_run: bool) -> None:
        self._ask("create", document, dry_run)

    def _ask(self, verb: str, document: dict[str, Any], dry_run: bool) -> None:
        assert dry_run
        self.asked.append((verb, document))
        if error := self._refusals.get(document["kind"]):
            raise error


def refused(status: HTTPStatus, reason: str, *causes: tuple[str, str]) -> KubernetesError:
    return KubernetesError(f"the API server refuses: {reason}", status, reason=reason, causes=causes)


def answer_to(*contents: dict[str, Any], **refusals: KubernetesError) -> tuple[list[tuple[str, str]], list[str]]:
    answer = ask_server(Server(**refusals), documents(*contents))  # type: ignore[arg-type]
    return [(one.field, one.message) for one in answer.findings], list(answer.not_asked)


def test_an_object_and_a_pod_of_each_template_are_asked_about() -> None:
    server = Server()
    answer = ask_server(server, documents(job()))  # type: ignore[arg-type]
    assert (answer.findings, answer.not_asked) == ((), ())
    assert [(verb, one["kind"]) for verb, one in server.asked] == [("apply", "RayJob"), *3 * [("create", "Pod")]]
    submitter, head, worker = (one for _, one in server.asked[1:])
    assert submitter["metadata"] == {"generateName": "tea-", "namespace": "cats", "labels": {}, "annotations": {}}
    ray = {"ray.io/node-type": "head", "ray.io/group": "headgroup", "ray.io/is-ray-node": "yes"}
    assert head["metadata"]["labels"] == {"a": "b", **ray}
    assert worker["metadata"]["labels"]["ray.io/group"] == "cpu"
    assert worker["spec"] == {**POD["spec"], "volumes": []}


def test_nulls_and_what_a_server_wrote_are_left_out() -> None:
    server = Server()
    content = job(deletionStrategy=None)
    content["metadata"]["managedFields"] = []
    ask_server(server, documents(content))  # type: ignore[arg-type]
    assert "deletionStrategy" not in server.asked[0][1]["spec"]
    assert "managedFields" not in server.asked[0][1]["metadata"]
    assert "deletionStrategy" in content["spec"]


def test_a_generated_name_is_created() -> None:
    server = Server()
    ask_server(server, documents({**job(), "metadata": {"generateName": "tea-", "namespace": "dogs"}}))  # type: ignore[arg-type]
    assert server.asked[0][0] == "create"
    assert {one["metadata"]["namespace"] for _, one in server.asked} == {"dogs"}


@pytest.mark.parametrize(
    ("content", "paths"),
    [
        ({"kind": "Pod", **POD}, []),
        ({"kind": "Deployment", "spec": {"template": POD}}, [("spec", "template")]),
        ({"kind": "CronJob", "spec": {"jobTemplate": {"spec": {"template": POD}}}}, ["spec.jobTemplate.spec.template"]),
        ({"kind": "NodePool", "spec": {"template": {"spec": {"requirements": []}}}}, []),
        ({"kind": "ConfigMap"}, []),
        (
            {"apiVersion": "ray.io/v1", "kind": "RayService", "spec": {"rayClusterConfig": CLUSTER}},
            [
                "spec.rayClusterConfig.headGroupSpec.template",
                ("spec", "rayClusterConfig", "workerGroupSpecs", 0, "template"),
            ],
        ),
        (
            {"apiVersion": "ray.io/v1", "kind": "RayCronJob", "spec": {"jobTemplate": job()["spec"]}},
            [
                "spec.jobTemplate.submitterPodTemplate",
                "spec.jobTemplate.rayClusterSpec.headGroupSpec.template",
                ("spec", "jobTemplate", "rayClusterSpec", "workerGroupSpecs", 0, "template"),
            ],
        ),
        ({"apiVersion": "ray.io/v1", "kind": "RayJob", "spec": None}, []),
    ],
)
def test_pods_come_of_templates(content: dict[str, Any], paths: list[Any]) -> None:
    document = {"apiVersion": "v1", "metadata": {"name": "tea"}, **content}
    found = [template.path for template in pod_templates(document)]
    assert found == [tuple(path.split(".")) if isinstance(path, str) else path for path in paths]


def test_what_kuberay_adds_is_asked_about_too() -> None:
    options = {"securityContext": {"privileged": True}, "volumeMounts": [{"name": "data", "mountPath": "/data"}]}
    cluster = {**CLUSTER, "enableInTreeAutoscaling": True, "autoscalerOptions": options}
    content = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "tea"}, "spec": cluster}
    head, _ = pod_templates(content)
    autoscaler = head.pod["spec"]["containers"][1]
    assert (autoscaler["name"], autoscaler["image"]) == ("autoscaler", CONTAINER["image"])
    assert autoscaler["volumeMounts"] == options["volumeMounts"]
    cause = ("spec.containers[1].volumeMounts[0].name", 'Not found: "data"')
    findings, _left = answer_to(content, Pod=refused(HTTPStatus.UNPROCESSABLE_ENTITY, "Pod is invalid", cause))
    assert findings[0][0] == "spec.autoscalerOptions.volumeMounts[0].name"
    submitter = list(pod_templates(job(submitterPodTemplate=None)))[-1]
    assert (submitter.path, submitter.pod["spec"]["restartPolicy"]) == (("spec", "submitterPodTemplate"), "Never")


def test_a_group_without_containers_is_asked_about() -> None:
    empty = {"headGroupSpec": {"template": {"spec": {"containers": []}}}}
    (head,) = pod_templates(job(rayClusterSpec=empty, submissionMode="HTTPMode", submitterPodTemplate=None))
    assert head.pod["spec"]["containers"] == []


def test_claims_of_a_stateful_set_are_volumes_of_its_pods() -> None:
    claims = [{"metadata": {"name": "data"}}]
    spec = {"template": POD, "volumeClaimTemplates": claims}
    content = {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "s3"}, "spec": spec}
    (template,) = pod_templates(content)
    assert template.pod["spec"]["volumes"] == [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]


@pytest.mark.parametrize(
    ("error", "field", "message"),
    [
        (
            refused(HTTPStatus.BAD_REQUEST, 'strict decoding error: unknown field "spec.backofLimit"'),
            "spec.backofLimit",
            "unknown field",
        ),
        (
            refused(HTTPStatus.UNPROCESSABLE_ENTITY, "is invalid", ("spec.ttl", "must be 0"), ("<nil>", "null")),
            "spec.ttl",
            "must be 0",
        ),
        (
            refused(HTTPStatus.NOT_FOUND, 'namespaces "cats" not found'),
            "metadata.namespace",
            "the cluster has no namespace cats; make it first, or name another",
        ),
        (refused(HTTPStatus.CONFLICT, "a webhook says no"), "the whole document", "a webhook says no"),
    ],
)
def test_a_refused_object_is_found_by_its_field(error: KubernetesError, field: str, message: str) -> None:
    findings, left = answer_to(job(), RayJob=error)
    assert (findings, left) == ([(field, message)], [])


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (SECURITY, "Pod Security (restricted) refuses its pods: allowPrivilegeEscalation != false"),
        (
            QUOTA,
            "quota training has no room for its pods, the next of which asks for requests.cpu 2 (900m of 4",
        ),
        (NO_ACCOUNT, "its pods want service account cat-training, which is not there; apply the overlay"),
        ('pods "x" is forbidden: no PriorityClass with name cats was found', "its pods want priority class cats"),
    ],
)
def test_a_refused_pod_is_found_at_its_template(reason: str, words: str) -> None:
    findings, left = answer_to(job(), Pod=refused(HTTPStatus.FORBIDDEN, reason))
    places = ["submitterPodTemplate", "headGroupSpec.template", "workerGroupSpecs[0].template"]
    assert [field.endswith(place) for (field, _), place in zip(findings, places, strict=True)] == [True] * 3
    assert findings[0][1].startswith(words)
    assert left == []


def test_a_field_of_a_pod_is_that_of_its_template() -> None:
    cause = ("spec.containers[0].ports[4].name", "must be no more than 15 characters")
    findings, _ = answer_to(job(), Pod=refused(HTTPStatus.UNPROCESSABLE_ENTITY, "Pod is invalid", cause))
    field, message = findings[2]
    assert field == "spec.rayClusterSpec.workerGroupSpecs[0].template.spec.containers[0].ports[4].name"
    assert message == "must be no more than 15 characters, in a pod of this template"


def test_a_kind_that_is_not_installed() -> None:
    monitor = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PodMonitor", "metadata": {"name": "a"}}
    words = "the cluster has no kind PodMonitor of monitoring.coreos.com/v1; install what brings it"
    assert answer_to(monitor) == ([("kind", words)], [])


def test_what_the_documents_make_themselves_is_named_as_not_looked_at() -> None:
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "cats"}}
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "cat-training"}}
    crd = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "cups.example.org"},
        "spec": {"group": "example.org", "names": {"kind": "Cup"}},
    }
    cup = {"apiVersion": "example.org/v1", "kind": "Cup", "metadata": {"name": "a"}}
    absent = refused(HTTPStatus.NOT_FOUND, 'namespaces "cats" not found')
    assert answer_to(namespace, job(), RayJob=absent) == ([], ["what is in namespace cats, which these documents make"])
    assert answer_to(account, job(), Pod=refused(HTTPStatus.FORBIDDEN, NO_ACCOUNT)) == (
        [],
        ["pods of ServiceAccount cat-training, which these documents make"],
    )
    assert answer_to(crd, cup) == ([], ["Cup of example.org/v1, a kind that these documents make"])


def test_a_missing_right_is_not_the_manifests_fault() -> None:
    error = refused(HTTPStatus.FORBIDDEN, NO_RIGHT)
    pods = "Pod Security, quota, accounts and priority classes: context lab may not create pods"
    assert answer_to(job(), Pod=error) == ([], [pods])
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "a"}}
    left = ["RayJob, ServiceAccount: context lab may not apply them"]
    assert answer_to(job(), account, job(), RayJob=error, ServiceAccount=error) == ([], left)


@pytest.mark.parametrize(
    "status", [None, HTTPStatus.UNAUTHORIZED, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE]
)
def test_a_server_that_does_not_answer_ends_the_check(status: HTTPStatus | None) -> None:
    with pytest.raises(KubernetesError, match="away"):
        answer_to(job(), Pod=KubernetesError("away", status))


def test_documents_without_a_kind_or_a_name_are_not_asked_about() -> None:
    assert answer_to({"kind": "Pod"}, {"apiVersion": "v1", "kind": "Pod", "metadata": {}}) == ([], [])


def test_the_command_adds_what_the_server_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A field that both refuse is told once, and what a server was asked is no longer called not looked at."""
    from cat_cluster.cluster.kuberay.client import api

    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "a"}, "secret": []}
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(account))
    reason = 'strict decoding error: unknown field "secret", unknown field "more"'
    server = Server(ServiceAccount=refused(HTTPStatus.BAD_REQUEST, reason))
    opened: list[tuple[str | None, str | None]] = []
    monkeypatch.setattr(api, "open_api", lambda context, namespace: opened.append((context, namespace)) or server)
    words = ["k8s", "check", str(file), "--server", "--context", "lab", "--namespace", "cats", "--json"]
    done = CommandLine(monkeypatch, capsys)(*words)
    record = json.loads(done.out)
    assert [(one["field"], one["message"].split(";")[0]) for one in record["problems"]] == [
        ("secret", "unknown field"),
        ("more", "unknown field"),
    ]
    assert opened == [("lab", "cats")]
    assert record["not_looked_at"][0] == "whether images, Secrets, ConfigMaps and machines are there"
    assert done.code == 1
