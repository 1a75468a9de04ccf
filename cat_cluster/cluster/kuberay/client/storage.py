"""The storage of a namespace's jobs, reached from outside the cluster."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from urllib.parse import urlsplit

from cat_cluster.cluster.kuberay.client.api import Api, Json
from cat_cluster.cluster.kuberay.client.port_forward import forwarded
from cat_cluster.cluster.kuberay.rendering.pods import S3_SECRET, SETTINGS
from cat_cluster.errors import KubernetesError, SpecError
from cat_cluster.settings import load_settings

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")

Say = Callable[[str], None]


def pod_settings(api: Api, say: Say) -> Mapping[str, str]:
    """Return the environment that the namespace gives its pods; nothing, which is said, where it may not be read.

    Raises KubernetesError where there is none: no pod would start.
    """
    try:
        found = api.get("v1", "ConfigMap", SETTINGS)
    except KubernetesError as error:
        if error.status == HTTPStatus.FORBIDDEN:
            say(f"{error}. Going on with the storage that this shell names")
            return {}
        raise
    if found is None:
        raise KubernetesError(
            f"namespace {api.namespace} has no ConfigMap {SETTINGS}, which every pod needs: apply an overlay to it "
            "(kubectl apply -k k8s/overlays/...), or give another --namespace",
            HTTPStatus.NOT_FOUND,
        )
    return found.get("data") or {}


def storage_of(given: str | None, of_spec: str | None, settings: Mapping[str, str], say: Say) -> str:
    """Return the address that a job stores under: the given one, the spec's, $CAT_STORAGE, or that of its pods.

    A folder of this machine, which no pod sees, is passed over unless it was given. Raises SpecError.
    """
    if given is not None:
        return given
    environment = load_settings()
    variable = environment.storage if "storage" in environment.model_fields_set else None
    for whose, url in (("the spec's storage", of_spec), ("$CAT_STORAGE", variable)):
        if url is not None and "://" in url and not url.startswith("file:"):
            return url
        if url is not None:
            say(f"{whose}, {url}, is a folder of this machine, which no pod sees: passed over")
    if url := settings.get("CAT_STORAGE"):
        say(f"storage {url}, as ConfigMap {SETTINGS} says")
        return url
    raise SpecError(
        f"no storage is known: give --storage s3://bucket/prefix, or set CAT_STORAGE in ConfigMap {SETTINGS}"
    )


@contextmanager
def storage_reached(api: Api, settings: Mapping[str, str], say: Say) -> Iterator[None]:
    """Let this process reach the server of the storage where that is a Service of the namespace.

    Then its port is forwarded, and of endpoint, region and keys those that the environment lacks are set in it for this
    block. Elsewhere, or where the environment names an endpoint, nothing is done. Raises KubernetesError.
    """
    service = None if any(map(os.environ.get, _ENDPOINTS)) else _service_of(api, settings.get("AWS_ENDPOINT_URL", ""))
    if service is None:
        yield
        return
    name, port = service
    pods = _ServicePods(api, name, port)
    with forwarded(api, pods.ready_pod, pods.target_port()) as local:
        variables = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{local}"}
        if not any(map(os.environ.get, _REGIONS)) and "AWS_REGION" in settings:
            variables["AWS_REGION"] = settings["AWS_REGION"]
        with_keys = ""
        if not os.environ.get(_KEYS[0]):
            variables |= _keys(api)
            with_keys = f", with the keys of Secret {S3_SECRET}"
        say(f"storage through a forwarded port of Service {name}{with_keys}")
        with _environment(variables):
            yield


def _service_of(api: Api, endpoint: str) -> tuple[str, int] | None:
    """Return name and port of the Service of the namespace that an endpoint is, None for any other."""
    try:
        parts = urlsplit(endpoint)
        port = parts.port or 80
    except ValueError as error:
        raise KubernetesError(
            f"ConfigMap {SETTINGS} names {endpoint!r} as the storage's server, which is no address: {error}; correct "
            "AWS_ENDPOINT_URL there, or set it in this shell"
        ) from error
    name, _, rest = (parts.hostname or "").partition(".")
    inside = ("", api.namespace, f"{api.namespace}.svc", f"{api.namespace}.svc.cluster.local")
    if parts.scheme != "http" or not name or rest.rstrip(".") not in inside:
        return None
    return name, port


class _ServicePods:
    """The pods behind a port of a Service."""

    def __init__(self, api: Api, service: str, port: int) -> None:
        self._api, self._service, self._port = api, service, port
        found = api.get("v1", "Service", service)
        spec = {} if found is None else found["spec"]
        ports = [one for one in spec.get("ports", ()) if one["port"] == port]
        if not ports or not spec.get("selector"):
            raise KubernetesError(
                f"ConfigMap {SETTINGS} names port {port} of Service {service} as the storage, and namespace "
                f"{api.namespace} has no such one: correct AWS_ENDPOINT_URL there, or set it in this shell"
            )
        self._target = ports[0].get("targetPort", port)
        self._labels = ",".join(f"{key}={value}" for key, value in spec["selector"].items())

    def ready_pod(self) -> str:
        """Return the name of a pod that is ready; KubernetesError where none is."""
        return str(self._ready()["metadata"]["name"])

    def target_port(self) -> int:
        """Return the number of the port in the pods, which the Service may have by its name."""
        if isinstance(self._target, int):
            return self._target
        for container in self._ready()["spec"]["containers"]:
            for port in container.get("ports", ()):
                if port.get("name") == self._target:
                    return int(port["containerPort"])
        raise KubernetesError(f"no container behind Service {self._service} has the port {self._target} that it names")

    def _ready(self) -> Json:
        pods = self._api.list("v1", "Pod", labels=self._labels)
        for pod in pods:
            conditions = pod.get("status", {}).get("conditions", ())
            if any(one["type"] == "Ready" and one["status"] == "True" for one in conditions):
                return pod
        raise KubernetesError(
            f"no pod behind Service {self._service}, the storage of namespace {self._api.namespace}, is ready: "
            f"`kubectl -n {self._api.namespace} get pods -l {self._labels}` shows them"
        )


def _keys(api: Api) -> dict[str, str]:
    secret = api.get("v1", "Secret", S3_SECRET)
    data = {} if secret is None else secret.get("data") or {}
    if any(name not in data for name in _KEYS):
        raise KubernetesError(
            f"namespace {api.namespace} has no Secret {S3_SECRET} with {' and '.join(_KEYS)}: make it "
            "(k8s/secrets.sh --local-s3), or set them in this shell"
        )
    return {name: base64.b64decode(data[name]).decode() for name in _KEYS}


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
