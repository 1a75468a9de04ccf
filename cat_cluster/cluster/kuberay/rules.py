"""Rules that KubeRay's operator enforces and its CRDs do not, for clusters and services.

Ported from ray-operator/controllers/ray/utils/validation.go at v1.7.0, with its feature gates as they are by default.
A manifest that breaks one is accepted by the API server and then never reconciled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from cat_cluster.cluster.kuberay.schemas import Finding, Path_

Json = Mapping[str, Any]

MOST_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_LABEL_PREFIX = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_DURATION = re.compile(r"(\d+(\.\d*)?(ns|us|µs|ms|s|m|h))+")
_RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
_AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"
# Fields behind a feature gate that is off in 1.7: the operator refuses the whole object.
_GATED = {
    "networkPolicy": "RayClusterNetworkPolicy is off: write NetworkPolicy objects of your own",
    "tlsOptions": "RayClusterMTLS is off",
    "historyServerOptions": "RayClusterHistoryServer is off",
}
_MANAGERS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")


def cluster_findings(document: Json) -> Iterator[Finding]:
    """Yield what the operator refuses of a RayCluster."""
    yield from name_findings(document)
    yield from cluster_spec_findings(("spec",), document["spec"], _annotations(document))
    yield from manager_findings(("spec",), document["spec"])


def service_findings(document: Json) -> Iterator[Finding]:
    """Yield what the operator refuses of a RayService, or would hand to Ray Serve in vain."""
    yield from name_findings(document)
    spec, annotations = document["spec"], _annotations(document)
    yield from manager_findings(("spec",), spec)
    timeout = annotations.get("ray.io/initializing-timeout", "")
    if timeout and not ((_DURATION.fullmatch(timeout) or timeout.isdecimal()) and re.search(r"[1-9]", timeout)):
        place = ("metadata", "annotations", "ray.io/initializing-timeout")
        yield place, f"{timeout!r} must be a duration above 0, such as 30m, or a number of seconds"
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield ("spec", "rayClusterDeletionDelaySeconds"), "must not be negative"
    yield from _serve_findings(spec.get("serveConfigV2", ""))
    cluster = spec.get("rayClusterConfig")
    if not cluster:
        yield ("spec", "rayClusterConfig"), "is missing: a RayService needs the cluster it runs on"
        return
    path = ("spec", "rayClusterConfig")
    yield from cluster_spec_findings(path, cluster, annotations)
    yield from owned_findings(path, cluster, "RayService")
    service = cluster["headGroupSpec"].get("headService") or {}
    if (service.get("metadata") or {}).get("name"):
        yield (*path, "headGroupSpec", "headService", "metadata", "name"), "must be left out: the operator names it"
    yield from _upgrade_findings(spec, cluster)


def name_findings(document: Json) -> Iterator[Finding]:
    """A name becomes part of the names of pods and services, which leaves it less room than Kubernetes does."""
    name, most = document["metadata"]["name"], MOST_NAME[document["kind"]]
    if len(name) > most:
        yield ("metadata", "name"), f"has {len(name)} characters; {document['kind']} may have {most}: shorten it"
    if not _DNS_1035.fullmatch(name):
        yield ("metadata", "name"), f"{name!r} must begin with a letter and hold a-z, 0-9 and - alone"


def manager_findings(path: Path_, spec: Json) -> Iterator[Finding]:
    """A rule of the CRD in CEL, which no JSON schema holds."""
    manager = spec.get("managedBy")
    if manager is not None and manager not in _MANAGERS:
        yield (*path, "managedBy"), f"{manager!r} is not one of {', '.join(_MANAGERS)}"


def owned_findings(path: Path_, cluster: Json, owner: str) -> Iterator[Finding]:
    """What a cluster inside a RayJob or RayService may not have."""
    if (cluster.get("authOptions") or {}).get("enableK8sTokenAuth"):
        yield (*path, "authOptions", "enableK8sTokenAuth"), f"does not work in a {owner}: use secretName"
    if (cluster.get("upgradeStrategy") or {}).get("type"):
        yield (*path, "upgradeStrategy"), f"may be set for a RayCluster of its own alone, not in a {owner}"


def cluster_spec_findings(path: Path_, spec: Json, annotations: Mapping[str, str]) -> Iterator[Finding]:
    """Yield what the operator refuses of the spec of a cluster, wherever that is."""
    head = (*path, "headGroupSpec")
    if not spec["headGroupSpec"]["template"].get("spec", {}).get("containers"):
        yield (*head, "template", "spec", "containers"), "must hold a container, Ray's first"
        return
    for field, gate in _GATED.items():
        if spec.get(field) is not None:
            yield (*path, field), f"the operator refuses it while its feature gate {gate}; leave it out"
    yield from _group_findings(head, spec["headGroupSpec"])
    for index, group in enumerate(spec.get("workerGroupSpecs") or ()):
        yield from _worker_findings((*path, "workerGroupSpecs", index), group, spec)
    yield from _fault_tolerance_findings(path, spec, annotations)
    yield from _autoscaler_findings(path, spec)
    yield from _auth_findings(path, spec)


def has_autoscaler(spec: Json | None) -> bool:
    """Whether a cluster scales by itself."""
    return bool(spec and spec.get("enableInTreeAutoscaling"))


def ray_version(spec: Json) -> tuple[int, ...] | None:
    """Return spec.rayVersion as numbers, None when it is missing or is no version."""
    found = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", str(spec.get("rayVersion", "")))
    return tuple(int(part or 0) for part in found.groups()) if found else None


def _annotations(document: Json) -> Mapping[str, str]:
    return document["metadata"].get("annotations") or {}


def _ray_container(group: Json) -> Json:
    container: Json = group["template"]["spec"]["containers"][0]
    return container


def _env(container: Json) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in container.get("env") or ()}


def _group_findings(path: Path_, group: Json) -> Iterator[Finding]:
    params = group.get("rayStartParams") or {}
    given = [name for name in _RESOURCE_PARAMS if params.get(name)]
    if given and group.get("resources"):
        yield (*path, "rayStartParams", given[0]), "resources are given here and in `resources`: keep one of them"
    if "labels" in params:
        yield (*path, "rayStartParams", "labels"), "is not supported: use the group's `labels`"
    for key, value in (group.get("labels") or {}).items():
        prefix, slash, name = key.rpartition("/")
        if not _LABEL_NAME.fullmatch(name) or (slash and not _LABEL_PREFIX.fullmatch(prefix)):
            yield (*path, "labels", key), "is no label key: [prefix/]name of letters, digits, -, _ and ."
        if value and not _LABEL_NAME.fullmatch(value):
            yield (*path, "labels", key), f"{value!r} is no label value: letters, digits, -, _ and ., 63 at most"


def _worker_findings(path: Path_, group: Json, spec: Json) -> Iterator[Finding]:
    if not group["template"].get("spec", {}).get("containers"):
        yield (*path, "template", "spec", "containers"), "must hold a container, Ray's first"
        return
    yield from _size_findings(path, group, spec)
    yield from _group_findings(path, group)
    if group.get("suspend") and has_autoscaler(spec):
        yield (*path, "suspend"), "a group cannot be suspended with enableInTreeAutoscaling: set its replicas instead"
    idle = group.get("idleTimeoutSeconds")
    if idle is not None and idle < 0:
        yield (*path, "idleTimeoutSeconds"), "must not be negative"
    elif idle is not None and not _is_v2(spec):
        yield (*path, "idleTimeoutSeconds"), "needs autoscalerOptions.version: v2"
    if group.get("priority"):
        if (ray_version(spec) or (0,)) < (2, 56):
            yield (*path, "priority"), "needs rayVersion 2.56.0 or later in the cluster's spec"
        elif not _is_v2(spec):
            yield (*path, "priority"), "needs autoscalerOptions.version: v2"


def _size_findings(path: Path_, group: Json, spec: Json) -> Iterator[Finding]:
    least, most = group.get("minReplicas"), group.get("maxReplicas")
    for name, count in (("minReplicas", least), ("maxReplicas", most)):
        if count is None and not has_autoscaler(spec):
            yield (*path, name), "must be set while enableInTreeAutoscaling is off"
        if count is not None and count < 0:
            yield (*path, name), "must not be negative"
    if least is not None and most is not None and least > most:
        yield (*path, "minReplicas"), f"{least} is more than maxReplicas, which is {most}"


def _is_v2(spec: Json) -> bool:
    by_environment = _env(_ray_container(spec["headGroupSpec"])).get(_AUTOSCALER_V2) in ("1", "true")
    return (spec.get("autoscalerOptions") or {}).get("version") == "v2" or by_environment


def _fault_tolerance_findings(path: Path_, spec: Json, annotations: Mapping[str, str]) -> Iterator[Finding]:
    options, head = spec.get("gcsFaultToleranceOptions"), (*path, "headGroupSpec")
    params = spec["headGroupSpec"].get("rayStartParams") or {}
    env = _env(_ray_container(spec["headGroupSpec"]))
    env_place = (*head, "template", "spec", "containers", 0, "env")
    if params.get("redis-username") or "REDIS_USERNAME" in env:
        yield (*head, "rayStartParams"), "no redis username here or in env: use gcsFaultToleranceOptions.redisUsername"
    if options is None:
        if "RAY_REDIS_ADDRESS" in env and annotations.get("ray.io/ft-enabled", "").lower() != "true":
            yield env_place, "RAY_REDIS_ADDRESS needs gcsFaultToleranceOptions: set its redisAddress instead"
        return
    if annotations.get("ray.io/ft-enabled"):
        yield ("metadata", "annotations", "ray.io/ft-enabled"), "leave it out beside gcsFaultToleranceOptions"
    if annotations.get("ray.io/external-storage-namespace"):
        place = ("metadata", "annotations", "ray.io/external-storage-namespace")
        yield place, "use gcsFaultToleranceOptions.externalStorageNamespace instead"
    if params.get("redis-password"):
        yield (*head, "rayStartParams", "redis-password"), "use gcsFaultToleranceOptions.redisPassword instead"
    for name, field in (("REDIS_PASSWORD", "redisPassword"), ("RAY_REDIS_ADDRESS", "redisAddress")):
        if name in env:
            yield env_place, f"{name} is the operator's to set: use gcsFaultToleranceOptions.{field}"
    own = (*path, "gcsFaultToleranceOptions")
    if options.get("backend", "redis") == "rocksdb":
        gate = "GCSFaultToleranceEmbeddedStorage"
        yield (*own, "backend"), f"rocksdb is refused while the feature gate {gate} is off: use redis"
    elif options.get("storage") is not None:
        yield (*own, "storage"), "is of the rocksdb backend alone; leave it out"


def _autoscaler_findings(path: Path_, spec: Json) -> Iterator[Finding]:
    options, env = spec.get("autoscalerOptions") or {}, _env(_ray_container(spec["headGroupSpec"]))
    head = (*path, "headGroupSpec", "template", "spec")
    place = (*path, "autoscalerOptions")
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield (*place, "idleTimeoutSeconds"), "must not be negative"
    if "KUBERAY_GEN_AUTOSCALER_START_CMD" in _env(options):
        yield (*place, "env"), "KUBERAY_GEN_AUTOSCALER_START_CMD is the operator's to set; leave it out"
    if not has_autoscaler(spec):
        if env.get(_AUTOSCALER_V2) in ("1", "true"):
            yield (*head, "containers", 0, "env"), f"{_AUTOSCALER_V2} needs enableInTreeAutoscaling: true"
        return
    if options.get("version") and _AUTOSCALER_V2 in env:
        yield (*head, "containers", 0, "env"), f"leave {_AUTOSCALER_V2} out beside autoscalerOptions.version"
    if options.get("version") == "v2":
        pods = [(head, spec["headGroupSpec"])]
        for index, group in enumerate(spec.get("workerGroupSpecs") or ()):
            pods.append(((*path, "workerGroupSpecs", index, "template", "spec"), group))
        for pod, group in pods:
            yield from never_restarts(pod, group, "with autoscaler v2")


def never_restarts(pod: Path_, group: Json, when: str) -> Iterator[Finding]:
    """A container that restarts in its pod would be a Ray node that nobody knows."""
    if (group["template"].get("spec") or {}).get("restartPolicy", "Never") != "Never":
        yield (*pod, "restartPolicy"), f"must be Never or left out {when}"


def _auth_findings(path: Path_, spec: Json) -> Iterator[Finding]:
    options, version = spec.get("authOptions") or {}, ray_version(spec)
    by_kubernetes = options.get("enableK8sTokenAuth")
    place = (*path, "authOptions")
    if options.get("mode") != "token":
        if by_kubernetes:
            yield (*place, "enableK8sTokenAuth"), "needs mode: token"
        return
    if version is None:
        yield (*path, "rayVersion"), "authOptions.mode token needs it, as numbers: 2.52.0 or later"
        return
    if version < (2, 52):
        yield (*path, "rayVersion"), f"authOptions.mode token needs 2.52.0 or later, got {spec['rayVersion']}"
    if by_kubernetes and version < (2, 55):
        yield (*path, "rayVersion"), f"enableK8sTokenAuth needs 2.55.0 or later, got {spec['rayVersion']}"
    if by_kubernetes and options.get("secretName"):
        yield (*place, "secretName"), "cannot be set with enableK8sTokenAuth: keep one of them"


def _serve_findings(text: str) -> Iterator[Finding]:
    """The operator sends this text to Ray Serve as it is: what Serve refuses shows in no status of the service."""
    place = ("spec", "serveConfigV2")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        yield place, f"is not YAML: {' '.join(str(error).split())}"
        return
    applications = config.get("applications") if isinstance(config, dict) else None
    if not isinstance(applications, list) or not applications:
        yield place, "must be a Serve config with applications, such as serve/config.yaml"
        return
    for index, application in enumerate(applications):
        target = str(application.get("import_path", "")) if isinstance(application, dict) else ""
        if not re.fullmatch(r"[\w.]+[:.]\w+", target):
            yield (*place, "applications", index, "import_path"), "must name a builder, such as serve.app:build"


def _upgrade_findings(spec: Json, cluster: Json) -> Iterator[Finding]:
    strategy: Json = spec.get("upgradeStrategy") or {}
    place: Path_ = ("spec", "upgradeStrategy")
    kinds: Sequence[str] = ("NewClusterWithIncrementalUpgrade", "NewCluster", "None")
    if strategy.get("type", "None") not in kinds:
        yield (*place, "type"), f"{strategy['type']!r} is not one of {', '.join(kinds)}"
    if strategy.get("type") != kinds[0]:
        return
    if not has_autoscaler(cluster):
        yield ("spec", "rayClusterConfig", "enableInTreeAutoscaling"), f"must be true for {kinds[0]}"
    options, place = strategy.get("clusterUpgradeOptions"), (*place, "clusterUpgradeOptions")
    if not options:
        yield place, f"is missing, and {kinds[0]} needs it"
        return
    surge, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent")
    if not 0 <= surge <= 100:
        yield (*place, "maxSurgePercent"), "must be from 0 to 100"
    if step is None or not 0 <= step <= min(100, surge):
        yield (*place, "stepSizePercent"), "must be from 0 to maxSurgePercent"
    if options.get("intervalSeconds", 0) <= 0:
        yield (*place, "intervalSeconds"), "must be more than 0"
    if not options.get("gatewayClassName"):
        yield (*place, "gatewayClassName"), "is missing: traffic is moved by a Gateway of this class"
