"""Feature gates of the operator: what needs one that is not on is named, with the remedy."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cat_cluster.cluster.kuberay.checks.check import Document, check_manifests
from cat_cluster.cluster.kuberay.checks.gates import DEFAULT_GATES, EMBEDDED_STORAGE, GATES, gates_on
from cat_cluster.cluster.kuberay.checks.releases import NEWEST
from cat_cluster.cluster.kuberay.checks.schemas import load_schemas
from cat_cluster.errors import SpecError
from tests.support.tiny_jobs import CommandLine

BASE = Path(__file__).parents[5] / "k8s" / "base"
SERVICE = yaml.safe_load((BASE / "service.yaml").read_text())
CLUSTER = "spec.rayClusterConfig"
EMBEDDED = {"backend": "rocksdb", "storage": {"size": "1Gi"}}


def service(**cluster: Any) -> dict[str, Any]:
    """The service of the base, with fields of its cluster set."""
    document: dict[str, Any] = copy.deepcopy(SERVICE)
    document["spec"]["rayClusterConfig"].update(cluster)
    return document


def found(document: dict[str, Any], gates: str) -> dict[str, str]:
    """The message of each finding, by its field."""
    findings = check_manifests([Document("a", 1, document)], load_schemas(), gates=gates_on(gates))
    return {one.field: one.message for one in findings}


def incremental() -> dict[str, Any]:
    document = service()
    options = {"gatewayClassName": "istio", "stepSizePercent": 10, "intervalSeconds": 30}
    document["spec"]["upgradeStrategy"] = {
        "type": "NewClusterWithIncrementalUpgrade",
        "clusterUpgradeOptions": options,
    }
    return document


def elastic_job(kind: str) -> dict[str, Any]:
    job = next(one for one in yaml.safe_load_all((BASE / "job.yaml").read_text()) if one and one["kind"] == "RayJob")
    if kind == "RayCronJob":
        return {**job, "kind": kind, "spec": {"schedule": "0 3 * * *", "jobTemplate": job["spec"]}}
    del job["spec"]["shutdownAfterJobFinishes"], job["spec"]["ttlSecondsAfterFinished"], job["spec"]["suspend"]
    rule = {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 60}}
    job["spec"]["deletionStrategy"] = {"deletionRules": [rule]}
    return job  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("document", "field", "gate"),
    [
        (service(gcsFaultToleranceOptions=EMBEDDED), f"{CLUSTER}.gcsFaultToleranceOptions.backend", EMBEDDED_STORAGE),
        (service(networkPolicy={"mode": "DenyAll"}), f"{CLUSTER}.networkPolicy", "RayClusterNetworkPolicy"),
        (service(tlsOptions={}), f"{CLUSTER}.tlsOptions", "RayClusterMTLS"),
        (service(historyServerOptions={}), f"{CLUSTER}.historyServerOptions", "RayClusterHistoryServer"),
        (incremental(), "spec.upgradeStrategy.type", "RayServiceIncrementalUpgrade"),
        (elastic_job("RayJob"), "spec.deletionStrategy", "RayJobDeletionPolicy"),
        (elastic_job("RayCronJob"), "kind", "RayCronJob"),
    ],
)
def test_what_needs_a_gate_is_refused_without_it(document: dict[str, Any], field: str, gate: str) -> None:
    assert found(document, gate) == {}
    messages = found(document, f"{gate}=false")
    assert set(messages) == {field}
    assert f"feature gate {gate}: turn it on" in messages[field]
    assert f"--gates {gate}" in messages[field]
    assert (found(document, "") == {}) == GATES[NEWEST][gate]


@pytest.mark.parametrize("name", ["cluster.yaml", "service.yaml", "job.yaml"])
def test_the_base_fits_the_older_release_too(name: str) -> None:
    documents = [Document("f", 1, one) for one in yaml.safe_load_all((BASE / name).read_text()) if one]
    assert check_manifests(documents, load_schemas(release="1.6"), gates=gates_on("", "1.6")) == []


def test_the_older_release_has_no_embedded_store() -> None:
    document = Document("f", 1, service(gcsFaultToleranceOptions=EMBEDDED))
    findings = check_manifests([document], load_schemas(release="1.6"), gates=gates_on("", "1.6"))
    assert any("backend" in finding.field for finding in findings)
    with pytest.raises(SpecError, match=r"is no feature gate of KubeRay 1\.6"):
        gates_on(EMBEDDED_STORAGE, "1.6")


def test_gates_are_given_as_the_operator_takes_them() -> None:
    assert gates_on("") == DEFAULT_GATES
    assert gates_on(f"{EMBEDDED_STORAGE}, RayCronJob=True") == DEFAULT_GATES | {EMBEDDED_STORAGE, "RayCronJob"}
    assert gates_on("RayJobDeletionPolicy=false") == DEFAULT_GATES - {"RayJobDeletionPolicy"}
    with pytest.raises(SpecError, match="did you mean RayCronJob"):
        gates_on("RayCronJobs")
    with pytest.raises(SpecError, match="write RayCronJob=true or RayCronJob=false"):
        gates_on("RayCronJob=yes")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({**EMBEDDED, "redisAddress": "redis:6379"}, "redisAddress"),
        ({**EMBEDDED, "redisPassword": {"value": "a"}}, "redisPassword"),
        ({**EMBEDDED, "externalStorageNamespace": "a"}, "externalStorageNamespace"),
        ({"backend": "rocksdb", "storage": {"claimName": "a", "size": "1Gi"}}, "storage.claimName"),
        ({"redisAddress": "redis:6379", "storage": {"size": "1Gi"}}, "storage"),
    ],
)
def test_redis_and_rocksdb_are_not_mixed(options: dict[str, Any], field: str) -> None:
    assert set(found(service(gcsFaultToleranceOptions=options), EMBEDDED_STORAGE)) == {
        f"{CLUSTER}.gcsFaultToleranceOptions.{field}"
    }


def test_the_volume_of_the_gcs_is_the_operators() -> None:
    pod = "headGroupSpec.template.spec"
    for field, what, refused in (
        ("volumeMounts", {"name": "tmp", "mountPath": "/data/gcs"}, f"{pod}.containers[0].volumeMounts"),
        ("env", {"name": "RAY_gcs_storage", "value": "rocksdb"}, f"{pod}.containers[0].env"),
        ("volumes", {"name": "gcs-storage", "emptyDir": {}}, f"{pod}.volumes"),
    ):
        document = service(gcsFaultToleranceOptions=EMBEDDED)
        head = document["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
        (head if field == "volumes" else head["containers"][0])[field].append(what)
        assert set(found(document, EMBEDDED_STORAGE)) == {f"{CLUSTER}.{refused}"}


def test_the_command_takes_gates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "service.json"
    file.write_text(json.dumps(service(gcsFaultToleranceOptions=EMBEDDED)))
    command = CommandLine(monkeypatch, capsys)
    (problem,) = json.loads(command("k8s", "check", str(file), "--json").out)["problems"]
    assert problem["field"] == f"{CLUSTER}.gcsFaultToleranceOptions.backend"
    done = command("k8s", "check", str(file), "--gates", EMBEDDED_STORAGE, "--json")
    assert done.code == 0
    assert any(EMBEDDED_STORAGE in what for what in json.loads(done.out)["not_looked_at"])
