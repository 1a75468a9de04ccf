"""Rules that KubeRay's operator enforces and its CRD does not, for jobs; see kuberay_rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from cat_cluster.cluster.kuberay.rules import (
    cluster_spec_findings,
    has_autoscaler,
    manager_findings,
    name_findings,
    never_restarts,
    owned_findings,
)
from cat_cluster.cluster.kuberay.schemas import Finding, Path_

Json = Mapping[str, Any]

MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
_CLUSTER_POLICIES = ("DeleteCluster", "DeleteWorkers")
_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")  # a later one may not come before an earlier one
_STRATEGY: Path_ = ("spec", "deletionStrategy")


def job_findings(document: Json) -> Iterator[Finding]:
    """Yield what the operator refuses of a RayJob."""
    spec = document["spec"]
    yield from name_findings(document)
    yield from manager_findings(("spec",), spec)
    yield from _ending_findings(spec)
    yield from _strategy_findings(spec)
    yield from _place_findings(spec)
    yield from _mode_findings(spec)
    cluster = spec.get("rayClusterSpec")
    if cluster is not None:
        path = ("spec", "rayClusterSpec")
        yield from owned_findings(path, cluster, "RayJob")
        yield from cluster_spec_findings(path, cluster, document["metadata"].get("annotations") or {})
    yield from _number_findings(spec)


def _ending_findings(spec: Json) -> Iterator[Finding]:
    ends, ttl = bool(spec.get("shutdownAfterJobFinishes")), spec.get("ttlSecondsAfterFinished", 0)
    if spec.get("suspend") and not ends:
        yield ("spec", "suspend"), "needs shutdownAfterJobFinishes: true"
    if ttl < 0:
        yield ("spec", "ttlSecondsAfterFinished"), "must not be negative"
    if ttl > 0 and not ends:
        yield ("spec", "ttlSecondsAfterFinished"), "needs shutdownAfterJobFinishes: true"


def _strategy_findings(spec: Json) -> Iterator[Finding]:
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    rules, legacy = strategy.get("deletionRules"), [name for name in ("onSuccess", "onFailure") if strategy.get(name)]
    if rules and spec.get("shutdownAfterJobFinishes"):
        yield (*_STRATEGY, "deletionRules"), "cannot be used with shutdownAfterJobFinishes: keep one of them"
    if rules and legacy:
        yield (*_STRATEGY, legacy[0]), "cannot be used with deletionRules: leave it out"
    elif rules:
        yield from _rules_findings(spec, rules)
    elif len(legacy) == 2:
        yield from _legacy_findings(spec, strategy)
    else:
        yield _STRATEGY, "must hold deletionRules, or both onSuccess and onFailure"


def _rules_findings(spec: Json, rules: Sequence[Json]) -> Iterator[Finding]:
    seconds: dict[tuple[str, str], dict[str, int]] = {}
    for index, rule in enumerate(rules):
        place, policy = (*_STRATEGY, "deletionRules", index), rule["policy"]
        names = [name for name in ("jobStatus", "jobDeploymentStatus") if rule["condition"].get(name) is not None]
        if len(names) != 1:
            yield (*place, "condition"), "must hold one of jobStatus and jobDeploymentStatus"
            continue
        yield from _policy_findings((*place, "policy"), spec, policy)
        given = seconds.setdefault((names[0], rule["condition"][names[0]]), {})
        if policy in given:
            yield place, f"is the second {policy} for {names[0]} {rule['condition'][names[0]]}: keep one of them"
        given[policy] = rule["condition"].get("ttlSeconds", 0)
    for (name, value), given in seconds.items():
        times = [given[policy] for policy in _ORDER if policy in given]
        if times != sorted(times):
            yield (
                (*_STRATEGY, "deletionRules"),
                f"for {name} {value} the ttlSeconds must rise in the order {', '.join(_ORDER)}",
            )


def _policy_findings(place: Path_, spec: Json, policy: str | None) -> Iterator[Finding]:
    if spec.get("clusterSelector") and policy in _CLUSTER_POLICIES:
        yield place, f"{policy} does not go with clusterSelector: the cluster is not the job's own"
    elif policy == "DeleteWorkers" and has_autoscaler(spec.get("rayClusterSpec")):
        yield place, "DeleteWorkers does not go with enableInTreeAutoscaling: use DeleteCluster"


def _legacy_findings(spec: Json, strategy: Json) -> Iterator[Finding]:
    for name in ("onSuccess", "onFailure"):
        policy, place = strategy[name].get("policy"), (*_STRATEGY, name, "policy")
        if policy is None:
            yield place, "is missing"
        yield from _policy_findings(place, spec, policy)
        if policy == "DeleteNone" and spec.get("shutdownAfterJobFinishes"):
            yield place, "DeleteNone contradicts shutdownAfterJobFinishes: keep one of them"


def _place_findings(spec: Json) -> Iterator[Finding]:
    """Where the job runs: on a cluster of its own, or on one that is there."""
    selector = spec.get("clusterSelector")
    if not selector:
        if spec.get("rayClusterSpec") is None:
            yield ("spec", "rayClusterSpec"), "is missing: give it, or a clusterSelector"
        return
    place = ("spec", "clusterSelector")
    if not selector.get("ray.io/cluster"):
        yield (*place, "ray.io/cluster"), "is missing: it names the cluster"
    if spec.get("suspend"):
        yield ("spec", "suspend"), "does not go with clusterSelector"
    if spec.get("submissionMode") == "SidecarMode":
        yield place, "does not go with SidecarMode"
    if spec.get("backoffLimit", 0) > 0:
        yield ("spec", "backoffLimit"), "does not go with clusterSelector: each retry is a new cluster"


def _mode_findings(spec: Json) -> Iterator[Finding]:
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode not in MODES:  # the CRD takes any text
        yield ("spec", "submissionMode"), f"{mode!r} is not one of {', '.join(MODES)}"
    if mode == "InteractiveMode":
        if spec.get("backoffLimit", 0) > 0:
            yield ("spec", "backoffLimit"), "does not go with InteractiveMode"
    elif not str(spec.get("entrypoint", "")).strip():
        yield ("spec", "entrypoint"), "is missing: the command of the job, such as python -m jobs.train SPEC"
    if mode == "SidecarMode":
        for name in ("submitterPodTemplate", "submitterConfig"):
            if spec.get(name) is not None:
                yield ("spec", name), "does not go with SidecarMode"
        cluster = spec.get("rayClusterSpec")
        if cluster is not None:
            pod = ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec")
            yield from never_restarts(pod, cluster["headGroupSpec"], "in SidecarMode")


def _number_findings(spec: Json) -> Iterator[Finding]:
    for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(name, 1) <= 0:
            yield ("spec", name), "must be more than 0"
    if spec.get("backoffLimit", 0) < 0:
        yield ("spec", "backoffLimit"), "must not be negative"
    try:
        environment = yaml.safe_load(spec.get("runtimeEnvYAML", ""))
    except yaml.YAMLError as error:
        yield ("spec", "runtimeEnvYAML"), f"is not YAML: {' '.join(str(error).split())}"
        return
    if environment is not None and not isinstance(environment, dict):
        yield ("spec", "runtimeEnvYAML"), "must be a mapping, such as env_vars and pip"
