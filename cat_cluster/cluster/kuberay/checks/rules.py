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

from cat_cluster.cluster.kuberay.checks.gates import DEFAULT_GATES, gate_findings, needs_gate
from cat_cluster.cluster.kuberay.checks.schedules import schedule_problem
from cat_cluster.cluster.kuberay.checks.silent_rules import GENERATED, group_findings, job_findings, manager_findings
from cat_cluster.cluster.kuberay.checks.validation import FieldPath, Finding
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
_RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
_TOKEN_AUTH_SINCE = (2, 52)
# Of a head that keeps its GCS in RocksDB.
_GCS_VOLUME, _GCS_FOLDER = "gcs-storage", "/data/gcs"
_GCS_VARIABLES = ("RAY_gcs_storage", "RAY_gcs_storage_path")
_OWN_VOLUME = ("size", "storageClassName", "accessModes")
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
        yield from _cluster_findings(path, cluster or {}, document)
    if kind != "RayCluster" and at(cluster, ("upgradeStrategy", "type")):
        yield (*path, "upgradeStrategy"), f"is for a RayCluster of its own, not for that of a {kind}; leave it out"


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


def at(document: Any, path: FieldPath) -> Any:
    """Return the value at a path, None when there is none."""
    for part in path:
        if isinstance(document, list) and isinstance(part, int):
            document = document[part]
        else:
            document = document.get(part) if isinstance(document, dict) else None
    return document


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
    config = _yaml(spec.get("serveConfigV2", ""))
    if not isinstance(config, dict) or not config.get("applications"):
        yield ("spec", "serveConfigV2"), "must be YAML of a Serve config with applications, such as serve/config.yaml"


def _cluster_findings(path: FieldPath, spec: Json, document: Json) -> Iterator[Finding]:
    head: FieldPath = (*path, "headGroupSpec")
    groups = [(head, spec.get("headGroupSpec", {}))]
    for index, group in enumerate(spec.get("workerGroupSpecs", ())):
        groups.append(((*path, "workerGroupSpecs", index), group))
        yield from group_findings(groups[-1][0], group, document["kind"], full_name(document["metadata"]))
        least, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
        if not 0 <= least <= most:
            yield (*groups[-1][0], "minReplicas"), f"{least} must be from 0 to maxReplicas, which is {most}"
    is_v2 = spec.get("enableInTreeAutoscaling") and at(spec, ("autoscalerOptions", "version")) == "v2"
    for place, group in groups:
        pod, params = at(group, ("template", "spec")) or {}, group.get("rayStartParams", {})
        if not pod.get("containers"):
            yield (*place, "template", "spec", "containers"), "must hold a container, Ray's first"
        if group.get("resources") and any(params.get(name) for name in _RESOURCE_PARAMS):
            yield (*place, "resources"), "is given here and in rayStartParams: keep one of them"
        # A container that restarts in its pod would be a Ray node that nobody knows.
        if is_v2 and pod.get("restartPolicy", "Never") != "Never":
            yield (*place, "template", "spec", "restartPolicy"), "must be Never or left out with autoscaler v2"
    if (at(spec, ("autoscalerOptions", "idleTimeoutSeconds")) or 0) < 0:
        yield (*path, "autoscalerOptions", "idleTimeoutSeconds"), "must be 0 or more"
    yield from _fault_tolerance_findings(head, spec, at(document, ("metadata", "annotations")) or {})
    yield from _gcs_storage_findings(path, spec)
    version = re.match(r"\s*v?(\d+)\.(\d+)", spec.get("rayVersion", ""))
    is_known = version is not None and tuple(map(int, version.groups())) >= _TOKEN_AUTH_SINCE
    if at(spec, ("authOptions", "mode")) == "token" and not is_known:
        yield (*path, "rayVersion"), "must be 2.52.0 or later, in numbers, with authOptions.mode token"


def _fault_tolerance_findings(head: FieldPath, spec: Json, annotations: Mapping[str, str]) -> Iterator[Finding]:
    containers = at(spec, ("headGroupSpec", "template", "spec", "containers")) or []
    names = {entry["name"] for container in containers[:1] for entry in container.get("env", ())}
    place = (*head, "template", "spec", "containers", 0, "env")
    if "gcsFaultToleranceOptions" not in spec:
        if "RAY_REDIS_ADDRESS" in names and annotations.get("ray.io/ft-enabled", "").lower() != "true":
            yield place, "RAY_REDIS_ADDRESS needs gcsFaultToleranceOptions: set its redisAddress instead"
        return
    if annotations.get("ray.io/ft-enabled"):
        yield ("metadata", "annotations", "ray.io/ft-enabled"), "leave it out beside gcsFaultToleranceOptions"
    for name, field in (("REDIS_PASSWORD", "redisPassword"), ("RAY_REDIS_ADDRESS", "redisAddress")):
        if name in names:
            yield place, f"{name} is the operator's to set: use gcsFaultToleranceOptions.{field}"


def _gcs_storage_findings(path: FieldPath, spec: Json) -> Iterator[Finding]:
    """Redis and RocksDB each have fields of their own, and the operator itself mounts the volume of RocksDB."""
    options, place = spec.get("gcsFaultToleranceOptions") or {}, (*path, "gcsFaultToleranceOptions")
    storage = options.get("storage") or {}
    if options.get("backend") != "rocksdb":
        if "storage" in options:
            yield (*place, "storage"), "is for backend: rocksdb alone"
        return
    for name in ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"):
        if options.get(name):
            yield (*place, name), "cannot be used with backend: rocksdb; leave it out"
    if storage.get("claimName") and any(storage.get(name) for name in _OWN_VOLUME):
        yield (*place, "storage", "claimName"), f"cannot be used with {', '.join(_OWN_VOLUME)}: keep one of them"
    pod: FieldPath = (*path, "headGroupSpec", "template", "spec")
    for container in (at(spec, (*pod[len(path) :], "containers")) or [])[:1]:
        for entry in container.get("env", ()):
            if entry["name"] in _GCS_VARIABLES:
                yield (*pod, "containers", 0, "env"), f"{entry['name']} is the operator's to set; leave it out"
        for mount in container.get("volumeMounts", ()):
            if mount["name"] == _GCS_VOLUME or mount["mountPath"] == _GCS_FOLDER:
                yield (*pod, "containers", 0, "volumeMounts"), f"{_GCS_FOLDER} is the operator's to mount; leave it out"
    if any(volume["name"] == _GCS_VOLUME for volume in at(spec, (*pod[len(path) :], "volumes")) or ()):
        yield (*pod, "volumes"), f"{_GCS_VOLUME} is the operator's name; give the volume another"


def _yaml(text: str) -> Any:
    """Return what a text of YAML holds; the text itself when it is none."""
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text
