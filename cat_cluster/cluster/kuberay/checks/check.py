"""Checking Kubernetes manifests before they are applied: schemas, KubeRay's own rules, the restricted profile."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cat_cluster.cluster.kuberay.checks.gates import DEFAULT_GATES
from cat_cluster.cluster.kuberay.checks.rules import MAX_NAME_LENGTH, full_name, operator_findings
from cat_cluster.cluster.kuberay.checks.schemas import Schemas
from cat_cluster.cluster.kuberay.checks.security import restricted_findings
from cat_cluster.cluster.kuberay.checks.validation import Finding
from cat_cluster.cluster.kuberay.checks.yaml_documents import load_documents
from cat_cluster.errors import SpecError

MAX_BYTES = 64 << 20
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

    They are read as Kubernetes reads them. Raises SpecError for what cannot be read, is not YAML, gives a key twice, or
    is far larger than any manifest.
    """
    documents = []
    for file in files:
        name = "stdin" if str(file) == "-" else str(file)
        try:
            contents = list(load_documents(_text(file, name)))
        except OSError as error:
            raise SpecError(f"{name}: cannot be read: {error.strerror}; give files of manifests, or -") from error
        except (yaml.YAMLError, ValueError) as error:
            raise SpecError(f"{name}: is not YAML: {' '.join(str(error).split())}; correct it") from error
        for number, content in enumerate(contents, 1):
            if content is None:
                continue
            if not isinstance(content, dict):
                raise SpecError(f"{name}: document {number}: must be a mapping with apiVersion and kind")
            items = content.get("items") if content.get("kind") == "List" else None
            for item in items if isinstance(items, list) else [content]:
                if not isinstance(item, dict):
                    raise SpecError(f"{name}: document {number}: a List holds mappings with apiVersion and kind")
                documents.append(Document(name, number, item))
    return documents


def check_manifests(
    documents: Sequence[Document], schemas: Schemas, *, restricted: bool = True, gates: Set[str] = DEFAULT_GATES
) -> list[ManifestFinding]:
    """Return what an API server, KubeRay's operator or a namespace of the restricted profile would not take.

    gates: the operator's feature gates that are on. A document that its schema refuses is not looked at further: the
    rules rely on its shape.
    """
    found = []
    for document in documents:
        content = without_nulls(document.content)
        findings = list(_shape_findings(content))
        findings = findings or list(schemas.findings(content))
        if not findings and schemas.knows(content):
            findings = list(_rule_findings(content, restricted=restricted, gates=gates))
        found += [
            ManifestFinding(document.file, document.number, document.title, field_text(path), message)
            for path, message in findings
        ]
    return found


def not_looked_at(
    documents: Sequence[Document],
    schemas: Schemas,
    *,
    restricted: bool = True,
    gates: Set[str] = DEFAULT_GATES,
    not_asked: Sequence[str] | None = None,
) -> list[str]:
    """Return what `check_manifests` cannot know of these documents, a phrase each.

    not_asked: what an API server could not be asked of them; None where none was asked.
    """
    assumed = f"whether the operator has these feature gates on, as is assumed (--gates): {', '.join(sorted(gates))}"
    if not_asked is not None:
        return [*not_asked, "whether images, Secrets, ConfigMaps and machines are there", assumed]
    contents = [document.content for document in documents]
    shaped = [one for one in contents if isinstance(one.get("apiVersion"), str) and isinstance(one.get("kind"), str)]
    unknown = sorted({f"{one['kind']} of {one['apiVersion']}" for one in shaped if not schemas.knows(one)})
    return [
        *([f"kinds without a schema here, {', '.join(unknown)} (--crds takes them)"] if unknown else []),
        *([] if restricted else ["pod security (--no-restricted)"]),
        "whether what the documents name is in the cluster: images, Secrets, ConfigMaps, accounts, nodes, quota",
        "what an API server finds in values alone, such as labels, quantities, ports, and mounts without a volume "
        "(--server asks one)",
        assumed,
    ]


def is_shaped(content: dict[str, Any]) -> bool:
    """Say whether a document names its kind and itself as an object must."""
    return next(_shape_findings(without_nulls(content)), None) is None


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


def _text(file: str | Path, name: str) -> str:
    if str(file) == "-":
        data = sys.stdin.buffer.read(MAX_BYTES + 1)
    else:
        with Path(file).open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise SpecError(f"{name}: is larger than {MAX_BYTES >> 20} MiB; check it in parts")
    return data.decode("utf-8-sig")


def without_nulls(value: Any) -> Any:
    """Return a value without the keys that hold nothing: the API server takes them as left out."""
    if isinstance(value, dict):
        return {key: without_nulls(below) for key, below in value.items() if below is not None}
    return [without_nulls(below) for below in value] if isinstance(value, list) else value


def _shape_findings(content: dict[str, Any]) -> Iterator[Finding]:
    for field, example in (("apiVersion", "ray.io/v1"), ("kind", "RayJob")):
        if not isinstance(content.get(field), str) or not content[field]:
            yield (field,), f"must be text, such as {example}"
    metadata = content.get("metadata")
    if not isinstance(metadata, dict):
        yield ("metadata",), "must be a mapping with the object's name"
        return
    field = "name" if metadata.get("name") or "generateName" not in metadata else "generateName"
    name = metadata.get(field)
    if not isinstance(name, str) or not _NAME.fullmatch(full_name(metadata)) or len(name) > 253:
        yield ("metadata", field), f"{name!r} is no {field} of an object: a-z, 0-9, - and ., at most 253 characters"


def _rule_findings(content: dict[str, Any], *, restricted: bool, gates: Set[str]) -> Iterator[Finding]:
    if content["apiVersion"].startswith("ray.io/") and content["kind"] in MAX_NAME_LENGTH:
        yield from operator_findings(content, gates)
    if restricted:
        yield from restricted_findings(content)
