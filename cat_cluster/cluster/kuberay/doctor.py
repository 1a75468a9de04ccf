"""Whether a cluster is fit for this project: each finding is a line that says what is, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

from cat_cluster.cluster.kuberay.checks.gates import EMBEDDED_STORAGE, gates_on
from cat_cluster.cluster.kuberay.checks.releases import NEWEST, Release
from cat_cluster.cluster.kuberay.client.api import Api, unless_forbidden
from cat_cluster.cluster.kuberay.client.jobs import JOB_VERBS
from cat_cluster.cluster.kuberay.client.operators import find_operators, given_gates, operator_container
from cat_cluster.cluster.kuberay.probe_pod import look_inside
from cat_cluster.cluster.kuberay.rendering.render import default_image
from cat_cluster.errors import KubernetesError, SpecError

Json = dict[str, Any]

OLDEST_KUBERNETES = (1, 33)
OPERATOR_NAMESPACE = "kuberay-system"  # that the network policies of k8s/base let in
SECRETS = ("cat-training-ray-token", "cat-serving-ray-token", "cat-cluster-api-keys")
DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
STANDING_CLUSTER = "cat-training"
_WHAT_TRAINERS_DO = (
    *((verb, "ray.io", "rayjobs", "") for verb in JOB_VERBS),
    ("list", "", "pods", ""),
    ("get", "", "pods", "log"),
    ("list", "", "events", ""),
)


@dataclass(frozen=True)
class Finding:
    """How one thing stands. problem: something has to be done; unknown: whoever asks may not see it."""

    subject: str
    state: Literal["ok", "problem", "unknown"]
    text: str


def examine(api: Api, *, image: str | None = None, inside: bool = True) -> Iterator[Finding]:
    """Yield how each thing stands that the project needs of a cluster, in the order in which one depends on another.

    inside: whether a pod tries network policies and bucket, for two minutes at most, and is removed again; image: of
    that pod, by default the one that the standing cluster has. Raises KubernetesError where no server can be reached.
    """
    yield _kubernetes(api.version())
    release, definitions = _definitions(api)
    yield definitions
    operators = find_operators(api)
    yield _operator(operators)
    yield _gates(api, operators, release or NEWEST)
    namespace = _seen(lambda: api.get("v1", "Namespace", api.namespace))
    if isinstance(namespace, Finding):
        yield Finding("namespace", "unknown", f"{api.namespace} cannot be looked at: {namespace.text}")
    elif namespace is None:
        yield Finding("namespace", "problem", f"{api.namespace} is not there: kubectl apply -f k8s/base/namespace.yaml")
        return  # all that follows is in it
    else:
        yield _pod_security(namespace)
    yield _rights(api)
    yield from _secrets(api)
    yield _storage_class(api)
    yield _gpus(api)
    if inside:
        yield from _from_inside(api, image or _standing_image(api))


def _kubernetes(version: str) -> Finding:
    found = re.match(r"v?(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) < OLDEST_KUBERNETES:
        wanted = ".".join(map(str, OLDEST_KUBERNETES))
        text = f"{version} is older than {wanted}, for which the manifests are written: upgrade it"
        return Finding("Kubernetes", "problem", text)
    return Finding("Kubernetes", "ok", version)


def _definitions(api: Api) -> tuple[Release | None, Finding]:
    """Return the release that KubeRay's definitions are of, by fields that came with it; None for none known here."""
    subject = "KubeRay's CRDs"
    if api.resource("ray.io/v1", "RayJob") is None:
        text = "are not installed: install the operator (docs/operations.md, 3. The operator)"
        return None, Finding(subject, "problem", text)
    schemas = _seen(lambda: api.schemas("ray.io/v1"))
    if isinstance(schemas, Finding):
        return None, Finding(subject, "unknown", "are installed; your account may not look at their schemas")
    schema = (schemas or {}).get("io.ray.v1.RayCluster", {})
    spec = schema.get("properties", {}).get("spec", {}).get("properties", {})
    if "backend" in spec.get("gcsFaultToleranceOptions", {}).get("properties", {}):
        return "1.7", Finding(subject, "ok", "of 1.7 or later")
    if "secretName" in spec.get("authOptions", {}).get("properties", {}):
        text = "of 1.6, which has no k8s/components/gcs-embedded; check with --kuberay 1.6"
        return "1.6", Finding(subject, "ok", text)
    text = (
        "are older than 1.6, and helm leaves them alone when it upgrades: kubectl apply --server-side those of "
        "helm-chart/kuberay-operator/crds of KubeRay 1.7"
    )
    return None, Finding(subject, "problem", text)


def _operator(found: list[Json] | None) -> Finding:
    subject = "KubeRay's operator"
    if found is None:
        return Finding(subject, "unknown", "your account may not list deployments; ask who runs the cluster")
    if not found:
        return Finding(
            subject, "problem", "is not there: nothing would be made of a RayJob (docs/operations.md, step 3)"
        )
    if len(found) > 1:
        where = ", ".join(one["metadata"]["namespace"] for one in found)
        return Finding(subject, "problem", f"runs in {where}: two of them undo each other's work, so keep one")
    (one,) = found
    namespace = one["metadata"]["namespace"]
    if not one.get("status", {}).get("readyReplicas"):
        return Finding(
            subject, "problem", f"is not ready: kubectl -n {namespace} describe deployment {one['metadata']['name']}"
        )
    if namespace != OPERATOR_NAMESPACE:
        return Finding(
            subject,
            "problem",
            f"is in namespace {namespace}, and the network policies let in {OPERATOR_NAMESPACE} alone: change policy "
            "`operator` of k8s/base/network.yaml, or move it",
        )
    return Finding(subject, "ok", f"{operator_container(one)['image']} in {namespace}")


def _gates(api: Api, operators: list[Json] | None, release: Release) -> Finding:
    """Feature gates of the operator, and whether what is in the namespace needs one that is off."""
    subject = "feature gates"
    if not operators:
        return Finding(subject, "unknown", "as the operator cannot be looked at")
    given = given_gates(operators[0])
    try:
        on = gates_on(given, release)
    except SpecError:  # of another release
        return Finding(subject, "ok", given)
    services = unless_forbidden(lambda: api.list("ray.io/v1", "RayService")) or []
    wanting = [one["metadata"]["name"] for one in services if _is_embedded(one)] if EMBEDDED_STORAGE not in on else []
    if wanting:
        return Finding(
            subject,
            "problem",
            f"{EMBEDDED_STORAGE} is off, which RayService {', '.join(wanting)} needs: turn it on in the values of the "
            "operator's chart (docs/operations.md, step 3), or leave k8s/components/gcs-embedded out",
        )
    return Finding(subject, "ok", f"on: {', '.join(sorted(on))}")


def _is_embedded(service: Json) -> bool:
    options = service["spec"].get("rayClusterConfig", {}).get("gcsFaultToleranceOptions") or {}
    return bool(options.get("backend") == "rocksdb")


def _pod_security(namespace: Json) -> Finding:
    name = namespace["metadata"]["name"]
    if (namespace["metadata"].get("labels") or {}).get("pod-security.kubernetes.io/enforce") == "restricted":
        return Finding("namespace", "ok", f"{name}, which enforces the restricted profile")
    return Finding(
        "namespace",
        "problem",
        f"{name} does not enforce the restricted profile of pod security: kubectl apply -f k8s/base/namespace.yaml",
    )


def _rights(api: Api) -> Finding:
    missing = [
        f"{verb} {resource}{subresource and '/'}{subresource}"
        for verb, group, resource, subresource in _WHAT_TRAINERS_DO
        if not api.allows(verb, group, resource, subresource=subresource)
    ]
    if missing:
        return Finding(
            "your rights", "problem", f"you may not {', '.join(missing)}: have yourself bound to role training-jobs"
        )
    return Finding("your rights", "ok", "enough to submit, follow and stop jobs")


def _secrets(api: Api) -> Iterator[Finding]:
    for name in SECRETS:
        found = _seen(lambda name=name: api.get("v1", "Secret", name))  # type: ignore[misc]
        if isinstance(found, Finding):
            yield Finding(f"Secret {name}", "unknown", found.text)
        elif found is None:
            yield Finding(f"Secret {name}", "problem", f"is not there: k8s/secrets.sh --namespace {api.namespace}")
        else:
            yield Finding(f"Secret {name}", "ok", "is there")


def _storage_class(api: Api) -> Finding:
    subject = "storage class"
    found = unless_forbidden(lambda: api.list("storage.k8s.io/v1", "StorageClass"))
    if found is None:
        return Finding(subject, "unknown", "your account may not list storage classes")
    default = [
        one["metadata"]["name"]
        for one in found
        if (one["metadata"].get("annotations") or {}).get(DEFAULT_CLASS) == "true"
    ]
    if default:
        return Finding(subject, "ok", f"{default[0]} is the default one")
    bound = unless_forbidden(lambda: api.list("v1", "PersistentVolumeClaim")) or []
    waiting = [one["metadata"]["name"] for one in bound if one.get("status", {}).get("phase") != "Bound"]
    if bound and not waiting:
        return Finding(subject, "ok", "none is the default, and the volumes of this namespace were found without")
    return Finding(
        subject,
        "problem",
        "none is the default, so the volumes of gcs-embedded and of the S3 server of `local` wait for ever: annotate "
        f"one with {DEFAULT_CLASS}=true, or provide the volumes",
    )


def _gpus(api: Api) -> Finding:
    nodes = unless_forbidden(lambda: api.list("v1", "Node"))
    if nodes is None:
        return Finding("GPUs", "unknown", "your account may not list nodes")
    having = {node["metadata"]["name"]: int(_allocatable(node).get("nvidia.com/gpu", 0)) for node in nodes}
    if not any(having.values()):
        return Finding(
            "GPUs",
            "ok",
            "none, so overlay `local` and jobs without --gpu; machines with some need NVIDIA's device plugin to show",
        )
    return Finding("GPUs", "ok", f"{sum(having.values())} on {sum(map(bool, having.values()))} of {len(nodes)} nodes")


def _allocatable(node: Json) -> Json:
    allocatable: Json = node.get("status", {}).get("allocatable", {})  # none of a node that has just come
    return allocatable


def _standing_image(api: Api) -> str:
    cluster = _seen(lambda: api.get("ray.io/v1", "RayCluster", STANDING_CLUSTER))
    if cluster is None or isinstance(cluster, Finding):
        return default_image()
    return str(cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"])


def _from_inside(api: Api, image: str) -> Iterator[Finding]:
    policies, bucket = "network policies", "bucket"
    try:
        answer = look_inside(api, image)
    except KubernetesError as error:
        yield Finding(policies, "unknown", f"the pod that would try them: {error}")
        yield Finding(bucket, "unknown", "for the same reason")
        return
    if answer["reaches_api"]:
        yield Finding(
            policies,
            "problem",
            "are not enforced, or not applied: a pod reached what none of them names; apply the overlay, and use a "
            "network plugin that enforces them (docs/operations.md, From nothing to a served adapter)",
        )
    else:
        yield Finding(policies, "ok", "are enforced: a pod did not reach what none of them names")
    if answer["bucket"] is None:
        yield Finding(bucket, "ok", f"{answer['storage']} is written and read from inside")
    else:
        yield Finding(bucket, "problem", f"{answer['storage']} from inside: {answer['bucket']}")


def _seen(look: Callable[[], Json | None]) -> Json | Finding | None:
    """Return what is there, None for nothing, and a finding where whoever asks may not look."""
    try:
        return look()
    except KubernetesError as error:
        if error.status != HTTPStatus.FORBIDDEN:
            raise
        return Finding("", "unknown", "your account may not look")
