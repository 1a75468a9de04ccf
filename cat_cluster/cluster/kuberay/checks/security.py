"""The restricted pod-security profile, looked for in every pod that a manifest leads to.

Rules: https://kubernetes.io/docs/concepts/security/pod-security-standards/, "Baseline" and "Restricted".
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from cat_cluster.cluster.kuberay.checks.rules import CLUSTERS, in_job_template, job_of
from cat_cluster.cluster.kuberay.checks.validation import FieldPath, Finding, at

_PROFILES = ("RuntimeDefault", "Localhost")
_VOLUMES = ("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret")
_SYSCTLS = (
    "kernel.shm_rmid_forced",
    *(f"net.ipv4.ip_{name}" for name in ("local_port_range", "local_reserved_ports", "unprivileged_port_start")),
    "net.ipv4.ping_group_range",
    *(f"net.ipv4.tcp_{name}" for name in ("fin_timeout", "rmem", "syncookies", "wmem")),
    *(f"net.ipv4.tcp_keepalive_{name}" for name in ("intvl", "probes", "time")),
)
# What a field of a pod may be if it is there, by its name or its last two names; nowhere in a pod do others share them.
_ALLOWED: Mapping[str, Collection[Any]] = {
    **dict.fromkeys(("hostNetwork", "hostPID", "hostIPC", "privileged", "hostProcess"), (False,)),
    "allowPrivilegeEscalation": (False,),
    "runAsNonRoot": (True,),
    "runAsUser": range(1, 2**31),
    "hostPort": (0,),
    "httpGet.host": ("",),
    "tcpSocket.host": ("",),
    "procMount": ("Default",),
    "seccompProfile.type": _PROFILES,
    "appArmorProfile.type": _PROFILES,
    "seLinuxOptions.type": ("", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"),
    "seLinuxOptions.user": ("",),
    "seLinuxOptions.role": ("",),
    "sysctls.name": _SYSCTLS,
    "capabilities.add": ("NET_BIND_SERVICE",),
}
# Where a kind keeps pods of its own; a RayJob's other pods are those of its cluster.
_TEMPLATES: tuple[FieldPath, ...] = (
    (),
    ("spec", "template"),
    ("spec", "jobTemplate", "spec", "template"),
    ("spec", "submitterPodTemplate"),
)
Json = Mapping[str, Any]


def restricted_findings(document: Json) -> Iterator[Finding]:
    """Yield what keeps the pods of a manifest, KubeRay's additions to it included, out of such a namespace."""
    if document["kind"] == "RayCronJob":
        yield from in_job_template(restricted_findings(job_of(document)))
        return
    for path, pod in pods_of(document):
        yield from _forbidden((*path, "spec"), pod)
        for index, volume in enumerate(pod.get("volumes", ())):
            for kind in (volume or {}).keys() - {"name", *_VOLUMES}:  # null is an empty one, as for Go
                yield (*path, "spec", "volumes", index, kind), f"must be one of {', '.join(_VOLUMES)}"
        for group in ("initContainers", "containers"):
            for index, container in enumerate(pod.get(group, ())):
                yield from _missing((*path, "spec", group, index), container or {}, pod)
    path = CLUSTERS.get(document["kind"], ())
    cluster = at(document, path) if path else None
    if cluster and cluster.get("enableInTreeAutoscaling"):
        yield from _autoscaler_findings((*path, "autoscalerOptions"), cluster)
    if cluster and document["kind"] == "RayJob":
        yield from _submitter_findings(document["spec"])


def pods_of(document: Json) -> Iterator[tuple[FieldPath, Json]]:
    """Yield the path of each pod template of a manifest, and the pod's spec."""
    for place in pod_places(document):
        pod = at(document, (*place, "spec"))
        if pod and pod.get("containers"):
            yield place, pod


def pod_places(document: Json) -> list[FieldPath]:
    """Return where a manifest may have pod templates."""
    places = list(_TEMPLATES)
    if path := CLUSTERS.get(document["kind"]):
        places.append((*path, "headGroupSpec", "template"))
        groups = at(document, (*path, "workerGroupSpecs")) or ()
        places += [(*path, "workerGroupSpecs", index, "template") for index in range(len(groups))]
    return places


def _autoscaler_findings(path: FieldPath, cluster: Json) -> Iterator[Finding]:
    """The operator puts the autoscaler into the head's pod, with this securityContext alone."""
    container = {"securityContext": at(cluster, ("autoscalerOptions", "securityContext")) or {}}
    yield from _forbidden(path, container)
    yield from _missing(path, container, at(cluster, ("headGroupSpec", "template", "spec")) or {})


def _submitter_findings(spec: Json) -> Iterator[Finding]:
    """The operator's own container that submits a job has no securityContext."""
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode == "SidecarMode":
        text = "SidecarMode adds a container without allowPrivilegeEscalation: false: use K8sJobMode"
        yield ("spec", "submissionMode"), text
    elif mode == "K8sJobMode" and not spec.get("submitterPodTemplate"):
        place = ("spec", "submitterPodTemplate")
        yield place, "is missing, and a restricted namespace refuses the operator's own: write one, or use HTTPMode"


def _forbidden(path: FieldPath, value: Any) -> Iterator[Finding]:
    """What is there and may not be."""
    if isinstance(value, dict | list):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _forbidden((*path, key), below)
        return
    names = [part for part in path if isinstance(part, str)]
    allowed = _ALLOWED.get(".".join(names[-2:]), _ALLOWED.get(names[-1]))
    if allowed is not None and value not in allowed:
        choices = ["more than 0"] if isinstance(allowed, range) else [json.dumps(one) for one in allowed if one != ""]
        text = f"must be {' or '.join(choices)}" if choices else "must be left out"
        yield path, f"{text} in a restricted namespace, got {json.dumps(value)}"


def _missing(path: FieldPath, container: Json, pod: Json) -> Iterator[Finding]:
    """What a container, or its pod for it, must say and does not."""
    context, place = container.get("securityContext", {}), (*path, "securityContext")
    inherited = {**pod.get("securityContext", {}), **context}
    if "allowPrivilegeEscalation" not in context:
        yield (*place, "allowPrivilegeEscalation"), "must be false"
    if "ALL" not in (at(context, ("capabilities", "drop")) or ()):
        yield (*place, "capabilities", "drop"), "must hold ALL"
    if "runAsNonRoot" not in inherited:
        yield (*place, "runAsNonRoot"), "must be true, here or for the pod"
    if "seccompProfile" not in inherited:
        yield (*place, "seccompProfile", "type"), "must be RuntimeDefault or Localhost, here or for the pod"
