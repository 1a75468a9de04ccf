"""What KubeRay's operator refuses of the manifests here, and its CRDs let pass.

The API server takes such an object, and the operator never makes a pod of it. Of the rules in the operator's
validation.go (v1.7.0) these are the ones that an edit of k8s/ or of a rendered job can break; tests hold them against
what a real operator said.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from typing import Any

import yaml

from cat_cluster.cluster.kuberay.checks.cluster_rules import cluster_findings
from cat_cluster.cluster.kuberay.checks.gates import DEFAULT_GATES, gate_findings, needs_gate
from cat_cluster.cluster.kuberay.checks.schedules import schedule_problem
from cat_cluster.cluster.kuberay.checks.silent_rules import GENERATED, group_findings, job_findings, manager_findings
from cat_cluster.cluster.kuberay.checks.validation import FieldPath, Finding, at
from cat_cluster.errors import SpecError
from cat_cluster.spec.yaml_bounds import load_yaml

Json = Mapping[str, Any]

MAX_NAME_LENGTH = {"RayCluster": 53, "RayCronJob": 36, "RayJob": 47, "RayService": 47}
# Where a kind keeps the spec of its cluster.
CLUSTERS: Mapping[str, FieldPath] = {
    "RayCluster": ("spec",),
    "RayJob": ("spec", "rayClusterSpec"),
    "RayService": ("spec", "rayClusterConfig"),
}
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_MINIMA = {
    "activeDeadlineSeconds": 1,
    "backoffLimit": 0,
    "rayClusterDeletionDelaySeconds": 0,
    "ttlSecondsAfterFinished": 0,
}
_JOB_TEMPLATE: FieldPath = ("spec", "jobTemplate")
_MAX_PREFIX = 58  # of a generated name
_UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
_DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")  # a later one may not come before an earlier one
_DELETION_RULES: FieldPath = ("spec", "deletionStrategy", "deletionRules")


def operator_findings(document: Json, gates: Set[str] = DEFAULT_GATES) -> Iterator[Finding]:
    """Yield what the operator refuses of one of KubeRay's objects whose schema is right. gates: those that are on."""
    kind, spec = document["kind"], document.get("spec", {})
    yield from _name_findings(document)
    if kind == "RayCronJob":
        if kind not in gates:  # nobody looks at it
            yield ("kind",), needs_gate(kind)
        if problem := schedule_problem(str(spec.get("schedule", ""))):
            yield ("spec", "schedule"), problem
        yield from in_job_template(operator_findings(job_of(document), gates))
        return
    for name, least in _MINIMA.items():
        if spec.get(name, least) < least:
            yield ("spec", name), f"must be {least} or more"
    if kind == "RayJob":
        yield from _job_findings(spec)
    if kind == "RayService":
        yield from _service_findings(spec)
    path = CLUSTERS[kind]
    cluster = at(document, path)
    yield from gate_findings(document, path, cluster or {}, gates)
    yield from manager_findings({("spec",): spec, path: cluster})
    if kind != "RayJob" or cluster:
        yield from cluster_findings(path, cluster or {}, at(document, ("metadata", "annotations")) or {})
        for index, group in enumerate((cluster or {}).get("workerGroupSpecs", ())):
            place = (*path, "workerGroupSpecs", index)
            yield from group_findings(place, group, kind, full_name(document["metadata"]))
    if kind != "RayCluster":
        yield from _inner_cluster_findings(path, cluster or {}, kind)


def job_of(cron_job: Json) -> Json:
    """Return a RayJob of a RayCronJob, by a name that fits."""
    return {"kind": "RayJob", "metadata": {"name": "generated"}, "spec": at(cron_job, _JOB_TEMPLATE) or {}}


def in_job_template(findings: Iterator[Finding]) -> Iterator[Finding]:
    """Yield findings of `job_of` at their places in the RayCronJob."""
    for path, message in findings:
        yield (*_JOB_TEMPLATE, *path[1:]), message


def full_name(metadata: Json) -> str:
    """Return the name of an object, or one that Kubernetes may make of generateName."""
    name = metadata.get("name") or f"{metadata.get('generateName', '')[:_MAX_PREFIX]}{'x' * GENERATED}"
    return str(name)


def check_namespace(name: str) -> None:
    """Raise SpecError for what cannot be the name of a namespace."""
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name):
        raise SpecError(
            f"--namespace {name!r}: must hold a-z, 0-9 and -, begin and end with a letter or digit, 63 at most"
        )


def _name_findings(document: Json) -> Iterator[Finding]:
    """A name becomes part of the names of pods and services, which leaves it less room than Kubernetes does."""
    name, most = full_name(document["metadata"]), MAX_NAME_LENGTH[document["kind"]]
    field = "name" if document["metadata"].get("name") else "generateName"
    if len(name) > most:
        yield ("metadata", field), f"has {len(name)} characters; {document['kind']} may have {most}: shorten it"
    if not _DNS_1035.fullmatch(name):
        yield ("metadata", field), f"{name!r} must begin with a letter and hold a-z, 0-9 and - alone"


def _job_findings(spec: Json) -> Iterator[Finding]:
    yield from job_findings(spec)
    if spec.get("submissionMode") == "InteractiveMode" and spec.get("backoffLimit"):
        yield ("spec", "backoffLimit"), "cannot be used with InteractiveMode: leave it out"
    ends = spec.get("shutdownAfterJobFinishes")
    for name in ("suspend", "ttlSecondsAfterFinished"):
        if spec.get(name) and not ends:
            yield ("spec", name), "needs shutdownAfterJobFinishes: true"
    if ends and at(spec, _DELETION_RULES[1:]):
        yield _DELETION_RULES, "cannot be used with shutdownAfterJobFinishes: keep one of them"
    yield from _deletion_findings(spec)
    selector = spec.get("clusterSelector")
    if selector:
        if not selector.get("ray.io/cluster"):
            yield ("spec", "clusterSelector", "ray.io/cluster"), "is missing: it names the cluster"
        for name in ("suspend", "backoffLimit"):
            if spec.get(name):
                yield ("spec", name), "cannot be used with clusterSelector: the cluster is not the job's own"
    elif "rayClusterSpec" not in spec:
        yield ("spec", "rayClusterSpec"), "is missing: give it, or a clusterSelector"
    environment = _yaml(spec.get("runtimeEnvYAML", ""))
    if environment is not None and not isinstance(environment, dict):
        yield ("spec", "runtimeEnvYAML"), "must be YAML of a mapping, such as env_vars and pip"


def _deletion_findings(spec: Json) -> Iterator[Finding]:
    if at(spec, ("deletionStrategy",)) == {}:
        yield _DELETION_RULES, "is missing: give rules, or leave deletionStrategy out"
    seconds: dict[tuple[str, str], dict[str, int]] = {}
    for index, rule in enumerate(at(spec, _DELETION_RULES[1:]) or ()):
        place, policy, condition = (*_DELETION_RULES, index), rule["policy"], rule["condition"]
        states = [(name, condition[name]) for name in ("jobStatus", "jobDeploymentStatus") if name in condition]
        if len(states) != 1:
            yield (*place, "condition"), "must hold one of jobStatus and jobDeploymentStatus"
            continue
        if policy in ("DeleteCluster", "DeleteWorkers") and spec.get("clusterSelector"):
            yield (
                (*place, "policy"),
                f"{policy} cannot be used with clusterSelector: the cluster is not the job's own",
            )
        if policy == "DeleteWorkers" and at(spec, ("rayClusterSpec", "enableInTreeAutoscaling")):
            yield (*place, "policy"), "DeleteWorkers cannot be used with enableInTreeAutoscaling: use DeleteCluster"
        given = seconds.setdefault(states[0], {})
        if policy in given:
            yield place, f"is the second {policy} for {' '.join(states[0])}: keep one of them"
        given[policy] = condition.get("ttlSeconds", 0)
    for state, given in seconds.items():
        times = [given[policy] for policy in _DELETION_ORDER if policy in given]
        if times != sorted(times):
            yield (
                _DELETION_RULES,
                f"for {' '.join(state)} ttlSeconds must rise in the order {', '.join(_DELETION_ORDER)}",
            )


def _service_findings(spec: Json) -> Iterator[Finding]:
    """The operator hands serveConfigV2 to Ray Serve as it is: what Serve refuses shows in no status of the service."""
    kind = at(spec, ("upgradeStrategy", "type"))
    if kind is not None and kind not in _UPGRADES:
        yield ("spec", "upgradeStrategy", "type"), f"{kind!r} is not one of {', '.join(_UPGRADES)}"
    if kind == "NewClusterWithIncrementalUpgrade":
        yield from _incremental_findings(spec)
    config = _yaml(spec.get("serveConfigV2", ""))
    if not isinstance(config, dict) or not config.get("applications"):
        yield ("spec", "serveConfigV2"), "must be YAML of a Serve config with applications, such as serve/config.yaml"


def _inner_cluster_findings(path: FieldPath, cluster: Json, kind: str) -> Iterator[Finding]:
    """Yield what a cluster inside a RayJob or RayService may not have, and one of its own may."""
    for field, remedy in (
        (("upgradeStrategy", "type"), "leave it out"),
        (("authOptions", "enableK8sTokenAuth"), "give secretName instead"),
    ):
        if at(cluster, field):
            yield (*path, *field), f"is for a RayCluster of its own, not for that of a {kind}; {remedy}"


def _incremental_findings(spec: Json) -> Iterator[Finding]:
    """An upgrade that moves users step by step: a Gateway divides them, and the autoscaler makes room."""
    if not at(spec, ("rayClusterConfig", "enableInTreeAutoscaling")):
        yield ("spec", "rayClusterConfig", "enableInTreeAutoscaling"), "must be true for an incremental upgrade"
    place: FieldPath = ("spec", "upgradeStrategy", "clusterUpgradeOptions")
    options = at(spec, place[1:])
    if options is None:
        yield place, "is missing, and an incremental upgrade needs it"
        return
    most, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent", -1)
    if not 0 <= most <= 100:
        yield (*place, "maxSurgePercent"), f"must be from 0 to 100, got {most}"
    if not 0 <= step <= most:
        yield (*place, "stepSizePercent"), f"must be given, from 0 to maxSurgePercent, which is {most}"
    if options.get("intervalSeconds", 0) <= 0:
        yield (*place, "intervalSeconds"), "must be given, 1 or more"
    if not options.get("gatewayClassName"):
        yield (*place, "gatewayClassName"), "is missing, and an incremental upgrade needs it"


def _yaml(text: str) -> Any:
    """Return what a text of YAML holds; the text itself when it is none."""
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text
