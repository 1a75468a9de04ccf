"""Reading manifests and schemas: closed objects, lists with keys, sources of CRDs, restricted pods."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import time
import urllib.error
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from cat_cluster.cluster.kuberay.checks import check
from cat_cluster.cluster.kuberay.checks import schemas as kuberay_schemas
from cat_cluster.cluster.kuberay.checks.check import (
    Document,
    ManifestFinding,
    check_manifests,
    field_text,
    not_looked_at,
    read_manifests,
)
from cat_cluster.cluster.kuberay.checks.gates import GATES
from cat_cluster.cluster.kuberay.checks.releases import Release
from cat_cluster.cluster.kuberay.checks.schemas import CRD_FILES, SHIPPED, Schemas, load_schemas, ship, shipped
from cat_cluster.cluster.kuberay.checks.security import restricted_findings
from cat_cluster.cluster.kuberay.checks.validation import bounded_integers
from cat_cluster.errors import ClusterError, SpecError

SPEC_SCHEMA = {
    "type": "object",
    "required": ["size", "age"],
    "properties": {
        "size": {"type": "integer"},
        "age": {"type": "integer", "default": 1},
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
    return load_schemas(str(tmp_path / "crds"))


def findings(schemas: Schemas, spec: Any, **document: Any) -> list[ManifestFinding]:
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
        {"size": 1, "colour": None, "age": 2},
        {"size": 1, "port": 80, "ports": [{"number": 1}, {"number": 1, "protocol": "UDP"}]},
    ],
)
def test_a_document_that_fits(schemas: Schemas, spec: dict[str, Any]) -> None:
    assert findings(schemas, spec) == []


@pytest.mark.parametrize(
    ("spec", "field", "said"),
    [
        ({}, "spec.size", "required"),
        ({"size": "1"}, "spec.size", "must be integer, got '1'"),
        ({"size": 1, "color": "red"}, "spec.color", "did you mean colour?"),
        ({"size": 1, "zzz": 1}, "spec.zzz", "here may be age, colour, free, labels, port, ports, size"),
        ({"size": 1, "colour": "green"}, "spec.colour", "not one of red, blue"),
        ({"size": 1, "labels": {"a": 1}}, "spec.labels.a", "must be string"),
        ({"size": 1, "ports": [{"number": 1, "nummer": 2}]}, "spec.ports[0].nummer", "did you mean number?"),
        ({"size": 1, "ports": [{"number": 1}, {"number": 1, "protocol": "TCP"}]}, "spec.ports[1]", "may be there once"),
        ({"size": 1, "port": [1]}, "spec.port", "must be integer or string"),
    ],
)
def test_what_an_api_server_would_drop_or_refuse(schemas: Schemas, spec: Any, field: str, said: str) -> None:
    (finding,) = findings(schemas, spec)
    assert finding.field == field
    assert said in finding.message


def test_the_document_itself_is_looked_at(schemas: Schemas) -> None:
    assert [one.field for one in findings(schemas, {"size": 1}, metadata={"name": "a", "label": {}})] == [
        "metadata.label"
    ]
    assert [one.field for one in findings(schemas, {"size": 1}, metadata={"name": "A_b"})] == ["metadata.name"]
    assert [one.field for one in findings(schemas, {"size": 1}, metadata=None)] == ["metadata"]
    assert [one.field for one in findings(schemas, {"size": 1}, kind=None)] == ["kind"]
    assert [one.field for one in findings(schemas, {"size": 1}, spek={})] == ["spek"]


def test_kubernetes_own_kinds_are_closed_too(schemas: Schemas) -> None:
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "a"}}
    assert check_manifests([Document("a", 1, account)], schemas) == []
    (finding,) = check_manifests([Document("a", 1, {**account, "automountServiceAcountToken": False})], schemas)
    assert finding.field == "automountServiceAcountToken"
    assert "did you mean automountServiceAccountToken?" in finding.message
    # What an API server fills in, though its own schemas require it.
    for api, kind, content in (
        ("rbac.authorization.k8s.io/v1", "RoleBinding", {"roleRef": {"kind": "Role", "name": "a"}}),
        ("networking.k8s.io/v1", "NetworkPolicy", {"spec": {"policyTypes": ["Ingress"]}}),
        ("scheduling.k8s.io/v1", "PriorityClass", {"description": "none"}),
    ):
        assert (
            check_manifests([Document("a", 1, {**account, "apiVersion": api, "kind": kind, **content})], schemas) == []
        )
    (finding,) = check_manifests([Document("a", 1, {**account, "kind": "ServiceAcount"})], schemas)
    assert finding.field == "kind"


def test_files_hold_documents_and_lists(tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text("---\n# nothing\n---\nkind: A\n---\nkind: List\nitems: [{kind: B}, {kind: C}]\n")
    assert [(one.number, one.content["kind"]) for one in read_manifests([file])] == [(2, "A"), (3, "B"), (3, "C")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: {c: 1, c: 2}\n", "'c' is given twice"),
        ("a: [", "is not YAML"),
        ("- a\n", "must be a mapping"),
        ("? [a]\n: b\n", "line 1: a key is a list"),
        ("a: 1\nb:\n  ? {a: b}\n  : c\n", "line 3: a key is a mapping"),
        ("~: b\n", "a key is nothing"),
        ("a: {a: 1, 'a': 2}\n", "'a' is given twice"),
        ("a: {1: 1, '1': 2}\n", "'1' is given twice"),
        ("a: &a [*a]\n", "the anchor a holds itself"),
        ("a: *b\n", "there is no anchor b before it"),
        ("a: .inf\n", "no number"),
        ("a: !!int x\n", "not what its tag !!int says"),
        ("a: !!set {b}\n", "is not read"),
        ("a: !!python/name:b ''\n", "is not read"),
        ("a: !!binary '?'\n", "base64"),
        ("a: {<<: b}\n", "must be given a mapping"),
        ("a: " + "{a: " * 5000 + "}" * 5000, "nested too deeply"),
        ("a: " + "[" * 150 + "]" * 150, "nested too deeply"),
        (
            "a: &a [1, 1, 1]\n"
            + "".join(f"{b}: &{b} [{', '.join(9 * [f'*{a}'])}]\n" for a, b in ("ab", "bc", "cd", "de", "ef", "fg")),
            "aliases",
        ),
        (
            "a: &a {k: v}\n"
            + "".join(
                f"{b}: &{b} {{<<: [{', '.join(9 * [f'*{a}'])}]}}\n" for a, b in ("ab", "bc", "cd", "de", "ef", "fg")
            ),
            "aliases",
        ),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(SpecError, match=said) as caught:
        read_manifests([file])
    assert str(file) in str(caught.value)
    with pytest.raises(SpecError, match="cannot be read"):
        read_manifests([tmp_path / "none.yaml"])


@pytest.mark.parametrize("levels", [6, 11, 40])
def test_what_cannot_be_read_is_told_in_a_second_and_in_a_line(levels: int, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.yaml"
    names = [f"a{n}" for n in range(levels)]
    bomb.write_text(
        f"a0: &a0 [{', '.join(9 * 'x')}]\n"
        + "".join(f"{b}: &{b} [{', '.join(9 * [f'*{a}'])}]\n" for a, b in pairwise(names))
    )
    started = time.process_time()
    with pytest.raises(SpecError, match="aliases counted") as caught:
        read_manifests([bomb])
    assert time.process_time() - started < 1
    assert "\n" not in str(caught.value)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    with pytest.raises(SpecError, match="is not YAML"):
        read_manifests([tmp_path / "latin.yaml"])


def test_a_large_file_is_not_said_to_be_no_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MAX_BYTES", 1 << 20)
    file = tmp_path / "all.yaml"
    file.write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(SpecError) as refused:
        read_manifests([file])
    assert str(refused.value) == f"{file}: is larger than 1 MiB; check it in parts"


@pytest.mark.parametrize("text", ["y", "n", "08", "1e3", "012345678901", "0o17", "on"])
def test_values_are_read_as_kubernetes_reads_them(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    for written, fields in ((text, ["metadata.annotations.k"]), (f"'{text}'", [])):
        file.write_text(
            f"apiVersion: v1\nkind: ServiceAccount\nmetadata:\n  name: a\n  annotations: {{k: {written}}}\n"
        )
        found = check_manifests(read_manifests([file]), load_schemas())
        assert [one.field for one in found] == fields
        assert all("write it in quotes" in one.message for one in found)


def test_what_the_check_cannot_know_is_said_and_not_refused(tmp_path: Path) -> None:
    route = {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": "a"}, "spec": []}
    documents = [Document("a", 1, route), Document("a", 2, POD)]
    assert check_manifests(documents, load_schemas()) == []
    left = not_looked_at(documents, load_schemas(), restricted=False)
    assert "HTTPRoute of gateway.networking.k8s.io/v1" in left[0]
    assert "pod security" in left[1]
    assert any("feature gates" in what for what in left)
    # Where all kinds of a group are known, another one is a mistake.
    for api, kind, meant in (
        ("v1", "Pods", "Pod"),
        ("apps/v1", "Deploymnt", "Deployment"),
        ("ray.io/v1", "RayJb", "RayJob"),
    ):
        (finding,) = check_manifests([Document("a", 1, {**route, "apiVersion": api, "kind": kind})], load_schemas())
        assert f"did you mean {meant}?" in finding.message
    (finding,) = check_manifests([Document("a", 1, {**route, "apiVersion": "app/v1"})], load_schemas())
    assert "correct the apiVersion" in finding.message


def test_numbers_that_go_cannot_decode_are_refused(schemas: Schemas) -> None:
    limit = {"type": "integer", "format": "int32"}
    assert bounded_integers({"a": [limit]}) == {"a": [{"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}]}
    assert bounded_integers({**limit, "minimum": 0})["minimum"] == 0
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}}
    for port, right in ((2**31 - 1, True), (2**31, False), (10**30, False)):
        found = check_manifests([Document("a", 1, {**service, "spec": {"ports": [{"port": port}]}})], schemas)
        assert (found == []) == right


@pytest.mark.parametrize(
    ("name", "fits"), [("tea-", True), ("tea", True), ("Tea-", False), ("-", False), ("a b", False), (7, False)]
)
def test_names_that_kubernetes_makes(name: Any, fits: bool, schemas: Schemas) -> None:
    found = findings(schemas, {"size": 1}, metadata={"generateName": name})
    assert [one.field for one in found] == ([] if fits else ["metadata.generateName"])


@pytest.mark.slow
def test_ten_megabytes_take_seconds(tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    base = Path(__file__).parents[5] / "k8s" / "base"
    text = "---\n".join((base / f"{name}.yaml").read_text() for name in ("cluster", "service", "network", "accounts"))
    file.write_text("---\n".join([text] * (10_000_000 // len(text))))
    started = time.process_time()
    assert check_manifests(read_manifests([file]), load_schemas()) == []
    assert time.process_time() - started < 20  # measured 7 s; 136 s with schemas read again for each document


def test_fields_are_written_as_people_do() -> None:
    assert field_text(("spec", "ports", 0, "a.b/c")) == "spec.ports[0]['a.b/c']"
    assert field_text(()) == "the whole document"


@pytest.mark.parametrize("release", GATES)
def test_the_schemas_of_a_release_are_in_the_package(release: Release) -> None:
    record = shipped(release)
    assert record["licence"] == "Apache-2.0"
    assert f"v{record['version']}" in record["source"]
    assert {name.split()[1] for name in record["schemas"]} == {"RayCluster", "RayCronJob", "RayJob", "RayService"}
    assert set(record["sha256"]) == set(CRD_FILES)
    assert record["version"].startswith(f"{release}.")
    assert (SHIPPED / f"crds-{release}.json.xz").stat().st_size < 20_000
    assert "description" not in json.dumps(record["schemas"])


def test_what_is_shipped_is_what_the_folder_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CRD_FILES:
        (tmp_path / name).write_text(yaml.safe_dump(CUP_CRD))
    ship("1.7.9", tmp_path, tmp_path)
    expected = load_schemas(str(tmp_path))
    shipped.cache_clear()
    monkeypatch.setattr(kuberay_schemas, "SHIPPED", tmp_path)
    try:
        assert shipped()["version"] == "1.7.9"
        digest = hashlib.sha256((tmp_path / CRD_FILES[0]).read_bytes()).hexdigest()
        assert shipped()["sha256"][CRD_FILES[0]] == digest
        assert load_schemas() == expected
    finally:
        shipped.cache_clear()


def test_crds_below_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def urlopen(address: str, timeout: float) -> io.BytesIO:
        asked.append(address)
        if not address.endswith(CRD_FILES[0]):
            raise urllib.error.HTTPError(address, 404, "not there", None, None)  # type: ignore[arg-type]
        return io.BytesIO(yaml.safe_dump(CUP_CRD).encode())

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert set(load_schemas("https://example.org/crds/").custom) == {"example.org/v1 Cup"}
    assert asked == [f"https://example.org/crds/{name}" for name in CRD_FILES]


def test_sources_that_hold_no_crd(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("kind: Other")
    with pytest.raises(ClusterError, match="holds no CustomResourceDefinition"):
        load_schemas(str(tmp_path))
    (tmp_path / "a.yaml").write_text("kind: CustomResourceDefinition\nspec: {versions: [{}]}")
    with pytest.raises(ClusterError, match=r"a\.yaml holds a CustomResourceDefinition without 'schema'"):
        load_schemas(str(tmp_path))
    (tmp_path / "a.yaml").write_text("kind: [")
    with pytest.raises(ClusterError, match=r"a\.yaml is not YAML"):
        load_schemas(str(tmp_path))
    with pytest.raises(ClusterError, match="must be https"):
        load_schemas("http://example.org/crds")
    with pytest.raises(ClusterError, match="cannot be fetched"):
        load_schemas("https://localhost:1/crds")


def test_a_schema_that_is_none(tmp_path: Path) -> None:
    crd = copy.deepcopy(CUP_CRD)
    crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"] = {"type": "string", "pattern": "a("}  # type: ignore[index]
    (tmp_path / "cup.yaml").write_text(yaml.safe_dump(crd))
    with pytest.raises(ClusterError, match=r"schema of example\.org/v1 Cup cannot be used.*regex"):
        findings(load_schemas(str(tmp_path)), "b")


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


def test_an_item_that_is_null_is_an_empty_one() -> None:
    """As an API server reads it: the schemas of Kubernetes' own kinds let it pass."""
    content = {**POD, "spec": {**POD["spec"], "volumes": [None], "containers": [None]}}  # type: ignore[dict-item]
    fields = [finding.field for finding in check_manifests([Document("a.yaml", 1, content)], load_schemas())]
    assert fields[0] == "spec.containers[0].securityContext.allowPrivilegeEscalation"


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
    deployment = {"kind": "Deployment", "spec": {"template": template}}
    found = [field_text(path) for path, _ in restricted_findings(deployment)]
    assert found
    assert all("initContainers[0]" in field for field in found)
    cron = {"kind": "CronJob", "spec": {"jobTemplate": {"spec": {"template": template}}}}
    assert {field_text(path) for path, _ in restricted_findings(cron)} == {
        field.replace("spec.template", "spec.jobTemplate.spec.template") for field in found
    }
