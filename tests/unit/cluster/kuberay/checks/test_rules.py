"""What a real API server and KubeRay's operator said of edits of our manifests, and what `k8s check` says of them.

verdicts.jsonl: one edit each, tried on Kubernetes 1.34 with a namespace of the restricted profile and KubeRay 1.7.
Where nothing happened, the message is ours: the operator has none. offline: where the check differs, and is meant to.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cat_cluster.cluster.kuberay.checks.check import Document, ManifestFinding, check_manifests
from cat_cluster.cluster.kuberay.checks.rules import operator_findings
from cat_cluster.cluster.kuberay.checks.schemas import load_schemas
from cat_cluster.cluster.kuberay.rendering.render import RenderOptions, render_job
from cat_cluster.spec.job import JobSpec

BASE = Path(__file__).parents[5] / "k8s" / "base"
VERDICTS = [json.loads(line) for line in (Path(__file__).parent / "verdicts.jsonl").read_text().splitlines()]
AGREED = [case for case in VERDICTS if "offline" not in case]
NOT_SEEN = [case for case in VERDICTS if case.get("offline") == "not seen"]
INCREMENTAL = {"type": "NewClusterWithIncrementalUpgrade"}
REFUSED_HERE_ALONE = [case for case in VERDICTS if case.get("offline") == "refused here alone"]


def ray_job(workers: Any, *, suspend: bool = False) -> dict[str, Any]:
    concept = {"token": "sks", "class_noun": "cup", "images": "s3://bucket/concepts/cup"}
    fields = {"name": "t", "adapters": [{"id": "cup", "concepts": [concept]}], "cluster": {"workers": workers}}
    return render_job(JobSpec.model_validate(fields), "s3://bucket/prod", RenderOptions(suspend=suspend))


@pytest.fixture(scope="module")
def bases() -> dict[str, dict[str, Any]]:
    cluster = yaml.safe_load((BASE / "cluster.yaml").read_text())
    for group in cluster["spec"]["workerGroupSpecs"]:
        group["replicas"] = group["minReplicas"]  # as in the manifests that the edits were made of
    return {
        "rayjob": ray_job(2),
        "rayjob-elastic": ray_job([1, 4]),
        "rayjob-suspended": ray_job(2, suspend=True),
        "raycluster": cluster,
        "rayservice": yaml.safe_load((BASE / "service.yaml").read_text()),
    }


def edited(document: dict[str, Any], patch: list[dict[str, Any]]) -> dict[str, Any]:
    """The document after a JSON Patch (RFC 6902) of add, replace and remove."""
    changed = copy.deepcopy(document)
    for step in patch:
        *path, last = [part.replace("~1", "/").replace("~0", "~") for part in step["path"].split("/")[1:]]
        holder: Any = changed
        for part in path:
            holder = holder[int(part)] if isinstance(holder, list) else holder[part]
        key: Any = int(last) if isinstance(holder, list) else last
        if step["op"] == "add" and isinstance(holder, list):
            assert key <= len(holder)
            holder.insert(key, step["value"])
        elif step["op"] == "remove":
            del holder[key]
        else:
            assert step["op"] == "add" or key in holder or isinstance(holder, list)
            holder[key] = step["value"]
    return changed


def check(document: dict[str, Any]) -> list[ManifestFinding]:
    return check_manifests([Document("a.yaml", 1, document)], load_schemas())


def names_the_same(finding: ManifestFinding, message: str) -> bool:
    """Whether a refusal speaks of a finding's field, the one it is in, or a name or the value in its message."""
    fields = re.findall(r"[A-Za-z]{3,}", finding.field)[-2:]
    said = re.findall(r"\w*[a-z][A-Z]\w*|[A-Z]+_[A-Z_]+", finding.message)
    value = re.findall(r"^'([^']+)'", finding.message)
    told = message.replace(" ", "").lower()
    return any(name.replace(" ", "").lower() in told for name in (*fields, *said, *value))


@pytest.mark.slow
@pytest.mark.parametrize("case", AGREED, ids=[case["id"] for case in AGREED])
def test_check_agrees_with_a_real_cluster(case: dict[str, Any], bases: dict[str, dict[str, Any]]) -> None:
    findings = check(edited(bases[case["base"]], case["patch"]))
    if case["verdict"] == "accepted":
        assert findings == []
    else:
        assert findings
        assert any(names_the_same(finding, case["message"]) for finding in findings), findings


@pytest.mark.slow
@pytest.mark.parametrize("case", NOT_SEEN, ids=[case["id"] for case in NOT_SEEN])
def test_what_the_check_is_known_to_miss(case: dict[str, Any], bases: dict[str, dict[str, Any]]) -> None:
    """Values that the API server judges by code of its own, and rules of the operator that are not ported."""
    assert case["verdict"] != "accepted"
    found = check(edited(bases[case["base"]], case["patch"]))
    assert found == [], "the check sees it now: take `offline` out of its line"


@pytest.mark.parametrize("case", REFUSED_HERE_ALONE, ids=[case["id"] for case in REFUSED_HERE_ALONE])
def test_what_is_taken_and_never_works_is_refused_here_alone(
    case: dict[str, Any], bases: dict[str, dict[str, Any]]
) -> None:
    """No submitter is made for an unknown mode, and Ray Serve deploys nothing of a config without applications."""
    assert case["verdict"] == "accepted"
    (finding,) = check(edited(bases[case["base"]], case["patch"]))
    assert finding.field in ("spec.submissionMode", "spec.serveConfigV2")


def test_the_verdicts_are_of_every_kind(bases: dict[str, dict[str, Any]]) -> None:
    assert all(check(document) == [] for document in bases.values())
    assert len({case["id"] for case in VERDICTS}) == len(VERDICTS) == 359
    given = [case["verdict"] for case in AGREED]
    for verdict, least in (
        ("accepted", 79),
        ("accepted, and nothing happens", 6),
        ("pod refused", 30),
        ("refused by the API server", 80),
        ("refused by the operator", 39),
    ):
        assert given.count(verdict) >= least


@pytest.mark.parametrize(
    ("base", "patch", "field"),
    [
        # On a cluster that is there: a job of its own kind of cluster has retries, and deletes it.
        ("rayjob", {"clusterSelector": {"ray.io/cluster": "cat-training"}}, "backoffLimit"),
        ("rayjob", {"clusterSelector": {"ray.io/cluster": "cat-training"}}, "policy"),
        ("rayjob", {"ttlSecondsAfterFinished": -1}, "ttlSecondsAfterFinished"),
        ("rayjob", {"backoffLimit": -1}, "backoffLimit"),
        ("rayjob", {"runtimeEnvYAML": "a: ["}, "runtimeEnvYAML"),
        ("rayservice", {"rayClusterDeletionDelaySeconds": -1}, "rayClusterDeletionDelaySeconds"),
        ("rayservice", {"upgradeStrategy": {**INCREMENTAL, "clusterUpgradeOptions": {}}}, "stepSizePercent"),
        ("rayservice", {"upgradeStrategy": {**INCREMENTAL, "clusterUpgradeOptions": {}}}, "intervalSeconds"),
        ("rayservice", {"upgradeStrategy": {**INCREMENTAL, "clusterUpgradeOptions": {}}}, "gatewayClassName"),
        (
            "rayservice",
            {"upgradeStrategy": {**INCREMENTAL, "clusterUpgradeOptions": {"maxSurgePercent": 101}}},
            "maxSurgePercent",
        ),
        # Both take these, and nothing comes of it.
        ("rayjob", {"submissionMode": "HttpMode"}, "submissionMode"),
        ("rayservice", {"serveConfigV2": "a: ["}, "serveConfigV2"),
        ("rayservice", {"serveConfigV2": "applications: []"}, "serveConfigV2"),
    ],
)
def test_rules_that_no_verdict_is_of(
    base: str, patch: dict[str, Any], field: str, bases: dict[str, dict[str, Any]]
) -> None:
    document = bases[base]
    findings = operator_findings({**document, "spec": {**document["spec"], **patch}})
    assert field in {path[-1] for path, _ in findings}


@pytest.mark.parametrize(
    ("cluster", "field"),
    [
        ({"workerGroupSpecs": [{"groupName": "a", "minReplicas": 3, "maxReplicas": 2}]}, "minReplicas"),
        ({"workerGroupSpecs": [{"groupName": "a", "template": {"spec": {"containers": []}}}]}, "containers"),
        ({"gcsFaultToleranceOptions": {}, "headGroupSpec": "RAY_REDIS_ADDRESS"}, "env"),
        ({"headGroupSpec": "RAY_enable_autoscaler_v2"}, "env"),  # beside autoscalerOptions.version
        ({"rayVersion": "2.55.0", "workerGroupSpecs": [{"groupName": "a", "priority": 1}]}, "rayVersion"),
    ],
)
def test_rules_of_clusters_that_no_verdict_is_of(
    cluster: dict[str, Any], field: str, bases: dict[str, dict[str, Any]]
) -> None:
    document = copy.deepcopy(bases["raycluster"])
    if variable := cluster.pop("headGroupSpec", None):
        document["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"] = [{"name": variable}]
    document["spec"].update(cluster)
    assert field in {path[-1] for path, _ in operator_findings(document)}


def test_what_wants_autoscaler_v2_is_taken_with_it(bases: dict[str, dict[str, Any]]) -> None:
    cluster = copy.deepcopy(bases["raycluster"])
    assert cluster["spec"]["autoscalerOptions"]["version"] == "v2"
    labels = {"team": "", "example.org/zone": "eu-1.a"}
    cluster["spec"]["rayVersion"] = "2.56.0"
    cluster["spec"]["workerGroupSpecs"][0].update(idleTimeoutSeconds=0, priority=2, labels=labels)
    assert check(cluster) == []
    del cluster["spec"]["autoscalerOptions"]["version"]
    assert {finding.field.rpartition(".")[2] for finding in check(cluster)} == {"idleTimeoutSeconds", "priority"}


@pytest.mark.parametrize(("base", "most"), [("raycluster", 53), ("rayjob", 47), ("rayservice", 47)])
def test_the_longest_names(base: str, most: int, bases: dict[str, dict[str, Any]]) -> None:
    for name, fits in (("a" * most, True), ("a" * (most + 1), False)):
        findings = check({**bases[base], "metadata": {"name": name}})
        assert [finding.field for finding in findings] == ([] if fits else ["metadata.name"])


def test_what_the_operator_adds_must_be_restricted_too(bases: dict[str, dict[str, Any]]) -> None:
    job = copy.deepcopy(bases["rayjob"])
    del job["spec"]["submitterPodTemplate"]
    assert [finding.field for finding in check(job)] == ["spec.submitterPodTemplate"]
    assert check_manifests([Document("a.yaml", 1, job)], load_schemas(), restricted=False) == []
    job["spec"]["submissionMode"] = "HTTPMode"
    assert check(job) == []

    elastic = copy.deepcopy(bases["rayjob-elastic"])
    del elastic["spec"]["rayClusterSpec"]["autoscalerOptions"]["securityContext"]
    place = "spec.rayClusterSpec.autoscalerOptions.securityContext"
    missing = {f"{place}.allowPrivilegeEscalation", f"{place}.capabilities.drop"}
    assert {finding.field for finding in check(elastic)} == missing
