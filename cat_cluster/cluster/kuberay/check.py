"""Checking Kubernetes manifests before they are applied: schemas, KubeRay's own rules, the restricted profile."""

from __future__ import annotations

import re
import sys
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cat_cluster.cluster.kuberay.rules import CLUSTERS, operator_findings
from cat_cluster.cluster.kuberay.schemas import Finding, Schemas
from cat_cluster.cluster.kuberay.security import restricted_findings
from cat_cluster.errors import SpecError
from cat_cluster.spec.yaml_bounds import check_bounds

MAX_VALUES, MAX_DEPTH = 100_000, 100  # of a document; a manifest here has fewer than 2,000, 20 deep
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.:]*[a-z0-9])?")  # a colon: roles may have one


@dataclass(frozen=True)
class Document:
    """One document of a file of manifests. number: its place there, from 1."""

    file: str
    number: int
    content: dict[str, Any]

    @property
    def title(self) -> str:
        """Kind and name, for people."""
        metadata = self.content.get("metadata")
        name = metadata.get("name", "without a name") if isinstance(metadata, dict) else "without a name"
        return f"{self.content.get('kind', 'no kind')} {name}"


@dataclass(frozen=True)
class ManifestFinding:
    """What is wrong at one field of one document, and what to do about it."""

    file: str
    document: int
    title: str
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}: document {self.document} ({self.title}): {self.field}: {self.message}"


def read_manifests(files: Iterable[str | Path]) -> list[Document]:
    """Return the documents of files of YAML or JSON, `-` being stdin; those of a List count one by one.

    Raises SpecError for what cannot be read, is not YAML, gives a key twice, or is far larger than any manifest.
    """
    documents = []
    for file in files:
        name = "stdin" if str(file) == "-" else str(file)
        try:
            text = sys.stdin.read() if str(file) == "-" else Path(file).read_text(encoding="utf-8")
            check_bounds(text, merges=True)
            contents = list(yaml.load_all(text, Loader=_Once))
        except OSError as error:
            raise SpecError(f"{name}: cannot be read: {error.strerror}; give files of manifests, or -") from error
        except (yaml.YAMLError, ValueError, TypeError) as error:
            raise SpecError(f"{name}: is not YAML: {' '.join(str(error).split())}; correct it") from error
        for number, content in enumerate(contents, 1):
            if content is None:
                continue
            if not isinstance(content, dict):
                raise SpecError(f"{name}: document {number}: must be a mapping with apiVersion and kind")
            if not _is_bounded(content):
                raise SpecError(
                    f"{name}: document {number}: is nested too deeply, or too large with its aliases expanded"
                )
            items = content.get("items") if content.get("kind") == "List" else None
            for item in items if isinstance(items, list) else [content]:
                if not isinstance(item, dict):
                    raise SpecError(f"{name}: document {number}: a List holds mappings with apiVersion and kind")
                documents.append(Document(name, number, item))
    return documents


def check_manifests(
    documents: Sequence[Document], schemas: Schemas, *, restricted: bool = True
) -> list[ManifestFinding]:
    """Return what an API server, KubeRay's operator or a namespace of the restricted profile would not take.

    A document that its schema refuses is not looked at further: the rules rely on its shape.
    """
    found = []
    for document in documents:
        content = _without_nulls(document.content)
        findings = list(_shape_findings(content))
        findings = findings or list(schemas.findings(content))
        findings = findings or list(_rule_findings(content, restricted=restricted))
        found += [
            ManifestFinding(document.file, document.number, document.title, field_text(path), message)
            for path, message in findings
        ]
    return found


def field_text(path: Sequence[str | int]) -> str:
    """Return a path as people write it, `spec.containers[0].image`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z0-9_-]+", part):
            text += f".{part}" if text else part
        else:
            text += f"[{part!r}]"
    return text or "the whole document"


def _is_bounded(content: Any) -> bool:
    """Whether a document can be walked through: aliases of aliases make a short text endless."""
    waiting, seen = [(content, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if seen > MAX_VALUES or depth > MAX_DEPTH:
            return False
        below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting += [(one, depth + 1) for one in below]
    return True


def _without_nulls(value: Any) -> Any:
    """Return a value without the keys that hold nothing: the API server takes them as left out."""
    if isinstance(value, dict):
        return {key: _without_nulls(below) for key, below in value.items() if below is not None}
    return [_without_nulls(below) for below in value] if isinstance(value, list) else value


def _shape_findings(content: dict[str, Any]) -> Iterator[Finding]:
    for field, example in (("apiVersion", "ray.io/v1"), ("kind", "RayJob")):
        if not isinstance(content.get(field), str) or not content[field]:
            yield (field,), f"must be text, such as {example}"
    metadata = content.get("metadata")
    if not isinstance(metadata, dict):
        yield ("metadata",), "must be a mapping with the object's name"
        return
    name = metadata.get("name", "generated" if metadata.get("generateName") else None)
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > 253:
        yield ("metadata", "name"), f"{name!r} is no name of an object: a-z, 0-9, - and ., at most 253 characters"


def _rule_findings(content: dict[str, Any], *, restricted: bool) -> Iterator[Finding]:
    if content["apiVersion"].startswith("ray.io/") and content["kind"] in CLUSTERS:
        yield from operator_findings(content)
    if restricted:
        yield from restricted_findings(content)


class _Once(yaml.CSafeLoader):
    """YAML whose mappings give no key twice, as the API server's strict decoder wants it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return the mapping; a repeated key is an error at its line."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice, the second time", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)
