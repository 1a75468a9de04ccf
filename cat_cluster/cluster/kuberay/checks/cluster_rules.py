"""What KubeRay's operator refuses of a cluster, alone or inside a RayJob or RayService, and its CRDs let pass.

Written from the operator's validation.go (v1.7.0), as `rules` is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from cat_cluster.cluster.kuberay.checks.validation import FieldPath, Finding, at

Json = Mapping[str, Any]

_RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
_TOKEN_AUTH_SINCE, _PRIORITY_SINCE = (2, 52), (2, 56)  # of Ray
_V2_VARIABLE, _START_VARIABLE = "RAY_enable_autoscaler_v2", "KUBERAY_GEN_AUTOSCALER_START_CMD"
# Of a head that keeps its GCS in RocksDB.
_GCS_VOLUME, _GCS_FOLDER = "gcs-storage", "/data/gcs"
_GCS_VARIABLES = ("RAY_gcs_storage", "RAY_gcs_storage_path")
_OWN_VOLUME = ("size", "storageClassName", "accessModes")
_LABEL_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL_PREFIX = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")


def cluster_findings(path: FieldPath, spec: Json, annotations: Mapping[str, str]) -> Iterator[Finding]:
    """Yield what the operator refuses of a cluster's spec. path: where it is; annotations: of the object it is in."""
    head: FieldPath = (*path, "headGroupSpec")
    groups = [(head, spec.get("headGroupSpec", {}))]
    for index, group in enumerate(spec.get("workerGroupSpecs", ())):
        groups.append(((*path, "workerGroupSpecs", index), group))
        least, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
        if not 0 <= least <= most:
            yield (*groups[-1][0], "minReplicas"), f"{least} must be from 0 to maxReplicas, which is {most}"
    for place, group in groups:
        pod, params = at(group, ("template", "spec")) or {}, group.get("rayStartParams", {})
        if not pod.get("containers"):
            yield (*place, "template", "spec", "containers"), "must hold a container, Ray's first"
        if group.get("resources") and any(params.get(name) for name in _RESOURCE_PARAMS):
            yield (*place, "resources"), "is given here and in rayStartParams: keep one of them"
        yield from _label_findings((*place, "labels"), group.get("labels") or {})
    yield from _autoscaling_findings(path, spec, groups)
    yield from _fault_tolerance_findings(head, spec, annotations)
    yield from _gcs_storage_findings(path, spec)
    if at(spec, ("authOptions", "mode")) == "token" and not _is_ray_since(spec, _TOKEN_AUTH_SINCE):
        yield (*path, "rayVersion"), "must be 2.52.0 or later, in numbers, with authOptions.mode token"


def _label_findings(path: FieldPath, labels: Mapping[str, str]) -> Iterator[Finding]:
    """Labels of Ray nodes are written as those of Kubernetes."""
    for key, value in labels.items():
        prefix, slash, name = key.rpartition("/")
        if not _LABEL_NAME.fullmatch(name) or (slash and not _LABEL_PREFIX.fullmatch(prefix)):
            yield (*path, key), f"{key[:80]!r} is no key of a label, such as team or example.org/team"
        if value and not _LABEL_NAME.fullmatch(value):
            yield (*path, key), f"{value[:80]!r} is no value of a label: letters, digits, -, _ and ., 63 at most"


def _autoscaling_findings(path: FieldPath, spec: Json, groups: list[tuple[FieldPath, Json]]) -> Iterator[Finding]:
    scales, options = bool(spec.get("enableInTreeAutoscaling")), spec.get("autoscalerOptions") or {}
    version, variable = options.get("version"), _head_variables(spec).get(_V2_VARIABLE)
    is_on = variable in ("1", "true")
    place: FieldPath = (*path, "headGroupSpec", "template", "spec", "containers", 0, "env")
    if is_on and not scales:
        yield place, f"{_V2_VARIABLE} needs enableInTreeAutoscaling: true"
    if variable is not None and scales and version:
        yield place, f"{_V2_VARIABLE} cannot be used with autoscalerOptions.version: keep the latter"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield (*path, "autoscalerOptions", "idleTimeoutSeconds"), "must be 0 or more"
    if any(entry["name"] == _START_VARIABLE for entry in options.get("env") or ()):
        yield (*path, "autoscalerOptions", "env"), f"{_START_VARIABLE} is the operator's to set; leave it out"
    for place, group in groups:
        # A container that restarts in its pod would be a Ray node that nobody knows.
        if scales and version == "v2" and (at(group, ("template", "spec", "restartPolicy")) or "Never") != "Never":
            yield (*place, "template", "spec", "restartPolicy"), "must be Never or left out with autoscaler v2"
        yield from _scaled_group_findings(place, group, scales=scales, is_v2=version == "v2" or is_on)
    if any(group.get("priority") for _, group in groups) and not _is_ray_since(spec, _PRIORITY_SINCE):
        yield (*path, "rayVersion"), "must be 2.56.0 or later, in numbers, with a priority of groups"


def _scaled_group_findings(path: FieldPath, group: Json, *, scales: bool, is_v2: bool) -> Iterator[Finding]:
    if scales and group.get("suspend"):
        yield (*path, "suspend"), "cannot be used with enableInTreeAutoscaling"
    if group.get("idleTimeoutSeconds", 0) < 0:
        yield (*path, "idleTimeoutSeconds"), "must be 0 or more"
    elif "idleTimeoutSeconds" in group and not is_v2:  # 0 counts as given, for a priority it does not
        yield (*path, "idleTimeoutSeconds"), "needs autoscalerOptions.version: v2"
    if group.get("priority") and not is_v2:
        yield (*path, "priority"), "needs autoscalerOptions.version: v2"


def _head_variables(spec: Json) -> dict[str, str]:
    """Return the environment that is written out for Ray's container of the head."""
    containers = at(spec, ("headGroupSpec", "template", "spec", "containers")) or []
    return {entry["name"]: entry.get("value", "") for container in containers[:1] for entry in container.get("env", ())}


def _is_ray_since(spec: Json, least: tuple[int, int]) -> bool:
    version = re.match(r"\s*v?(\d+)\.(\d+)", spec.get("rayVersion", ""))
    return version is not None and tuple(map(int, version.groups())) >= least


def _fault_tolerance_findings(head: FieldPath, spec: Json, annotations: Mapping[str, str]) -> Iterator[Finding]:
    names = _head_variables(spec)
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
