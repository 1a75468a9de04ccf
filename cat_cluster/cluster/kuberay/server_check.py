"""Asking an API server whether it would take manifests, and the pods that come of them; nothing is changed there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus

from cat_cluster.cluster.kuberay.checks.check import Document, ManifestFinding, field_text, is_shaped, without_nulls
from cat_cluster.cluster.kuberay.checks.rules import CLUSTERS, full_name, job_of
from cat_cluster.cluster.kuberay.checks.security import pod_places
from cat_cluster.cluster.kuberay.checks.validation import FieldPath, at
from cat_cluster.cluster.kuberay.client.api import Api, Json
from cat_cluster.cluster.kuberay.obstacles.refusals import refusal, shortened
from cat_cluster.errors import KubernetesError

_MISSING_RIGHT = "is forbidden: User"
_NO_NAMESPACE = re.compile(r'^namespaces "[^"]+" not found$')
_UNKNOWN = re.compile(r'unknown field "(?P<field>[^"]+)"|duplicate field "(?P<twice>[^"]+)"')
_ABSENT = re.compile(
    r'serviceaccount "(?P<ServiceAccount>[^"]+)" not found|no PriorityClass with name (?P<PriorityClass>\S+) was'
)
_NOT_OF_THE_DOCUMENT = (  # statuses with which a server refuses to look at it
    None,
    HTTPStatus.UNAUTHORIZED,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
)
_AUTOSCALER = "autoscaler"  # the container that the operator adds to the head, and its resources
_AUTOSCALER_RESOURCES = {"limits": {"cpu": "500m", "memory": "512Mi"}, "requests": {"cpu": "500m", "memory": "512Mi"}}
_SUBMITTER_RESOURCES = {"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m", "memory": "200Mi"}}


@dataclass(frozen=True)
class ServerAnswer:
    """What an API server says of manifests. not_asked: what it could not be asked, a phrase each."""

    findings: tuple[ManifestFinding, ...]
    not_asked: tuple[str, ...]


@dataclass(frozen=True)
class PodTemplate:
    """A pod that comes of a manifest. path: its template; moved: fields of the pod that are written elsewhere."""

    path: FieldPath
    pod: Json
    moved: Mapping[str, FieldPath]


def ask_server(api: Api, documents: Sequence[Document]) -> ServerAnswer:
    """Have an API server apply documents without keeping them, and create a pod of every pod template.

    Documents that name no namespace are those of the Api's. Raises KubernetesError for a server that cannot be reached.
    """
    asker = _Asker(api, documents)
    for document in documents:
        if is_shaped(document.content):
            asker.ask(document)
    kinds = ", ".join(dict.fromkeys(asker.not_allowed))
    not_allowed = [f"{kinds}: context {api.context} may not apply them"] if kinds else []
    return ServerAnswer(tuple(asker.findings), tuple(dict.fromkeys([*not_allowed, *asker.not_asked])))


def pod_templates(document: Json) -> Iterator[PodTemplate]:
    """Yield the pods that Kubernetes or KubeRay make of a manifest, with what KubeRay adds that may be refused."""
    if document["kind"] == "RayCronJob":
        for one in pod_templates({**job_of(document), "apiVersion": document["apiVersion"]}):
            places = {field: ("spec", "jobTemplate", *path[1:]) for field, path in one.moved.items()}
            yield PodTemplate(("spec", "jobTemplate", *one.path[1:]), one.pod, places)
        return
    cluster = CLUSTERS.get(document["kind"]) if document["apiVersion"].startswith("ray.io/") else None
    for path in pod_places(document):
        template: Json = at(document, path) or {}
        spec: Json = template.get("spec") or {}
        # A Pod was applied itself, and other kinds may keep something else in a place of this name.
        if not path or not (spec.get("containers") or (cluster and template)):
            continue
        containers = spec.get("containers") or []
        given = template.get("metadata") or {}
        labels = {**(given.get("labels") or {}), **(_ray_labels(document, path) if cluster else {})}
        metadata = {"generateName": f"{full_name(document['metadata'])[:40]}-", "labels": labels}
        pod: Json = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {**metadata, "annotations": given.get("annotations") or {}},
            "spec": {**spec, "volumes": [*(spec.get("volumes") or ()), *_claimed_volumes(document)]},
        }
        moved: dict[str, FieldPath] = {}
        if cluster and path[-2] == "headGroupSpec" and at(document, (*cluster, "enableInTreeAutoscaling")):
            moved[f"spec.containers[{len(containers)}]"] = (*cluster, "autoscalerOptions")
            pod["spec"]["containers"] = [*containers, _autoscaler(at(document, cluster), containers)]
        yield PodTemplate(path, pod, moved)
    if document["kind"] == "RayJob" and cluster:
        yield from _default_submitter(document)


class _Asker:
    def __init__(self, api: Api, documents: Sequence[Document]) -> None:
        self._api = api
        self._made = {(one.content.get("kind"), at(one.content, ("metadata", "name"))) for one in documents}
        self._kinds = {
            (at(one.content, ("spec", "group")), at(one.content, ("spec", "names", "kind")))
            for one in documents
            if one.content.get("kind") == "CustomResourceDefinition"
        }
        self.findings: list[ManifestFinding] = []
        self.not_asked: list[str] = []
        self.not_allowed: list[str] = []  # kinds that whoever asks may not apply

    def ask(self, document: Document) -> None:
        """Ask about a document, and if it is taken about its pods."""
        content = without_nulls(document.content)
        content["metadata"].pop("managedFields", None)  # of an object that was read from a server
        api_version, kind = content["apiVersion"], content["kind"]
        resource = self._api.resource(api_version, kind)
        if resource is None:
            if (api_version.partition("/")[0], kind) in self._kinds:
                self.not_asked.append(f"{kind} of {api_version}, a kind that these documents make")
            else:
                brings = "KubeRay" if api_version.startswith("ray.io/") else "what brings it"
                self._find(document, ("kind",), f"the cluster has no kind {kind} of {api_version}; install {brings}")
            return
        try:
            if content["metadata"].get("name"):
                self._api.apply(content, dry_run=True)
            else:
                self._api.create(content, dry_run=True)
        except KubernetesError as error:
            self._refused(document, error)
            return
        namespace = content["metadata"].get("namespace") or self._api.namespace
        for template in pod_templates(content):
            template.pod["metadata"]["namespace"] = namespace
            try:
                self._api.create(template.pod, dry_run=True)
            except KubernetesError as error:
                self._pod_refused(document, template, error)

    def _refused(self, document: Document, error: KubernetesError) -> None:
        reason, namespace = error.reason, document.content["metadata"].get("namespace") or self._api.namespace
        if error.status in _NOT_OF_THE_DOCUMENT:
            raise error
        if error.status == HTTPStatus.NOT_FOUND and _NO_NAMESPACE.match(reason):
            if ("Namespace", namespace) in self._made:
                self.not_asked.append(f"what is in namespace {namespace}, which these documents make")
            else:
                text = f"the cluster has no namespace {namespace}; make it first, or name another"
                self._find(document, ("metadata", "namespace"), text)
        elif error.status == HTTPStatus.FORBIDDEN and _MISSING_RIGHT in reason:
            self.not_allowed.append(document.content["kind"])
        elif causes := [(field, text) for field, text in error.causes if field and field != "<nil>"]:
            for field, text in causes:
                self._find(document, field, text)
        elif fields := [(found["field"] or found["twice"], found[0]) for found in _UNKNOWN.finditer(reason)]:
            for field, text in fields:
                self._find(document, field, "unknown field" if text.startswith("unknown") else "is given twice")
        else:
            self._find(document, (), shortened(reason or str(error), 500))

    def _pod_refused(self, document: Document, template: PodTemplate, error: KubernetesError) -> None:
        reason = error.reason
        if error.status in _NOT_OF_THE_DOCUMENT:
            raise error
        if error.status == HTTPStatus.FORBIDDEN and _MISSING_RIGHT in reason:
            may_not = f"context {self._api.context} may not create pods"
            self.not_asked.append(f"Pod Security, quota, accounts and priority classes: {may_not}")
            return
        absent = _ABSENT.search(reason)
        if absent and any((kind, name) in self._made for kind, name in absent.groupdict().items() if name):
            kind, name = next((kind, name) for kind, name in absent.groupdict().items() if name)
            self.not_asked.append(f"pods of {kind} {name}, which these documents make")
        elif causes := [(field, text) for field, text in error.causes if field and field != "<nil>"]:
            for field, text in causes:
                place = next((place for place in template.moved if field.startswith(place)), None)
                above = template.path if place is None else template.moved[place]
                below = f".{field}" if place is None else field.removeprefix(place)
                self._find(document, f"{field_text(above)}{below}", f"{text}, in a pod of this template")
        else:
            self._find(document, template.path, refusal(reason or str(error))[0])

    def _find(self, document: Document, field: FieldPath | str, message: str) -> None:
        place = field if isinstance(field, str) else field_text(field)
        self.findings.append(ManifestFinding(document.file, document.number, document.title, place, message))


def _ray_labels(document: Json, path: FieldPath) -> dict[str, str]:
    """Return the labels that the operator gives the pods of a cluster; one of them holds the group's name."""
    if path[-1] != "template":  # of a RayJob's submitter
        return {}
    is_head = path[-2] == "headGroupSpec"
    group = "headgroup" if is_head else str(at(document, (*path[:-1], "groupName")))
    return {"ray.io/node-type": "head" if is_head else "worker", "ray.io/group": group, "ray.io/is-ray-node": "yes"}


def _claimed_volumes(document: Json) -> Iterator[Json]:
    """Yield the volumes of a StatefulSet's claims, which Kubernetes adds to its pods."""
    for claim in at(document, ("spec", "volumeClaimTemplates")) or ():
        name = claim["metadata"]["name"]
        yield {"name": name, "persistentVolumeClaim": {"claimName": name}}


def _autoscaler(cluster: Json, head: Sequence[Json]) -> Json:
    options = cluster.get("autoscalerOptions") or {}
    given = {name: options[name] for name in ("env", "envFrom", "volumeMounts", "securityContext") if name in options}
    image = options.get("image") or (head[0].get("image") if head else None)
    return {
        "name": _AUTOSCALER,
        "image": image,
        "resources": options.get("resources") or _AUTOSCALER_RESOURCES,
        **given,
    }


def _default_submitter(job: Json) -> Iterator[PodTemplate]:
    """Yield the operator's own pod that submits a job, where the job has none."""
    spec = job.get("spec") or {}
    head = at(spec, ("rayClusterSpec", "headGroupSpec", "template", "spec", "containers"))
    if spec.get("submissionMode", "K8sJobMode") != "K8sJobMode" or spec.get("submitterPodTemplate") or not head:
        return
    container = {"name": "ray-job-submitter", "image": head[0].get("image"), "resources": _SUBMITTER_RESOURCES}
    pod: Json = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"generateName": f"{full_name(job['metadata'])[:40]}-"},
        "spec": {"restartPolicy": "Never", "containers": [container]},
    }
    yield PodTemplate(("spec", "submitterPodTemplate"), pod, {})
