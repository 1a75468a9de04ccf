"""The restricted pod-security profile, looked for in every pod that a manifest leads to.

Rules: https://kubernetes.io/docs/concepts/security/pod-security-standards/, "Restricted".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cat_cluster.cluster.kuberay.schemas import Finding, Path_

VOLUMES = frozenset(
    ("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret")
)
_PROFILES = ("RuntimeDefault", "Localhost")
_SELINUX = (None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")
_SYSCTLS = frozenset(
    (
        "kernel.shm_rmid_forced",
        "net.ipv4.ip_local_port_range",
        "net.ipv4.ip_local_reserved_ports",
        "net.ipv4.ip_unprivileged_port_start",
        "net.ipv4.ping_group_range",
        "net.ipv4.tcp_fin_timeout",
        "net.ipv4.tcp_keepalive_intvl",
        "net.ipv4.tcp_keepalive_probes",
        "net.ipv4.tcp_keepalive_time",
        "net.ipv4.tcp_rmem",
        "net.ipv4.tcp_syncookies",
        "net.ipv4.tcp_wmem",
    )
)
# Where a kind keeps its pod.
_TEMPLATES: Mapping[str, Path_] = {
    "Pod": (),
    "Deployment": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
    "DaemonSet": ("spec", "template"),
    "ReplicaSet": ("spec", "template"),
    "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
    "RayJob": ("spec", "submitterPodTemplate"),
}
_CLUSTERS: Mapping[str, Path_] = {
    "RayCluster": ("spec",),
    "RayJob": ("spec", "rayClusterSpec"),
    "RayService": ("spec", "rayClusterConfig"),
}
Json = Mapping[str, Any]


def restricted_findings(document: Json) -> Iterator[Finding]:
    """Yield what keeps the pods of a manifest, KubeRay's additions to it included, out of such a namespace."""
    kind = document["kind"]
    for path, pod in pods_of(document):
        yield from _pod_findings((*path, "spec"), pod)
    cluster = _at(document, _CLUSTERS[kind]) if kind in _CLUSTERS else None
    if cluster and cluster.get("enableInTreeAutoscaling"):
        yield from _autoscaler_findings(_CLUSTERS[kind], cluster)
    if kind == "RayJob" and cluster:
        yield from _submitter_findings(document["spec"])


def pods_of(document: Json) -> Iterator[tuple[Path_, Json]]:
    """Yield the path of each pod template of a manifest, and the pod's spec."""
    kind = document["kind"]
    places = [_TEMPLATES[kind]] if kind in _TEMPLATES else []
    if kind in _CLUSTERS and (cluster := _at(document, _CLUSTERS[kind])):
        places.append((*_CLUSTERS[kind], "headGroupSpec", "template"))
        for index, _ in enumerate(cluster.get("workerGroupSpecs") or ()):
            places.append((*_CLUSTERS[kind], "workerGroupSpecs", index, "template"))
    for place in places:
        template = _at(document, place)
        if template and template.get("spec"):
            yield place, template["spec"]


def _at(document: Json, path: Path_) -> Any:
    value: Any = document
    for part in path:
        if isinstance(value, dict):
            value = value.get(str(part))
        else:
            value = value[part] if isinstance(value, list) and isinstance(part, int) else None
    return value


def _autoscaler_findings(path: Path_, cluster: Json) -> Iterator[Finding]:
    """The operator puts the autoscaler into the head's pod, with this securityContext alone."""
    head = cluster["headGroupSpec"]["template"].get("spec") or {}
    container = {"securityContext": (cluster.get("autoscalerOptions") or {}).get("securityContext") or {}}
    yield from _container_findings((*path, "autoscalerOptions"), container, head)


def _submitter_findings(spec: Json) -> Iterator[Finding]:
    """The operator's own container that submits a job has no securityContext."""
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode == "SidecarMode":
        yield ("spec", "submissionMode"), "a restricted namespace refuses the operator's sidecar: use K8sJobMode"
    elif mode == "K8sJobMode" and not spec.get("submitterPodTemplate"):
        place = ("spec", "submitterPodTemplate")
        yield place, "is missing, and a restricted namespace refuses the operator's own: write one, or use HTTPMode"


def _pod_findings(path: Path_, pod: Json) -> Iterator[Finding]:
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield (*path, name), "shares a namespace of the machine; leave it out"
    for index, volume in enumerate(pod.get("volumes") or ()):
        for kind in volume:
            if kind != "name" and kind not in VOLUMES:
                yield (*path, "volumes", index, kind), f"use one of {', '.join(sorted(VOLUMES))} instead"
    context = pod.get("securityContext") or {}
    for index, sysctl in enumerate(context.get("sysctls") or ()):
        if sysctl["name"] not in _SYSCTLS:
            yield (*path, "securityContext", "sysctls", index), f"{sysctl['name']} is not a safe one; leave it out"
    yield from _context_findings((*path, "securityContext"), context)
    for group in ("initContainers", "containers", "ephemeralContainers"):
        for index, container in enumerate(pod.get(group) or ()):
            yield from _container_findings((*path, group, index), container, pod)


def _container_findings(path: Path_, container: Json, pod: Json) -> Iterator[Finding]:
    context, pod_context = container.get("securityContext") or {}, pod.get("securityContext") or {}
    place = (*path, "securityContext")
    yield from _host_findings(path, container)
    if context.get("privileged"):
        yield (*place, "privileged"), "has every right on the machine; leave it out"
    if context.get("allowPrivilegeEscalation") is not False:
        yield (*place, "allowPrivilegeEscalation"), "must be false"
    if context.get("runAsNonRoot", pod_context.get("runAsNonRoot")) is not True:
        yield (*place, "runAsNonRoot"), "must be true, here or for the pod"
    seccomp = context.get("seccompProfile") or pod_context.get("seccompProfile") or {}
    if seccomp.get("type") not in _PROFILES:
        yield (*place, "seccompProfile", "type"), "must be RuntimeDefault or Localhost, here or for the pod"
    capabilities = context.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or ()):
        yield (*place, "capabilities", "drop"), "must hold ALL"
    for name in capabilities.get("add") or ():
        if name != "NET_BIND_SERVICE":
            yield (*place, "capabilities", "add"), f"{name} may not be added; leave it out"
    if context.get("procMount", "Default") != "Default":
        yield (*place, "procMount"), "must be Default"
    yield from _context_findings(place, context)


def _host_findings(path: Path_, container: Json) -> Iterator[Finding]:
    for index, port in enumerate(container.get("ports") or ()):
        if port.get("hostPort"):
            yield (*path, "ports", index, "hostPort"), "takes a port of the machine; leave it out"
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        for action in ("httpGet", "tcpSocket"):
            if ((container.get(name) or {}).get(action) or {}).get("host"):
                yield (*path, name, action, "host"), "asks another machine; leave it out"


def _context_findings(place: Path_, context: Json) -> Iterator[Finding]:
    """What is forbidden for a pod and for a container alike."""
    if context.get("runAsUser") == 0:
        yield (*place, "runAsUser"), "must not be 0, which is root"
    if (context.get("windowsOptions") or {}).get("hostProcess"):
        yield (*place, "windowsOptions", "hostProcess"), "has every right on the machine; leave it out"
    if (context.get("appArmorProfile") or {}).get("type", "RuntimeDefault") not in _PROFILES:
        yield (*place, "appArmorProfile", "type"), "must be RuntimeDefault or Localhost"
    labels = context.get("seLinuxOptions") or {}
    if labels.get("type") not in _SELINUX or labels.get("user") or labels.get("role"):
        yield (*place, "seLinuxOptions"), "may name a container type alone, and no user or role"
