"""The pods of a training job: restricted, with a read-only root, and next to serving the first to make room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

IMAGE = "cat-cluster"
SPEC_ANNOTATION = "cat-cluster/spec"  # of a head or a schedule: the spec, which a volume shows as a file
RUN_LABEL = "cat-cluster/run"  # of a RayJob whose run was known when it was rendered
STORAGE_ANNOTATION = "cat-cluster/storage"  # of the same: where the run is
SPEC_FILE = "/etc/cat-cluster/job/spec.yaml"
USER = 10001  # of k8s/Dockerfile
# Ports of Ray, as PodMonitors and network policies name them.
GCS_PORT, DASHBOARD_PORT, AGENT_PORT = 6379, 8265, 52365
METRICS_PORT, AUTOSCALER_METRICS_PORT, DASHBOARD_METRICS_PORT = 8080, 44217, 44227
HEALTH_PATH = "/api/healthz"
TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"
ACCOUNT, HEAD_ACCOUNT, SCHEDULE_ACCOUNT = "cat-training", "cat-training-head", "cat-schedule"
PRIORITY = "cat-cluster-training"
SETTINGS = "cat-cluster-settings"  # ConfigMap with the environment of every pod
S3_SECRET = "cat-cluster-s3"
_SCRATCH = "/scratch"
# Of machines that may be taken away at short notice, and of those with GPUs.
_SPOT = ("cat-cluster/spot", "cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority")


def head_template(image: str, memory: str, *, spec: str | None, scales: bool) -> dict[str, Any]:
    """Return the head's pod. spec: the job's, where the pod holds it; scales: the autoscaler runs in it."""
    metrics = [
        _port("metrics", METRICS_PORT),
        *([_port("as-metrics", AUTOSCALER_METRICS_PORT)] if scales else []),
        _port("dash-metrics", DASHBOARD_METRICS_PORT),
    ]
    container = {
        "name": "ray-head",
        "image": image,
        "ports": [_port("gcs-server", GCS_PORT), _port("dashboard", DASHBOARD_PORT), *metrics],
        **_surroundings(),
        # Drivers and Ray Train's controllers load their libraries when they start, and wait from then on.
        "resources": {"requests": {"cpu": "500m", "memory": memory}, "limits": {"cpu": "2", "memory": memory}},
        **_probes(),
    }
    pod = _pod(container, HEAD_ACCOUNT if scales else ACCOUNT)
    # A head that is moved costs the run a new cluster.
    annotations = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
    if spec is not None:
        annotations[SPEC_ANNOTATION] = spec
        _show_spec(pod)
    if scales:
        pod["volumes"].append(_token_volume())
    return {"metadata": {"labels": part_of_project("training"), "annotations": annotations}, "spec": pod}


def worker_template(image: str, cpu: str, memory: str, *, gpu: bool) -> dict[str, Any]:
    """Return a worker's pod, which may run on a machine that is taken away: that costs some steps."""
    container = {
        "name": "ray-worker",
        "image": image,
        "ports": [_port("metrics", METRICS_PORT)],
        **_surroundings(),
        "resources": _worker_resources(cpu, memory, gpu=gpu),
        **_probes(),
    }
    pod = _pod(container, ACCOUNT)
    keys = (*_SPOT, "nvidia.com/gpu") if gpu else _SPOT
    pod["tolerations"] = [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in keys]
    return {"metadata": {"labels": part_of_project("training")}, "spec": pod}


def submitter_template(image: str) -> dict[str, Any]:
    """Return the pod that hands the job to the cluster and follows its log; the operator adds the command."""
    container = {
        "name": "ray-job-submitter",
        "image": image,
        "env": [{"name": "HOME", "value": "/tmp"}],
        "securityContext": container_security(),
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    pod = {**_pod(container, ACCOUNT), "restartPolicy": "Never"}
    pod["volumes"] = [volume for volume in pod["volumes"] if volume["name"] == "tmp"]
    return {"metadata": {"labels": part_of_project("training")}, "spec": pod}


def schedule_template(image: str, spec: str, command: Sequence[str]) -> dict[str, Any]:
    """Return the pod of a CronJob, whose command finds the spec in SPEC_FILE: it alone has the account's token."""
    container = {
        "name": "submit",
        "image": image,
        "command": list(command),
        **_surroundings(),
        # It loads training's libraries and looks at the photos, one adapter's after the other.
        "resources": {"requests": {"cpu": "200m", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "4Gi"}},
    }
    pod = {**_pod(container, SCHEDULE_ACCOUNT), "automountServiceAccountToken": True, "restartPolicy": "Never"}
    _show_spec(pod)
    return {"metadata": {"labels": part_of_project("schedule"), "annotations": {SPEC_ANNOTATION: spec}}, "spec": pod}


def autoscaler_options() -> dict[str, Any]:
    """Return what the operator makes the autoscaler's container of: it alone holds a token of the API server."""
    return {
        "version": "v2",
        "idleTimeoutSeconds": 300,
        "securityContext": container_security(),
        "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": "500m", "memory": "1Gi"}},
        "env": [{"name": "HOME", "value": "/tmp"}],
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "api-token", "mountPath": TOKEN_FOLDER, "readOnly": True},
        ],
    }


def part_of_project(component: str) -> dict[str, str]:
    """Return the labels that the network policies and budgets of k8s/base know a pod by."""
    return {"app.kubernetes.io/part-of": "cat-cluster", "app.kubernetes.io/component": component}


def settings_environment() -> list[dict[str, Any]]:
    """Return where a pod's environment comes from: `envFrom` of its container."""
    return [
        {"configMapRef": {"name": SETTINGS}},
        # Not there where a role of the cloud gives the right to the bucket.
        {"secretRef": {"name": S3_SECRET, "optional": True}},
        {"secretRef": {"name": "cat-cluster-hub", "optional": True}},
    ]


def pod_security() -> dict[str, Any]:
    """Return the securityContext of every pod here."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> dict[str, Any]:
    """Return the securityContext of every container here."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def _pod(container: dict[str, Any], account: str) -> dict[str, Any]:
    return {
        "serviceAccountName": account,
        "automountServiceAccountToken": False,
        # Kubernetes would put an address of every Service here into the environment, such as S3_PORT=tcp://...
        "enableServiceLinks": False,
        "priorityClassName": PRIORITY,
        "securityContext": pod_security(),
        "containers": [container],
        "volumes": [
            {"name": "scratch", "emptyDir": {"sizeLimit": "20Gi"}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "20Gi"}},
        ],
    }


def _show_spec(pod: dict[str, Any]) -> None:
    """Let a pod's container see the annotation with the spec as SPEC_FILE."""
    folder, _, name = SPEC_FILE.rpartition("/")
    pod["containers"][0]["volumeMounts"].append({"name": "job", "mountPath": folder, "readOnly": True})
    item = {"path": name, "fieldRef": {"fieldPath": f"metadata.annotations['{SPEC_ANNOTATION}']"}}
    pod["volumes"].append({"name": "job", "downwardAPI": {"items": [item]}})


def _surroundings() -> dict[str, Any]:
    return {
        "env": [
            {"name": "HOME", "value": _SCRATCH},
            {"name": "CAT_CACHE_DIR", "value": f"{_SCRATCH}/cat-cluster"},
            {"name": "HF_HOME", "value": f"{_SCRATCH}/huggingface"},
            {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
        ],
        "envFrom": settings_environment(),
        "securityContext": container_security(),
        "volumeMounts": [{"name": "scratch", "mountPath": _SCRATCH}, {"name": "tmp", "mountPath": "/tmp"}],
    }


def _probes() -> dict[str, Any]:
    """Return probes over HTTP: KubeRay's own may call wget, which the image does not have."""
    asks = {"httpGet": {"path": HEALTH_PATH, "port": AGENT_PORT}, "timeoutSeconds": 5}
    return {
        "startupProbe": {**asks, "periodSeconds": 5, "failureThreshold": 60},
        "livenessProbe": {**asks, "periodSeconds": 10, "failureThreshold": 12},
        "readinessProbe": {**asks, "periodSeconds": 5, "failureThreshold": 6},
    }


def _port(name: str, number: int) -> dict[str, Any]:
    return {"name": name, "containerPort": number}


def _worker_resources(cpu: str, memory: str, *, gpu: bool) -> dict[str, Any]:
    """As much as is asked for, and no more: Ray deals out what the limits say."""
    # All are text, as the operator writes them back: a second apply finds nothing changed.
    amounts = {"cpu": cpu, "memory": memory, **({"nvidia.com/gpu": "1"} if gpu else {})}
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _token_volume() -> dict[str, Any]:
    """Return what Kubernetes mounts into every container by itself, for one container to mount."""
    sources = [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}},
    ]
    return {"name": "api-token", "projected": {"sources": sources}}
