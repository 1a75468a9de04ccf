"""The schemas of KubeRay's and Kubernetes' kinds, closed: what an API server would drop in silence is an error here."""

from __future__ import annotations

import difflib
import hashlib
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend

from cat_cluster.errors import ClusterError
from cat_cluster.files import write_whole

KUBERAY_VERSION = "1.7.0"
KUBERNETES_VERSION = "1.33"  # the oldest that the manifests are written for
CRDS_URL = f"https://raw.githubusercontent.com/ray-project/kuberay/v{KUBERAY_VERSION}/helm-chart/kuberay-operator/crds"
# sha256 of the files of that release.
CRD_FILES = {
    "ray.io_rayclusters.yaml": "c44704442eef0c6721ad40c1d66782c8bd3fdab9d3344306a5820910a679baa1",
    "ray.io_rayjobs.yaml": "01a5cf3b17c1769fda44af7e82debcd98722f0c27b9ab84d084681c6649121f5",
    "ray.io_rayservices.yaml": "0a8fc325e6e22b9231c1f282b309555e2ecf94227ca20a03df3d1d9a403907ab",
}
FETCH_SECONDS = 30
MOST_BYTES = 16 * 2**20
_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
# What a document may say of itself. A CRD leaves it open, and the API server has its own idea of it.
_METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "generateName": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": _STRINGS,
        "annotations": _STRINGS,
        "finalizers": {"type": "array", "items": {"type": "string"}},
        "ownerReferences": {"type": "array", "items": {"type": "object"}},
    },
    "additionalProperties": False,
}

Path_ = tuple[str | int, ...]
Finding = tuple[Path_, str]


@dataclass(frozen=True)
class Schemas:
    """Validators by (apiVersion, kind): those of the CRDs that were read, and of Kubernetes' own kinds on demand."""

    custom: Mapping[tuple[str, str], Any]

    def findings(self, document: Mapping[str, Any]) -> Iterator[Finding]:
        """Yield what the schema of the document's kind refuses, each at its path.

        Raises ClusterError when Kubernetes' own schemas are needed and not installed.
        """
        kind = (str(document["apiVersion"]), str(document["kind"]))
        if kind in self.custom:
            for error in self.custom[kind].iter_errors(document):
                yield from _explained(error)
        else:
            yield from _core_findings(document)


def load_schemas(source: str | None, cache_dir: Path) -> Schemas:
    """Return the schemas of the CRDs in a folder or below a URL; None means the pinned KubeRay release.

    What a URL gives is kept in `cache_dir`. Raises ClusterError for a source that cannot be read or holds no CRD.
    """
    if source is None or "://" in source:
        texts = _fetched(source or CRDS_URL, cache_dir, CRD_FILES if source is None else {})
    else:
        folder = Path(source)
        try:
            texts = {str(path): path.read_bytes() for path in sorted(folder.glob("*.y*ml"))}
        except OSError as error:
            raise ClusterError(f"--crds {source}: cannot be read: {error.strerror}") from error
    custom: dict[tuple[str, str], Any] = {}
    for name, text in texts.items():
        custom.update(_validators(name, text))
    if not custom:
        raise ClusterError(
            f"--crds {source}: holds no CustomResourceDefinition; name a folder of KubeRay's CRDs, such as its "
            "helm-chart/kuberay-operator/crds, or leave the option out"
        )
    return Schemas(custom)


def nearest(name: str, known: Mapping[str, Any] | list[str]) -> str:
    """Return the end of a message about an unknown name: what was probably meant, or what there is."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    return f"here may be {', '.join(sorted(known))}" if known else "nothing may be here"


def _fetched(url: str, cache_dir: Path, digests: Mapping[str, str]) -> dict[str, bytes]:
    """Return the files of KubeRay's three kinds below a URL, from the cache where they are there."""
    if not url.startswith("https://"):
        raise ClusterError(f"--crds {url}: only https:// is fetched from; or give a folder")
    place = cache_dir / "kuberay-crds" / hashlib.sha256(url.encode()).hexdigest()[:16]
    texts = {}
    for name in CRD_FILES:
        kept = place / name
        text = kept.read_bytes() if kept.is_file() else _fetch(f"{url.rstrip('/')}/{name}")
        if name in digests and hashlib.sha256(text).hexdigest() != digests[name]:
            raise ClusterError(
                f"{kept if kept.is_file() else url}: {name} is not the file of KubeRay {KUBERAY_VERSION}: its sha256 "
                "differs; delete it if it is in the cache, or give a folder with --crds"
            )
        if not kept.is_file():
            write_whole(kept, text)
        texts[name] = text
    return texts


def _fetch(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=FETCH_SECONDS) as answer:
            text: bytes = answer.read(MOST_BYTES + 1)
    except (OSError, urllib.error.URLError, ValueError) as error:
        raise ClusterError(
            f"{url}: cannot be fetched ({error}); without a network give a folder of KubeRay {KUBERAY_VERSION}'s CRDs "
            "with --crds"
        ) from error
    if len(text) > MOST_BYTES:
        raise ClusterError(f"{url}: is larger than {MOST_BYTES >> 20} MiB, which no CRD is; check --crds")
    return text


def _validators(name: str, text: bytes) -> Iterator[tuple[tuple[str, str], Any]]:
    try:
        documents = list(yaml.load_all(text, Loader=yaml.CSafeLoader))
    except (yaml.YAMLError, ValueError) as error:
        raise ClusterError(f"--crds: {name} is not YAML: {error}") from error
    for document in documents:
        if not isinstance(document, dict) or document.get("kind") != "CustomResourceDefinition":
            continue
        spec = document["spec"]
        for version in spec["versions"]:
            schema = close(version["schema"]["openAPIV3Schema"], root=True)
            key = (f"{spec['group']}/{version['name']}", str(spec["names"]["kind"]))
            yield key, _Strict(schema)


def close(schema: Any, *, root: bool = False) -> Any:
    """Return an openAPIV3Schema as a JSON schema that refuses unknown fields, but for those it asks to preserve."""
    if isinstance(schema, list):
        return [close(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        word: {name: close(part) for name, part in value.items()} if word == "properties" else close(value)
        for word, value in schema.items()
        if word not in ("description", "example", "format")
    }
    properties = kept.get("properties", {})
    if properties.get("metadata") == {"type": "object"}:
        properties["metadata"] = _METADATA
    if root:
        properties.update({"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": _METADATA})
        kept["required"] = sorted({"apiVersion", "kind", "metadata", *kept.get("required", [])})
    if schema.get("x-kubernetes-int-or-string"):
        kept.pop("anyOf", None)
        kept["type"] = ["integer", "string"]
    if schema.get("nullable") and "type" in kept:
        kept["type"] = [kept["type"], "null"]
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


_Strict: Callable[[Any], Any] = extend(Draft202012Validator, {"x-kubernetes-list-map-keys": _unique_items})


def _explained(error: ValidationError) -> Iterator[Finding]:
    """Turn a schema's error into findings: one for each unknown field, with what was probably meant."""
    path: Path_ = tuple(error.absolute_path)
    if error.validator == "additionalProperties" and isinstance(error.schema, dict):
        known = error.schema.get("properties", {})
        for name in error.instance:
            if name not in known and not any(
                re.search(pattern, str(name)) for pattern in error.schema.get("patternProperties", {})
            ):
                yield (*path, str(name)), f"unknown field; {nearest(str(name), known)}"
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
        import kubernetes_validate
    except ImportError as error:
        raise ClusterError(
            "the schemas of Kubernetes' own kinds are not installed, and a "
            f"{document['kind']} needs them: pip install 'cat-cluster[k8s]'"
        ) from error
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
