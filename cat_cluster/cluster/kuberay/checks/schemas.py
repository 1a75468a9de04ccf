"""The schemas of KubeRay's and Kubernetes' kinds, closed: a field that an API server would drop is an error here.

crds-<release>.json.xz hold those of KubeRay's custom resource definitions (Apache-2.0), with their version, source and
the sha256 of the original files. For another release, run this with a folder of its helm-chart/kuberay-operator/crds:

    python -m cat_cluster.cluster.kuberay.checks.schemas 1.7.0 FOLDER
"""

from __future__ import annotations

import functools
import hashlib
import json
import lzma
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

from cat_cluster.cluster.kuberay.checks.releases import NEWEST, Release
from cat_cluster.cluster.kuberay.checks.validation import Finding, SchemaCheck, bounded_integers, nearest
from cat_cluster.errors import ClusterError

KUBERNETES_VERSION = "1.33"  # the oldest that the manifests are written for
SHIPPED = Path(__file__).parent
SOURCE = "https://github.com/ray-project/kuberay, helm-chart/kuberay-operator/crds"
CRD_FILES = ("ray.io_rayclusters.yaml", "ray.io_raycronjobs.yaml", "ray.io_rayjobs.yaml", "ray.io_rayservices.yaml")
FETCH_SECONDS = 30
_TEXT = {"type": "string"}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}
# A CRD leaves the metadata open; the API server has a closed schema for it. The last line is what a live object has.
_METADATA = {
    "type": "object",
    "properties": {
        **dict.fromkeys(("name", "generateName", "namespace"), _TEXT),
        **dict.fromkeys(("labels", "annotations"), _TEXTS),
        "finalizers": {"type": "array", "items": _TEXT},
        "ownerReferences": {"type": "array", "items": {"type": "object"}},
        **dict.fromkeys(("creationTimestamp", "generation", "managedFields", "resourceVersion", "uid"), True),
    },
    "additionalProperties": False,
}

# What Kubernetes' schemas call required, and an API server fills in, or takes as 0, "" or everything.
_DEFAULTED = {
    "io.k8s.api.core.v1.HTTPHeader": "value",
    "io.k8s.api.core.v1.SleepAction": "seconds",
    "io.k8s.api.core.v1.Sysctl": "value",
    "io.k8s.api.networking.v1.NetworkPolicySpec": "podSelector",
    "io.k8s.api.rbac.v1.RoleRef": "apiGroup",
    "io.k8s.api.scheduling.v1.PriorityClass": "value",
}
_REFERENCE = "/api/_definitions.json#"  # in the schemas of kubernetes-validate


@dataclass(frozen=True)
class Schemas:
    """Closed schemas of custom kinds by "apiVersion kind"; those of Kubernetes' own kinds are always there."""

    custom: Mapping[str, Any]
    _checks: dict[str, SchemaCheck] = field(default_factory=dict, compare=False, repr=False)

    def knows(self, document: Mapping[str, Any]) -> bool:
        """Say whether the kinds of the document's API group are known, so that one that is not there is a mistake."""
        group, slash, _ = document["apiVersion"].partition("/")
        return not slash or "." not in group or group in _groups(*self.custom)  # a custom group has a point

    def findings(self, document: Mapping[str, Any]) -> Iterator[Finding]:
        """Yield what the schema of the document's kind refuses, each at its path; nothing of groups not known.

        Raises ClusterError for a schema that is none.
        """
        api, kind = document["apiVersion"], document["kind"]
        key = f"{api} {kind}"
        if key in self.custom or key in _core():
            yield from self._check(key).findings(document)
        elif self.knows(document):
            kinds = [one.split()[1] for one in (*self.custom, *_core()) if one.split()[0] == api]
            yield (
                ("kind",),
                f"{kind} of {api} is neither KubeRay's nor one of Kubernetes {KUBERNETES_VERSION}; "
                f"{nearest(kind, kinds) if kinds else 'correct the apiVersion'}",
            )

    def _check(self, key: str) -> SchemaCheck:
        if key not in self._checks:
            custom = key in self.custom
            schema = self.custom[key] if custom else {"$ref": f"#/$defs/{_core()[key]}", "$defs": _definitions()}
            try:
                self._checks[key] = SchemaCheck(schema, map_keys=custom)
            except ValueError as error:
                reason = str(error).partition("\n")[0]
                raise ClusterError(f"--crds: the schema of {key} cannot be used: {reason}; correct it") from error
        return self._checks[key]


def load_schemas(source: str | None = None, release: Release = NEWEST) -> Schemas:
    """Return the schemas of the CRDs in a folder or below an https:// address; None means those of a known release.

    Raises ClusterError for a source that cannot be read or holds no CRD.
    """
    if source is None:
        return Schemas(shipped(release)["schemas"])
    texts = _fetched(source) if "://" in source else _read(Path(source))
    custom = {key: schema for name, text in texts.items() for key, schema in closed_schemas(name, text)}
    if not custom:
        raise ClusterError(
            f"--crds {source}: holds no CustomResourceDefinition; name a folder of KubeRay's CRDs, such as its "
            "helm-chart/kuberay-operator/crds, or leave the option out"
        )
    return Schemas(custom)


@functools.cache
def shipped(release: Release = NEWEST) -> dict[str, Any]:
    """Return what this package has of a release: version, source, licence, sha256 by file name, and schemas."""
    content: dict[str, Any] = json.loads(lzma.decompress((SHIPPED / f"crds-{release}.json.xz").read_bytes()))
    return content


def ship(version: str, folder: Path, target: Path = SHIPPED) -> None:
    """Write the schemas of the CRDs in a folder, those of a KubeRay version, to the file of its release."""
    texts = {name: (folder / name).read_bytes() for name in CRD_FILES}
    content = {
        "source": f"{SOURCE} at v{version}",
        "version": version,
        "licence": "Apache-2.0",
        "sha256": {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()},
        "schemas": {key: schema for name, text in texts.items() for key, schema in closed_schemas(name, text)},
    }
    text = json.dumps(content, separators=(",", ":"))
    path = target / f"crds-{version.rpartition('.')[0]}.json.xz"
    path.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def closed_schemas(name: str, text: bytes) -> Iterator[tuple[str, Any]]:
    """Yield "apiVersion kind" and closed schema for each version in a file of CRDs; raises ClusterError for no YAML."""
    try:
        documents = list(yaml.load_all(text, Loader=yaml.CSafeLoader))
    except (yaml.YAMLError, ValueError) as error:
        raise ClusterError(f"--crds: {name} is not YAML: {error}") from error
    for document in documents:
        if not isinstance(document, dict) or document.get("kind") != "CustomResourceDefinition":
            continue
        try:
            spec = document["spec"]
            for version in spec["versions"]:
                schema = _close(bounded_integers(version["schema"]["openAPIV3Schema"]))
                schema["properties"] |= {"apiVersion": _TEXT, "kind": _TEXT, "metadata": _METADATA}
                yield f"{spec['group']}/{version['name']} {spec['names']['kind']}", schema
        except (KeyError, TypeError) as error:
            raise ClusterError(
                f"--crds: {name} holds a CustomResourceDefinition without {error}; correct it"
            ) from error


def _read(folder: Path) -> dict[str, bytes]:
    try:
        return {str(path): path.read_bytes() for path in sorted(folder.glob("*.y*ml"))}
    except OSError as error:
        raise ClusterError(f"--crds {folder}: cannot be read: {error.strerror}") from error


def _fetched(address: str) -> dict[str, bytes]:
    if not address.startswith("https://"):
        raise ClusterError(f"--crds {address}: must be https:// or a folder")
    texts = {}
    for name in CRD_FILES:
        try:
            with urllib.request.urlopen(f"{address.rstrip('/')}/{name}", timeout=FETCH_SECONDS) as response:
                texts[name] = response.read()
        except urllib.error.HTTPError as error:
            if error.code != 404:  # an older release has fewer kinds
                raise ClusterError(f"--crds {address}: {name} cannot be fetched ({error})") from error
        except (OSError, ValueError) as error:
            raise ClusterError(f"--crds {address}: {name} cannot be fetched ({error}); or give a folder") from error
    return texts


def _close(schema: Any) -> Any:
    """Return an openAPIV3Schema as a JSON schema that refuses unknown fields, but for those it asks to preserve."""
    if isinstance(schema, list):
        return [_close(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        word: {name: _close(part) for name, part in value.items()} if word == "properties" else _close(value)
        for word, value in schema.items()
        if word not in ("description", "example", "format", "x-kubernetes-validations")
    }
    properties = kept.get("properties", {})
    if properties.get("metadata") == {"type": "object"}:
        properties["metadata"] = _METADATA
    if "required" in kept:  # the API server fills in defaults first
        kept["required"] = [name for name in kept["required"] if "default" not in properties.get(name, {})]
    if schema.get("x-kubernetes-int-or-string"):
        kept.pop("anyOf", None)
        kept["type"] = ["integer", "string"]
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and not is_open:
        kept["additionalProperties"] = False
    return kept


@functools.cache
def _core() -> Mapping[str, str]:
    """Return the name of the definition of each of Kubernetes' own kinds, by "apiVersion kind"."""
    return {
        f"{one['group']}/{one['version']} {one['kind']}".removeprefix("/"): name
        for name, schema in _definitions().items()
        for one in schema.get("x-kubernetes-group-version-kind", ())
    }


@functools.cache
def _definitions() -> Mapping[str, Any]:
    """Return Kubernetes' schemas, as kubernetes-validate has them; its `validate` reads them again each time."""
    folder = resources.files(kubernetes_validate) / "kubernetes-json-schema"
    names = [one.name for one in folder.iterdir()]
    (name,) = (name for name in names if name.startswith(f"v{KUBERNETES_VERSION}.") and name.endswith("-local-strict"))
    text = (folder / name / "_definitions.json").read_text(encoding="utf-8").replace(_REFERENCE, "#")
    definitions: Mapping[str, Any] = bounded_integers(json.loads(text)["$defs"])
    for name, left_out in _DEFAULTED.items():
        required = definitions[name].get("required", [])  # later versions of Kubernetes mend some
        definitions[name]["required"] = [one for one in required if one != left_out]
    return definitions


@functools.cache
def _groups(*custom: str) -> frozenset[str]:
    return frozenset(key.split("/")[0] for key in (*custom, *_core()) if "/" in key)


if __name__ == "__main__":
    ship(sys.argv[1], Path(sys.argv[2]))
