"""Reading manifests and schemas: closed objects, lists with keys, sources of CRDs, restricted pods."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cat_cluster.cluster.kuberay import schemas as kuberay_schemas
from cat_cluster.cluster.kuberay.check import Document, ManifestProblem, check_manifests, field_text, read_manifests
from cat_cluster.cluster.kuberay.schemas import CRD_FILES, Schemas, load_schemas
from cat_cluster.cluster.kuberay.security import restricted_findings
from cat_cluster.errors import ClusterError, SpecError

SPEC_SCHEMA = {
    "type": "object",
    "required": ["size"],
    "properties": {
        "size": {"type": "integer"},
        "colour": {"type": "string", "enum": ["red", "blue"]},
        "port": {"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}]},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        "ports": {
            "type": "array",
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["number", "protocol"],
            "items": {
                "type": "object",
                "properties": {"number": {"type": "integer"}, "protocol": {"type": "string", "default": "TCP"}},
            },
        },
    },
}
CUP_CRD = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "spec": {
        "group": "example.org",
        "names": {"kind": "Cup"},
        "versions": [
            {
                "name": "v1",
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "properties": {"metadata": {"type": "object"}, "spec": SPEC_SCHEMA},
                    }
                },
            }
        ],
    },
}


@pytest.fixture
def schemas(tmp_path: Path) -> Schemas:
    (tmp_path / "crds").mkdir()
    (tmp_path / "crds" / "cup.yaml").write_text(yaml.safe_dump(CUP_CRD))
    return load_schemas(str(tmp_path / "crds"), tmp_path / "cache")


def problems(schemas: Schemas, spec: Any, **document: Any) -> list[ManifestProblem]:
    content = {
        "apiVersion": "example.org/v1",
        "kind": "Cup",
        "metadata": {"name": "a"},
        "spec": spec,
        **document,
    }
    return check_manifests([Document("a.yaml", 1, content)], schemas)


@pytest.mark.parametrize(
    "spec",
    [
        {"size": 1},
        {"size": 1, "port": "http", "labels": {"any": "thing"}, "free": {"any": ["thing"]}},
        {"size": 1, "port": 80, "ports": [{"number": 1}, {"number": 1, "protocol": "UDP"}]},
    ],
)
def test_a_document_that_fits(schemas: Schemas, spec: dict[str, Any]) -> None:
    assert problems(schemas, spec) == []


@pytest.mark.parametrize(
    ("spec", "field", "said"),
    [
        ({}, "spec.size", "required"),
        ({"size": "1"}, "spec.size", "must be integer, got '1'"),
        ({"size": 1, "color": "red"}, "spec.color", "did you mean colour?"),
        ({"size": 1, "zzz": 1}, "spec.zzz", "here may be colour, free, labels, port, ports, size"),
        ({"size": 1, "colour": "green"}, "spec.colour", "not one of red, blue"),
        ({"size": 1, "labels": {"a": 1}}, "spec.labels.a", "must be string"),
        ({"size": 1, "ports": [{"number": 1, "nummer": 2}]}, "spec.ports[0].nummer", "did you mean number?"),
        ({"size": 1, "ports": [{"number": 1}, {"number": 1, "protocol": "TCP"}]}, "spec.ports[1]", "may be there once"),
        ({"size": 1, "port": [1]}, "spec.port", "must be integer or string"),
    ],
)
def test_what_an_api_server_would_drop_or_refuse(schemas: Schemas, spec: Any, field: str, said: str) -> None:
    (problem,) = problems(schemas, spec)
    assert problem.field == field
    assert said in problem.message


def test_the_document_itself_is_looked_at(schemas: Schemas) -> None:
    assert [one.field for one in problems(schemas, {"size": 1}, metadata={"name": "a", "label": {}})] == [
        "metadata.label"
    ]
    assert [one.field for one in problems(schemas, {"size": 1}, metadata={"name": "A_b"})] == ["metadata.name"]
    assert [one.field for one in problems(schemas, {"size": 1}, metadata=None)] == ["metadata"]
    assert [one.field for one in problems(schemas, {"size": 1}, kind=None)] == ["kind"]
    assert [one.field for one in problems(schemas, {"size": 1}, spek={})] == ["spek"]


def test_kubernetes_own_kinds_are_closed_too(schemas: Schemas) -> None:
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "a"}}
    assert check_manifests([Document("a", 1, account)], schemas) == []
    (problem,) = check_manifests([Document("a", 1, {**account, "automountServiceAcountToken": False})], schemas)
    assert problem.field == "automountServiceAcountToken"
    assert "did you mean automountServiceAccountToken?" in problem.message
    (problem,) = check_manifests([Document("a", 1, {**account, "kind": "ServiceAcount"})], schemas)
    assert problem.field == "kind"


def test_without_the_schemas_of_kubernetes_it_says_what_to_install(
    schemas: Schemas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "kubernetes_validate", None)
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "a"}}
    with pytest.raises(ClusterError, match=r"cat-cluster\[k8s\]"):
        check_manifests([Document("a", 1, account)], schemas)


def test_files_hold_documents_and_lists(tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text("---\n# nothing\n---\nkind: A\n---\nkind: List\nitems: [{kind: B}, {kind: C}]\n")
    assert [(one.number, one.content["kind"]) for one in read_manifests([file])] == [(2, "A"), (3, "B"), (3, "C")]


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: 1\nb: {c: 1, c: 2}\n", "'c' is given twice"), ("a: [", "is not YAML"), ("- a\n", "must be a mapping")],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(SpecError, match=said) as caught:
        read_manifests([file])
    assert str(file) in str(caught.value)
    with pytest.raises(SpecError, match="cannot be read"):
        read_manifests([tmp_path / "none.yaml"])


def test_fields_are_written_as_people_do() -> None:
    assert field_text(("spec", "ports", 0, "a.b/c")) == "spec.ports[0]['a.b/c']"
    assert field_text(()) == "the whole document"


def test_the_pinned_release_is_fetched_once_and_no_other_bytes_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, asked = yaml.safe_dump(CUP_CRD).encode(), []

    def fetch(url: str) -> bytes:
        asked.append(url)
        return text

    monkeypatch.setattr(kuberay_schemas, "_fetch", fetch)
    with pytest.raises(ClusterError, match="is not the file of KubeRay"):
        load_schemas(None, tmp_path)
    digest = hashlib.sha256(text).hexdigest()
    monkeypatch.setattr(kuberay_schemas, "CRD_FILES", dict.fromkeys(CRD_FILES, digest))
    asked.clear()
    for _ in range(2):
        assert ("example.org/v1", "Cup") in load_schemas(None, tmp_path).custom
    assert len(asked) == len(CRD_FILES)
    assert all(f"/v{kuberay_schemas.KUBERAY_VERSION}/" in url for url in asked)
    next(tmp_path.rglob("ray.io_rayjobs.yaml")).write_bytes(b"kind: Other")
    with pytest.raises(ClusterError, match="delete it if it is in the cache"):
        load_schemas(None, tmp_path)


def test_sources_that_hold_no_crd(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("kind: Other")
    with pytest.raises(ClusterError, match="holds no CustomResourceDefinition"):
        load_schemas(str(tmp_path), tmp_path)
    with pytest.raises(ClusterError, match="only https"):
        load_schemas("http://example.org/crds", tmp_path)
    with pytest.raises(ClusterError, match="cannot be fetched"):
        load_schemas("https://localhost:1/crds", tmp_path)


SECURE = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
}
POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "a"},
    "spec": {
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "volumes": [{"name": "tmp", "emptyDir": {}}],
        "containers": [{"name": "a", "securityContext": SECURE}],
    },
}
Change = Callable[[dict[str, Any]], Any]


def container(spec: dict[str, Any]) -> dict[str, Any]:
    return spec["containers"][0]["securityContext"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda spec: spec.update(hostNetwork=True), "spec.hostNetwork"),
        (lambda spec: spec.update(hostPID=True), "spec.hostPID"),
        (lambda spec: spec.update(hostIPC=True), "spec.hostIPC"),
        (lambda spec: spec["volumes"].append({"name": "x", "hostPath": {"path": "/"}}), "spec.volumes[1].hostPath"),
        (lambda spec: spec["volumes"].append({"name": "x", "nfs": {}}), "spec.volumes[1].nfs"),
        (lambda spec: spec["securityContext"].update(runAsUser=0), "spec.securityContext.runAsUser"),
        (lambda spec: spec["securityContext"].update(sysctls=[{"name": "a"}]), "spec.securityContext.sysctls[0]"),
        (lambda spec: spec["securityContext"].update(seLinuxOptions={"user": "a"}), "spec.securityContext.seLinux"),
        (lambda spec: spec["securityContext"].update(appArmorProfile={"type": "Unconfined"}), "appArmorProfile.type"),
        (lambda spec: spec["securityContext"].update(windowsOptions={"hostProcess": True}), "hostProcess"),
        (lambda spec: spec["securityContext"].pop("runAsNonRoot"), "spec.containers[0].securityContext.runAsNonRoot"),
        (lambda spec: spec["securityContext"].pop("seccompProfile"), "securityContext.seccompProfile.type"),
        (lambda spec: container(spec).update(runAsNonRoot=False), "runAsNonRoot"),
        (lambda spec: container(spec).update(runAsUser=0), "spec.containers[0].securityContext.runAsUser"),
        (lambda spec: container(spec).update(privileged=True), "privileged"),
        (lambda spec: container(spec).update(allowPrivilegeEscalation=True), "allowPrivilegeEscalation"),
        (lambda spec: container(spec).pop("allowPrivilegeEscalation"), "allowPrivilegeEscalation"),
        (lambda spec: container(spec).update(capabilities={"drop": ["KILL"]}), "capabilities.drop"),
        (lambda spec: container(spec)["capabilities"].update(add=["NET_ADMIN"]), "capabilities.add"),
        (lambda spec: container(spec).update(procMount="Unmasked"), "procMount"),
        (lambda spec: container(spec).update(seccompProfile={"type": "Unconfined"}), "seccompProfile.type"),
        (lambda spec: spec["containers"][0].update(ports=[{"hostPort": 80}]), "ports[0].hostPort"),
        (
            lambda spec: spec["containers"][0].update(livenessProbe={"httpGet": {"host": "x", "port": 1}}),
            "livenessProbe.httpGet.host",
        ),
    ],
)
def test_the_restricted_profile(change: Change, field: str) -> None:
    assert list(restricted_findings(POD)) == []
    pod: dict[str, Any] = copy.deepcopy(POD)
    change(pod["spec"])
    (finding,) = restricted_findings(pod)
    assert field in field_text(finding[0])


def test_init_containers_and_templates_are_looked_at() -> None:
    template = {"spec": {**POD["spec"], "initContainers": [{"name": "b"}]}}  # type: ignore[dict-item]
    for kind, spec in (
        ("Deployment", {"template": template}),
        ("CronJob", {"jobTemplate": {"spec": {"template": template}}}),
    ):
        found = [field_text(path) for path, _ in restricted_findings({"kind": kind, "spec": spec})]
        assert found
        assert all("initContainers[0]" in field for field in found)
