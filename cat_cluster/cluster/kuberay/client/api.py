"""The API server of a Kubernetes cluster, through the official client: objects are the mappings that manifests are."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import kubernetes.client
import urllib3

from cat_cluster.cluster.kuberay.checks.rules import check_namespace
from cat_cluster.cluster.kuberay.client.kubeconfig import find_server
from cat_cluster.errors import KubernetesError, SpecError

Json = dict[str, Any]
Found = TypeVar("Found")

FIELD_MANAGER = "cat-cluster"
ROLE = "training-jobs"  # of k8s/base: what trainers may do
TIMEOUT = (5.0, 60.0)  # seconds to connect, and to wait for a reply
CLOCKS_AGREE = timedelta(seconds=2)  # or differ by less than can be told
RETRY_AFTER = 20  # seconds that a server may have a request wait
_PIECE = 1 << 16  # bytes
_ANONYMOUS = 'User "system:anonymous"'  # as a server calls who gives no credentials


@dataclass(frozen=True)
class Resource:
    """Where the objects of a kind are: `path` is below the server's address, without namespace and name."""

    path: str
    plural: str
    namespaced: bool


class Api:
    """An API server, and the namespace in it that is meant unless an object names its own.

    Every method raises KubernetesError for a server that cannot be reached or refuses, with the status it gave.
    """

    def __init__(self, client: Any, context: str, namespace: str) -> None:
        self._client = client
        self._resources: dict[str, dict[str, Resource]] = {}
        self._ahead = timedelta()  # of this machine's clock
        self.context = context
        self.namespace = namespace

    @property
    def client(self) -> Any:
        """The official client, for what speaks another protocol."""
        return self._client

    @property
    def server(self) -> str:
        """Address of the server."""
        return str(self._client.configuration.host)

    def now(self) -> datetime:
        """Return the time by the server's clock, as the times of objects are; by this machine's until it replies."""
        return datetime.now(UTC) + self._ahead

    def get(self, api_version: str, kind: str, name: str, *, namespace: str | None = None) -> Json | None:
        """Return an object, or None where there is none, also for want of its kind."""
        resource = self.resource(api_version, kind)
        if resource is None:
            return None
        try:
            return self._json("GET", self._path(resource, namespace, name), asked=f"get {kind} {name}")
        except KubernetesError as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return None
            raise

    def list(
        self, api_version: str, kind: str, *, labels: str = "", fields: str = "", namespace: str | None = None
    ) -> list[Json]:
        """Return the objects of a kind, none where the server does not have that kind.

        labels, fields: selectors in the server's own notation; namespace: "" for all of them.
        """
        resource = self.resource(api_version, kind)
        if resource is None:
            return []
        query = {name: value for name, value in (("labelSelector", labels), ("fieldSelector", fields)) if value}
        path = self._path(resource, namespace)
        found: list[Json] = []
        paging = {"limit": "500"}
        asked = f"list {resource.plural}"
        while True:
            try:
                page = self._json("GET", path, query={**paging, **query}, asked=asked)
            except KubernetesError as error:
                if error.status != HTTPStatus.GONE:
                    raise
                # The rest of a list is kept for minutes; then all of it is asked for at once.
                return self._json("GET", path, query=query, asked=asked).get("items") or []
            found += page.get("items") or []
            following = (page.get("metadata") or {}).get("continue")
            if not following:
                return found
            paging["continue"] = following

    def apply(self, document: Json, *, dry_run: bool = False) -> Json:
        """Apply an object server-side as `cat-cluster` and return it as it is then.

        Fields that are unknown or given twice are refused; fields that someone else manages too are taken over.
        """
        resource, namespace, name = self._addressed(document)
        query = {"fieldManager": FIELD_MANAGER, "force": "true", "fieldValidation": "Strict", **_dry(dry_run)}
        asked = f"apply {document['kind']} {name}"
        return self._json(
            "PATCH",
            self._path(resource, namespace, name),
            query=query,
            body=json.dumps(document),
            content="application/apply-patch+yaml",
            asked=asked,
        )

    def create(self, document: Json, *, dry_run: bool = False) -> Json:
        """Create an object, which may have a `generateName`, and return it."""
        resource, namespace, name = self._addressed(document)
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict", **_dry(dry_run)}
        asked = f"create {document['kind']} {name}"
        return self._json("POST", self._path(resource, namespace), query=query, body=document, asked=asked)

    def merge(self, api_version: str, kind: str, name: str, change: Json) -> Json:
        """Change some fields of an object (a JSON merge patch) and return it."""
        resource = self.required(api_version, kind)
        return self._json(
            "PATCH",
            self._path(resource, None, name),
            query={"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"},
            body=change,
            content="application/merge-patch+json",
            asked=f"change {kind} {name}",
        )

    def delete(self, api_version: str, kind: str, name: str) -> bool:
        """Delete an object, and what it owns after it; say whether it was there."""
        resource = self.required(api_version, kind)
        path = self._path(resource, None, name)
        try:
            self._json("DELETE", path, query={"propagationPolicy": "Background"}, asked=f"delete {kind} {name}")
        except KubernetesError as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return False
            raise
        return True

    def log(
        self, pod: str, container: str, *, tail: int | None = None, previous: bool = False, follow: bool = False
    ) -> Iterator[str]:
        """Yield the log of a container in pieces of text.

        tail: its last lines alone; previous: of the container before it was restarted; follow: until it ends.
        """
        query = {"container": container, **({} if tail is None else {"tailLines": str(tail)})}
        query |= {name: "true" for name, given in (("previous", previous), ("follow", follow)) if given}
        path = f"/api/v1/namespaces/{quote(self.namespace)}/pods/{quote(pod)}/log"
        reply = self._request("GET", path, query=query, asked=f"read the log of Pod {pod}", timeout=(TIMEOUT[0], None))
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be in two pieces
        try:
            for piece in reply.response.stream(amt=None if follow else _PIECE):
                yield decoder.decode(piece)
            yield decoder.decode(b"", final=True)
        except urllib3.exceptions.HTTPError as error:
            raise KubernetesError(f"the log of Pod {pod} broke off: {error}; ask again") from error
        finally:
            reply.response.release_conn()

    def allows(self, verb: str, group: str, resource: str, *, subresource: str = "", name: str = "") -> bool:
        """Say whether whoever asks has a right in the namespace."""
        attributes = {
            "namespace": self.namespace,
            "verb": verb,
            "group": group,
            "resource": resource,
            "subresource": subresource,
            "name": name,
        }
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        answer = self._json("POST", path, body=review, asked="ask for a right")
        return bool(answer.get("status", {}).get("allowed"))

    def version(self) -> str:
        """Return the server's version, such as v1.34.4."""
        return str(self._json("GET", "/version", asked="ask for its version").get("gitVersion", "unknown"))

    def schemas(self, api_version: str) -> Json:
        """Return the server's schemas of an API version by name (OpenAPI 3)."""
        path = f"/openapi/v3/apis/{quote(api_version)}"
        content: Json = self._json("GET", path, asked="read its schemas").get("components", {}).get("schemas", {})
        return content

    def resource(self, api_version: str, kind: str) -> Resource | None:
        """Return where the objects of a kind are; None where the server does not have it."""
        if api_version not in self._resources:
            path = f"/api/{api_version}" if "/" not in api_version else f"/apis/{api_version}"
            try:
                found = self._json("GET", quote(path), asked=f"list the kinds of {api_version}")
            except KubernetesError as error:
                if error.status != HTTPStatus.NOT_FOUND:
                    raise
                found = {}
            self._resources[api_version] = {
                entry["kind"]: Resource(path, entry["name"], entry["namespaced"])
                for entry in found.get("resources") or ()  # None of them: it is no API version
                if "/" not in entry["name"]  # a part of a kind, such as pods/log
            }
        return self._resources[api_version].get(kind)

    def required(self, api_version: str, kind: str) -> Resource:
        """Return where the objects of a kind are; KubernetesError, which says what to install, without that kind."""
        resource = self.resource(api_version, kind)
        if resource is None:
            missing = (
                "KubeRay is not installed there" if api_version.startswith("ray.io/") else "install what brings it"
            )
            raise KubernetesError(
                f"the cluster of context {self.context} has no kind {kind} of {api_version}: {missing} "
                "(docs/operations.md, From nothing to a served adapter)",
                HTTPStatus.NOT_FOUND,
            )
        return resource

    def _addressed(self, document: Json) -> tuple[Resource, str | None, str]:
        metadata = document.get("metadata") or {}
        resource = self.required(document["apiVersion"], document["kind"])
        return resource, metadata.get("namespace") or None, metadata.get("name") or metadata.get("generateName") or ""

    def _path(self, resource: Resource, namespace: str | None, name: str | None = None) -> str:
        """Return the path of an object, or without a name of all."""
        where = self.namespace if namespace is None else namespace
        is_everywhere = name is None and where == ""
        inside = f"/namespaces/{_segment(where)}" if resource.namespaced and not is_everywhere else ""
        return f"{quote(resource.path)}{inside}/{resource.plural}" + ("" if name is None else f"/{_segment(name)}")

    def _json(self, method: str, path: str, *, asked: str, **request: Any) -> Json:
        reply = self._request(method, path, asked=asked, **request)
        with self._reached():
            data = reply.read()
        try:
            content = json.loads(data)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise KubernetesError(
                f"what answers at {self.server} (context {self.context}) is no API server of Kubernetes, or a proxy "
                f"before it, when asked to {asked}: {_short(data)!r}; check the context and the proxy"
            )
        return content

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:  # ValueError: a token that is no header
            cause = error.reason if isinstance(error, urllib3.exceptions.MaxRetryError) else error
            raise KubernetesError(
                f"the API server {self.server} of context {self.context} cannot be reached: {cause}; check the "
                "network, or give another --context"
            ) from error

    def _request(
        self,
        method: str,
        path: str,
        *,
        asked: str,
        query: Mapping[str, str] | None = None,
        body: Json | str | None = None,
        content: str = "application/json",
        timeout: tuple[float, float | None] = TIMEOUT,
    ) -> Any:
        if query:
            path = f"{path}?{urlencode(query)}"
        headers = {"Accept": "application/json", **({} if body is None else {"Content-Type": content})}
        with self._reached():
            serialized = self._client.param_serialize(
                method, path, header_params=headers, body=body, auth_settings=["BearerToken"]
            )
            reply = self._client.call_api(*serialized, _request_timeout=timeout)
            self._read_clock(reply)
            refused = reply.read() or b"" if reply.status >= HTTPStatus.BAD_REQUEST else None
        if refused is not None:
            raise self._refusal(reply.status, refused, asked)
        return reply

    def _read_clock(self, reply: Any) -> None:
        with suppress(TypeError, ValueError, OverflowError):  # no date, or one that a proxy has spoilt
            ahead = parsedate_to_datetime(reply.getheader("Date")) - datetime.now(UTC)
            # The date is in whole seconds, and a reply is under way for a while.
            self._ahead = ahead if abs(ahead) > CLOCKS_AGREE else timedelta()

    def _refusal(self, status: int, body: bytes, asked: str) -> KubernetesError:
        causes: list[tuple[str, str]] = []
        try:
            answer = json.loads(body)
            reason = str(answer["message"])
            named = (answer.get("details") or {}).get("causes") or ()
            causes = [(str(cause.get("field", "")), str(cause.get("message", ""))) for cause in named]
        except (ValueError, KeyError, TypeError, AttributeError):  # of a proxy
            reason = _short(body) or f"HTTP status {status}"
        where = f"context {self.context}, namespace {self.namespace}"
        if status == HTTPStatus.UNAUTHORIZED or (status == HTTPStatus.FORBIDDEN and _ANONYMOUS in reason):
            text = f"the API server {self.server} does not know who asks: log in to context {self.context} again"
        elif status == HTTPStatus.FORBIDDEN and "is forbidden: User" in reason:
            text = (
                f"a right is missing to {asked} ({where}): {reason}. Have yourself bound to a role that gives it (Role "
                f"{ROLE} of k8s/base, for jobs), or use another --context"
            )
        else:
            text = f"the API server refuses to {asked} ({where}): {reason}"
        return KubernetesError(text, status, reason=reason, causes=causes)


def open_api(context: str | None, namespace: str) -> Api:
    """Return the API server of a context of kubeconfig, by default the current one; in a pod, that of its cluster.

    Raises SpecError for a context that is not there or cannot be used, and for what cannot be a namespace.
    """
    check_namespace(namespace)
    configuration, name = find_server(context)
    configuration.retries = urllib3.Retry(
        2, backoff_factor=0.2, allowed_methods=["GET"], raise_on_status=False, retry_after_max=RETRY_AFTER
    )
    try:
        client = kubernetes.client.ApiClient(configuration)
    except (ImportError, ValueError, urllib3.exceptions.HTTPError) as error:  # of its proxy, its certificates
        raise SpecError(f"context {name} of kubeconfig cannot be used: {error}; correct it") from error
    return Api(client, name, namespace)


def unless_forbidden(look: Callable[[], Found]) -> Found | None:
    """Return what is there, None where whoever asks may not look."""
    try:
        return look()
    except KubernetesError as error:
        if error.status != HTTPStatus.FORBIDDEN:
            raise
        return None


def _segment(name: str) -> str:
    """Return a name as a part of a path; KubernetesError, with the status of what is not there, for none."""
    if not isinstance(name, str) or name in ("", ".", ".."):  # these would be the path of something else
        raise KubernetesError(f"{name!r} can be no name of an object", HTTPStatus.NOT_FOUND)
    return quote(name, safe="")


def _short(body: bytes) -> str:
    return " ".join(body[:200].decode(errors="replace").split())


def _dry(dry_run: bool) -> dict[str, str]:
    return {"dryRun": "All"} if dry_run else {}
