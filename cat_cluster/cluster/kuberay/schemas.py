"""The schemas of KubeRay's and Kubernetes' kinds, closed: a field that an API server would drop is an error here.

crds.json.xz holds those of KubeRay's custom resource definitions (Apache-2.0), with their version, source and the
sha256 of the original files. For another release, run this with a folder of its helm-chart/kuberay-operator/crds:

    python -m cat_cluster.cluster.kuberay.schemas 1.7.0 FOLDER
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import lzma
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend

from cat_cluster.errors import ClusterError

KUBERNETES_VERSION = "1.33"  # the oldest that the manifests are written for
SHIPPED = Path(__file__).with_name("crds.json.xz")
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

FieldPath = tuple[str | int, ...]
Finding = tuple[FieldPath, str]


@dataclass(frozen=True)
class Schemas:
    """Closed schemas of custom kinds by "apiVersion kind"; those of Kubernetes' own kinds are always there."""

    custom: Mapping[str, Any]

    def findings(self, document: Mapping[str, Any]) -> Iterator[Finding]:
        """Yield what the schema of the document's kind refuses, each at its path."""
        schema = self.custom.get(f"{document['apiVersion']} {document['kind']}")
        if schema is None:
            yield from _core_findings(document)
            return
        for error in _Validator(schema).iter_errors(document):
            yield from _explained(error)


def load_schemas(source: str | None = None) -> Schemas:
    """Return the schemas of the CRDs in a folder or below an https:// address; None means those of this package.

    Raises ClusterError for a source that cannot be read or holds no CRD.
    """
    if source is None:
        return Schemas(shipped()["schemas"])
    texts = _fetched(source) if "://" in source else _read(Path(source))
    custom = {key: schema for name, text in texts.items() for key, schema in closed_schemas(name, text)}
    if not custom:
        raise ClusterError(
            f"--crds {source}: holds no CustomResourceDefinition; name a folder of KubeRay's CRDs, such as its "
            "helm-chart/kuberay-operator/crds, or leave the option out"
        )
    return Schemas(custom)


@functools.cache
def shipped() -> dict[str, Any]:
    """Return what crds.json.xz holds: version, source, licence, sha256 by file name, and schemas."""
    content: dict[str, Any] = json.loads(lzma.decompress(SHIPPED.read_bytes()))
    return content


def ship(version: str, folder: Path, target: Path = SHIPPED) -> None:
    """Write the schemas of the CRDs in a folder, those of a KubeRay release, to the file of this package."""
    texts = {name: (folder / name).read_bytes() for name in CRD_FILES}
    content = {
        "source": f"{SOURCE} at v{version}",
        "version": version,
        "licence": "Apache-2.0",
        "sha256": {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()},
        "schemas": {key: schema for name, text in texts.items() for key, schema in closed_schemas(name, text)},
    }
    text = json.dumps(content, separators=(",", ":"))
    target.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def closed_schemas(name: str, text: bytes) -> Iterator[tuple[str, Any]]:
    """Yield "apiVersion kind" and closed schema for each version in a file of CRDs; raises ClusterError for no YAML."""
    try:
        documents = list(yaml.load_all(text, Loader=yaml.CSafeLoader))
    except (yaml.YAMLError, ValueError) as error:
        raise ClusterError(f"--crds: {name} is not YAML: {error}") from error
    for document in documents:
        if not isinstance(document, dict) or document.get("kind") != "CustomResourceDefinition":
            continue
        spec = document["spec"]
        for version in spec["versions"]:
            schema = _close(version["schema"]["openAPIV3Schema"])
            schema["properties"] |= {"apiVersion": _TEXT, "kind": _TEXT, "metadata": _METADATA}
            yield f"{spec['group']}/{version['name']} {spec['names']['kind']}", schema


def nearest(name: str, known: Mapping[str, Any] | list[str]) -> str:
    """Return the end of a message about an unknown name: what was probably meant, or what there is."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    return f"here may be {', '.join(sorted(known))}" if known else "nothing may be here"


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


def _unique_items(
    validator: Any, keys: list[str], instance: Any, schema: Mapping[str, Any]
) -> Iterator[ValidationError]:
    """An API server refuses two items of a list with the same keys; a key that is left out has its default."""
    if not isinstance(instance, list):
        return
    properties = schema.get("items", {}).get("properties", {})
    seen = set()
    for index, item in enumerate(instance):
        if not isinstance(item, dict):
            continue
        values = tuple(str(item.get(key, properties.get(key, {}).get("default"))) for key in keys)
        if values in seen:
            what = ", ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
            yield ValidationError(f"is the second with {what}; each may be there once", path=[index])
        seen.add(values)


_Validator: Callable[[Any], Any] = extend(Draft202012Validator, {"x-kubernetes-list-map-keys": _unique_items})


def _explained(error: ValidationError) -> Iterator[Finding]:
    """Turn a schema's error into findings: one for each unknown field, with what was probably meant."""
    path: FieldPath = tuple(error.absolute_path)
    if error.validator == "additionalProperties" and isinstance(error.schema, dict):
        known = error.schema.get("properties", {})
        patterns = error.schema.get("patternProperties", {})
        for name in map(str, error.instance):
            if name not in known and not any(re.search(pattern, name) for pattern in patterns):
                yield (*path, name), f"unknown field; {nearest(name, known)}"
    elif error.validator == "required":
        for name in error.validator_value:
            if name not in error.instance:
                yield (*path, str(name)), "is missing, and required"
    elif error.validator == "type":
        wanted = error.validator_value if isinstance(error.validator_value, list) else [error.validator_value]
        yield path, f"must be {' or '.join(wanted)}, got {error.instance!r:.80}"
    elif error.validator == "enum":
        yield path, f"{error.instance!r:.80} is not one of {', '.join(map(str, error.validator_value))}"
    elif error.validator == "pattern":
        yield path, f"{error.instance!r:.80} does not match {error.validator_value}"
    else:
        yield path, error.message[:200]


def _core_findings(document: Mapping[str, Any]) -> Iterator[Finding]:
    try:
        kubernetes_validate.validate(dict(document), KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield from _explained(error)
    except kubernetes_validate.SchemaNotFoundError:
        yield (
            ("kind",),
            f"{document['kind']} of {document['apiVersion']} is neither KubeRay's nor one of Kubernetes "
            f"{KUBERNETES_VERSION}; correct it, or put its CRD in the folder of --crds",
        )


if __name__ == "__main__":
    ship(sys.argv[1], Path(sys.argv[2]))
