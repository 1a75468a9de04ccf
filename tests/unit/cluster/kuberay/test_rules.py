"""KubeRay's own rules: one document that keeps them all, and one for each that breaks it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from cat_cluster.cluster.kuberay.check import field_text
from cat_cluster.cluster.kuberay.job_rules import job_findings
from cat_cluster.cluster.kuberay.rules import cluster_findings, service_findings
from cat_cluster.cluster.kuberay.security import restricted_findings

Change = Callable[[dict[str, Any]], Any]

POD = {
    "spec": {
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": "ray",
                "image": "a",
                "env": [],
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            }
        ],
    }
}
SPEC = {
    "rayVersion": "2.60.0",
    "authOptions": {"mode": "token", "secretName": "token"},
    "headGroupSpec": {"rayStartParams": {}, "template": POD},
    "workerGroupSpecs": [{"groupName": "a", "minReplicas": 0, "maxReplicas": 2, "rayStartParams": {}, "template": POD}],
}
CLUSTER = {"kind": "RayCluster", "metadata": {"name": "a"}, "spec": SPEC}
JOB = {
    "kind": "RayJob",
    "metadata": {"name": "a"},
    "spec": {
        "entrypoint": "python -m jobs.train",
        "deletionStrategy": {
            "deletionRules": [
                {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": 60}},
                {"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED", "ttlSeconds": 90}},
            ]
        },
        "submitterPodTemplate": POD,
        "rayClusterSpec": SPEC,
    },
}
SERVICE = {
    "kind": "RayService",
    "metadata": {"name": "a"},
    "spec": {
        "serveConfigV2": "applications: [{name: a, import_path: 'serve.app:build'}]",
        "rayClusterConfig": SPEC,
    },
}


def fresh(document: dict[str, Any]) -> Any:
    """A copy that shares nothing, not even with itself: here head and workers are one object."""
    return json.loads(json.dumps(document))


def scaled(spec: dict[str, Any], **options: Any) -> dict[str, Any]:
    spec.update(enableInTreeAutoscaling=True, autoscalerOptions={"version": "v2", **options})
    return spec


def head(spec: dict[str, Any]) -> dict[str, Any]:
    return spec["headGroupSpec"]  # type: ignore[no-any-return]


def group(spec: dict[str, Any]) -> dict[str, Any]:
    return spec["workerGroupSpecs"][0]  # type: ignore[no-any-return]


def env(spec: dict[str, Any], name: str, value: str = "x") -> None:
    head(spec)["template"]["spec"]["containers"][0]["env"].append({"name": name, "value": value})


def restarts(spec: dict[str, Any], of: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    of(spec)["template"]["spec"]["restartPolicy"] = "Always"


CLUSTER_RULES: list[tuple[Change, str]] = [
    (lambda s: head(s)["template"]["spec"].update(containers=[]), "headGroupSpec.template.spec.containers"),
    (lambda s: group(s)["template"]["spec"].update(containers=[]), "workerGroupSpecs[0].template.spec.containers"),
    (lambda s: head(s).update(rayStartParams={"num-cpus": "1"}, resources={"CPU": "1"}), "rayStartParams.num-cpus"),
    (lambda s: group(s).update(rayStartParams={"memory": "1"}, resources={"CPU": "1"}), "rayStartParams.memory"),
    (lambda s: group(s)["rayStartParams"].update(labels="a=b"), "rayStartParams.labels"),
    (lambda s: group(s).update(labels={"a b": "c"}), "labels['a b']"),
    (lambda s: group(s).update(labels={"a": "c d"}), "labels.a"),
    (lambda s: group(s).pop("minReplicas"), "minReplicas"),
    (lambda s: group(s).pop("maxReplicas"), "maxReplicas"),
    (lambda s: group(s).update(minReplicas=-1), "minReplicas"),
    (lambda s: group(s).update(minReplicas=3), "minReplicas"),
    (lambda s: group(s).update(idleTimeoutSeconds=1), "idleTimeoutSeconds"),
    (lambda s: group(scaled(s)).update(idleTimeoutSeconds=-1), "workerGroupSpecs[0].idleTimeoutSeconds"),
    (lambda s: group(s).update(priority=1), "priority"),
    (
        lambda s: group(scaled({**s, "rayVersion": "2.55.1"})).update(priority=1) or s.update(rayVersion="2.55.1"),
        "priority",
    ),
    (lambda s: group(scaled(s)).update(suspend=True), "suspend"),
    (lambda s: env(s, "RAY_REDIS_ADDRESS"), "env"),
    (lambda s: env(s, "REDIS_USERNAME"), "rayStartParams"),
    (lambda s: head(s)["rayStartParams"].update({"redis-username": "a"}), "rayStartParams"),
    (lambda s: s.update(gcsFaultToleranceOptions={}) or env(s, "RAY_REDIS_ADDRESS"), "env"),
    (lambda s: s.update(gcsFaultToleranceOptions={}) or env(s, "REDIS_PASSWORD"), "env"),
    (
        lambda s: s.update(gcsFaultToleranceOptions={}) or head(s)["rayStartParams"].update({"redis-password": "a"}),
        "rayStartParams.redis-password",
    ),
    (lambda s: s.update(gcsFaultToleranceOptions={"backend": "rocksdb"}), "gcsFaultToleranceOptions.backend"),
    (lambda s: s.update(gcsFaultToleranceOptions={"storage": {}}), "gcsFaultToleranceOptions.storage"),
    (lambda s: env(s, "RAY_enable_autoscaler_v2", "1"), "env"),
    (lambda s: env(scaled(s), "RAY_enable_autoscaler_v2", "1"), "env"),
    (lambda s: restarts(scaled(s), head), "headGroupSpec.template.spec.restartPolicy"),
    (lambda s: restarts(scaled(s), group), "workerGroupSpecs[0].template.spec.restartPolicy"),
    (lambda s: scaled(s, idleTimeoutSeconds=-1), "autoscalerOptions.idleTimeoutSeconds"),
    (lambda s: scaled(s, env=[{"name": "KUBERAY_GEN_AUTOSCALER_START_CMD"}]), "autoscalerOptions.env"),
    (lambda s: s.update(networkPolicy={}), "networkPolicy"),
    (lambda s: s.update(tlsOptions={}), "tlsOptions"),
    (lambda s: s.update(historyServerOptions={}), "historyServerOptions"),
    (lambda s: s.pop("rayVersion"), "rayVersion"),
    (lambda s: s.update(rayVersion="2.51.9"), "rayVersion"),
    (lambda s: s.update(rayVersion="newest"), "rayVersion"),
    (lambda s: s.update(rayVersion="2.54.0", authOptions={"mode": "token", "enableK8sTokenAuth": True}), "rayVersion"),
    (lambda s: s["authOptions"].update(enableK8sTokenAuth=True), "authOptions.secretName"),
    (lambda s: s.update(authOptions={"enableK8sTokenAuth": True}), "authOptions.enableK8sTokenAuth"),
    (lambda s: s.update(managedBy="me"), "managedBy"),
]


@pytest.mark.parametrize(("change", "field"), CLUSTER_RULES)
def test_rules_of_clusters(change: Change, field: str) -> None:
    assert list(cluster_findings(CLUSTER)) == []
    document: dict[str, Any] = fresh(CLUSTER)
    change(document["spec"])
    (finding,) = cluster_findings(document)
    assert field_text(finding[0]).endswith(field)
    assert finding[1]


def test_what_is_allowed_is_not_refused() -> None:
    document: dict[str, Any] = fresh(CLUSTER)
    spec = scaled(document["spec"])
    group(spec).update(priority=1, idleTimeoutSeconds=60, labels={"example.org/kind": "spot", "empty": ""})
    group(spec).pop("minReplicas")
    spec["gcsFaultToleranceOptions"] = {"redisAddress": "redis:6379"}
    spec["upgradeStrategy"] = {"type": "Recreate"}
    assert list(cluster_findings(document)) == []


@pytest.mark.parametrize(("kind", "most"), [("RayCluster", 53), ("RayJob", 47), ("RayService", 47)])
def test_names(kind: str, most: int) -> None:
    original, findings = {
        "RayCluster": (CLUSTER, cluster_findings),
        "RayJob": (JOB, job_findings),
        "RayService": (SERVICE, service_findings),
    }[kind]
    for name, right in (("a" * most, True), ("a" * (most + 1), False), ("1a", False), ("a.b", False)):
        document = {**original, "metadata": {"name": name}}
        assert (list(findings(document)) == []) is right, name


@pytest.mark.parametrize("annotation", ["ray.io/ft-enabled", "ray.io/external-storage-namespace"])
def test_annotations_beside_fault_tolerance(annotation: str) -> None:
    document: dict[str, Any] = fresh(CLUSTER)
    document["metadata"]["annotations"] = {annotation: "true"}
    assert list(cluster_findings(document)) == []
    document["spec"]["gcsFaultToleranceOptions"] = {}
    (finding,) = cluster_findings(document)
    assert annotation in finding[0]


def rules(job: dict[str, Any]) -> list[dict[str, Any]]:
    return job["deletionStrategy"]["deletionRules"]  # type: ignore[no-any-return]


def selected(job: dict[str, Any], **fields: Any) -> None:
    """A job on a cluster that is there."""
    for name in ("deletionStrategy", "rayClusterSpec"):
        del job[name]
    job.update(clusterSelector={"ray.io/cluster": "a"}, **fields)


def legacy(job: dict[str, Any], success: Any, failure: Any, **fields: Any) -> None:
    job.update(deletionStrategy={"onSuccess": success, "onFailure": failure}, **fields)


JOB_RULES: list[tuple[Change, str]] = [
    (lambda j: j.update(suspend=True), "suspend"),
    (lambda j: j.update(ttlSecondsAfterFinished=5), "ttlSecondsAfterFinished"),
    (lambda j: j.update(ttlSecondsAfterFinished=-5), "ttlSecondsAfterFinished"),
    (lambda j: j.update(shutdownAfterJobFinishes=True), "deletionStrategy.deletionRules"),
    (lambda j: j["deletionStrategy"].update(onSuccess={"policy": "DeleteSelf"}), "deletionStrategy.onSuccess"),
    (lambda j: j.update(deletionStrategy={}), "deletionStrategy"),
    (lambda j: j.update(deletionStrategy={"onSuccess": {"policy": "DeleteSelf"}}), "deletionStrategy"),
    (lambda j: legacy(j, {"policy": "DeleteSelf"}, {"x": 1}), "onFailure.policy"),
    (
        lambda j: scaled(j["rayClusterSpec"]) and legacy(j, {"policy": "DeleteWorkers"}, {"policy": "DeleteSelf"}),
        "policy",
    ),
    (
        lambda j: legacy(j, {"policy": "DeleteSelf"}, {"policy": "DeleteNone"}, shutdownAfterJobFinishes=True),
        "onFailure.policy",
    ),
    (lambda j: rules(j)[0]["condition"].update(jobDeploymentStatus="Failed"), "deletionRules[0].condition"),
    (lambda j: rules(j)[0]["condition"].pop("jobStatus"), "deletionRules[0].condition"),
    (lambda j: scaled(j["rayClusterSpec"]) and rules(j)[0].update(policy="DeleteWorkers"), "deletionRules[0].policy"),
    (lambda j: rules(j).append(rules(j)[0]), "deletionRules[2]"),
    (lambda j: rules(j)[1]["condition"].update(ttlSeconds=1), "deletionStrategy.deletionRules"),
    (lambda j: j.pop("rayClusterSpec"), "rayClusterSpec"),
    (lambda j: selected(j) or j.update(clusterSelector={"a": "b"}), "clusterSelector['ray.io/cluster']"),
    (lambda j: selected(j, suspend=True, shutdownAfterJobFinishes=True), "suspend"),
    (lambda j: selected(j, submissionMode="SidecarMode") or j.pop("submitterPodTemplate"), "clusterSelector"),
    (lambda j: selected(j, backoffLimit=1), "backoffLimit"),
    (
        lambda j: selected(
            j, deletionStrategy={"deletionRules": [{"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED"}}]}
        ),
        "deletionRules[0].policy",
    ),
    (lambda j: j.update(submissionMode="HttpMode"), "submissionMode"),
    (lambda j: j.update(submissionMode="InteractiveMode", backoffLimit=1), "backoffLimit"),
    (lambda j: j.update(entrypoint=" "), "entrypoint"),
    (lambda j: j.update(submissionMode="SidecarMode"), "submitterPodTemplate"),
    (
        lambda j: j.pop("submitterPodTemplate") and j.update(submissionMode="SidecarMode", submitterConfig={}),
        "submitterConfig",
    ),
    (
        lambda j: (
            j.pop("submitterPodTemplate")
            and restarts(j["rayClusterSpec"], head) is None
            and j.update(submissionMode="SidecarMode")
        ),
        "restartPolicy",
    ),
    (
        lambda j: j["rayClusterSpec"].update(authOptions={"mode": "token", "enableK8sTokenAuth": True}),
        "authOptions.enableK8sTokenAuth",
    ),
    (lambda j: j["rayClusterSpec"].update(upgradeStrategy={"type": "Recreate"}), "upgradeStrategy"),
    (lambda j: group(j["rayClusterSpec"]).update(minReplicas=9), "rayClusterSpec.workerGroupSpecs[0].minReplicas"),
    (lambda j: j.update(activeDeadlineSeconds=0), "activeDeadlineSeconds"),
    (lambda j: j.update(preRunningDeadlineSeconds=0), "preRunningDeadlineSeconds"),
    (lambda j: j.update(backoffLimit=-1), "backoffLimit"),
    (lambda j: j.update(runtimeEnvYAML="a: ["), "runtimeEnvYAML"),
    (lambda j: j.update(runtimeEnvYAML="- a"), "runtimeEnvYAML"),
    (lambda j: j.update(managedBy="me"), "managedBy"),
]


@pytest.mark.parametrize(("change", "field"), JOB_RULES)
def test_rules_of_jobs(change: Change, field: str) -> None:
    assert list(job_findings(JOB)) == []
    document: dict[str, Any] = fresh(JOB)
    change(document["spec"])
    (finding,) = job_findings(document)
    assert field_text(finding[0]).endswith(field)


def test_other_forms_of_jobs_are_taken() -> None:
    for change in (
        lambda j: selected(j),
        lambda j: legacy(j, {"policy": "DeleteCluster"}, {"policy": "DeleteNone"}),
        lambda j: (
            j.pop("deletionStrategy")
            and j.update(suspend=True, shutdownAfterJobFinishes=True, ttlSecondsAfterFinished=5)
        ),
        lambda j: j.update(submissionMode="InteractiveMode", entrypoint=""),
    ):
        document: dict[str, Any] = fresh(JOB)
        change(document["spec"])
        assert list(job_findings(document)) == []


def upgraded(service: dict[str, Any], **options: Any) -> None:
    right = {"maxSurgePercent": 50, "stepSizePercent": 25, "intervalSeconds": 5, "gatewayClassName": "istio"}
    scaled(service["rayClusterConfig"])
    service["upgradeStrategy"] = {
        "type": "NewClusterWithIncrementalUpgrade",
        "clusterUpgradeOptions": {**right, **options},
    }


SERVICE_RULES: list[tuple[Change, str]] = [
    (lambda s: s.pop("rayClusterConfig"), "rayClusterConfig"),
    (lambda s: s.update(rayClusterDeletionDelaySeconds=-1), "rayClusterDeletionDelaySeconds"),
    (lambda s: s.update(serveConfigV2="a: ["), "serveConfigV2"),
    (lambda s: s.update(serveConfigV2="applications: []"), "serveConfigV2"),
    (lambda s: s.update(serveConfigV2="applications: [{name: a}]"), "serveConfigV2.applications[0].import_path"),
    (lambda s: s["rayClusterConfig"].update(upgradeStrategy={"type": "None"}), "upgradeStrategy"),
    (
        lambda s: s["rayClusterConfig"].update(authOptions={"mode": "token", "enableK8sTokenAuth": True}),
        "authOptions.enableK8sTokenAuth",
    ),
    (
        lambda s: head(s["rayClusterConfig"]).update(headService={"metadata": {"name": "a"}}),
        "headService.metadata.name",
    ),
    (lambda s: s.update(upgradeStrategy={"type": "Rolling"}), "upgradeStrategy.type"),
    (lambda s: upgraded(s) or s["rayClusterConfig"].update(enableInTreeAutoscaling=False), "enableInTreeAutoscaling"),
    (lambda s: upgraded(s) or s["upgradeStrategy"].pop("clusterUpgradeOptions"), "clusterUpgradeOptions"),
    (lambda s: upgraded(s, maxSurgePercent=101), "maxSurgePercent"),
    (lambda s: upgraded(s, stepSizePercent=51), "stepSizePercent"),
    (lambda s: upgraded(s, intervalSeconds=0), "intervalSeconds"),
    (lambda s: upgraded(s, gatewayClassName=""), "gatewayClassName"),
    (lambda s: s.update(managedBy="me"), "managedBy"),
]


@pytest.mark.parametrize(("change", "field"), SERVICE_RULES)
def test_rules_of_services(change: Change, field: str) -> None:
    assert list(service_findings(SERVICE)) == []
    document: dict[str, Any] = fresh(SERVICE)
    change(document["spec"])
    (finding,) = service_findings(document)
    assert field_text(finding[0]).endswith(field)


@pytest.mark.parametrize(
    ("timeout", "right"), [("30m", True), ("1h30m", True), ("600", True), ("0", False), ("0s", False), ("soon", False)]
)
def test_the_timeout_of_a_service(timeout: str, right: bool) -> None:
    annotated = {"name": "a", "annotations": {"ray.io/initializing-timeout": timeout}}
    assert (list(service_findings({**SERVICE, "metadata": annotated})) == []) is right


def test_an_incremental_upgrade_that_is_right() -> None:
    document: dict[str, Any] = fresh(SERVICE)
    upgraded(document["spec"])
    assert list(service_findings(document)) == []


def test_what_the_operator_adds_must_be_restricted_too() -> None:
    assert list(restricted_findings(JOB)) == []
    job: dict[str, Any] = fresh(JOB)
    del job["spec"]["submitterPodTemplate"]
    assert [field_text(path) for path, _ in restricted_findings(job)] == ["spec.submitterPodTemplate"]
    job["spec"]["submissionMode"] = "SidecarMode"
    assert [field_text(path) for path, _ in restricted_findings(job)] == ["spec.submissionMode"]
    job["spec"]["submissionMode"] = "HTTPMode"
    assert list(restricted_findings(job)) == []

    cluster: dict[str, Any] = fresh(CLUSTER)
    scaled(cluster["spec"])
    found = [field_text(path) for path, _ in restricted_findings(cluster)]
    assert found
    assert all(field.startswith("spec.autoscalerOptions.securityContext") for field in found)
