"""The manifest: all that is recorded about one revision of an adapter, and the digest that names the revision."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from cat_cluster.errors import RegistryError
from cat_cluster.spec.choices import RevisionStatus
from cat_cluster.spec.imported import ImportedAdapter
from cat_cluster.spec.job import ResolvedAdapter

if TYPE_CHECKING:
    from cat_cluster.lora.formats import AdapterWeights

SCHEMA_VERSION = 1
WEIGHTS = "weights"  # the name of the weights among a manifest's objects
TEXT_LAYERS = "text_encoder_layers"  # what its training counts, where any are changed


@dataclass(frozen=True)
class AdapterDraft:
    """What training and evaluation hand over to be published.

    image_digests: sha256 of every training image, in training order; samples: file name -> bytes of example pictures;
    a draft whose quality gate failed has status "rejected" and never becomes `latest`; training_version: see
    revision_of.
    """

    adapter_id: str
    resolved: ResolvedAdapter | ImportedAdapter
    base_name: str
    base_fingerprint: str
    image_digests: Sequence[str]
    weights: AdapterWeights
    training: Mapping[str, Any]
    metrics: Mapping[str, Any] | None = None
    judge: Mapping[str, Any] | None = None
    reference: Mapping[str, Any] | None = None
    samples: Mapping[str, bytes] = field(default_factory=dict)
    status: RevisionStatus = "published"
    training_version: int = 0

    @property
    def revision(self) -> str:
        """The name of the revision that it becomes."""
        return revision_of(
            self.adapter_id, self.resolved, self.image_digests, self.base_fingerprint, self.training_version
        )


class StoredObject(BaseModel):
    """Where an object of a revision lies, its size in bytes and its digest."""

    model_config = ConfigDict(frozen=True)

    key: str = Field(pattern=r"^objects/[0-9a-f]{64}(\.[A-Za-z0-9]{1,16})?$")
    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class ManifestConcept(BaseModel):
    """A concept as it was trained: its token, class noun, CAT weight alpha and loss weight (None: not known)."""

    model_config = ConfigDict(frozen=True)

    token: str
    class_noun: str
    alpha: float | None
    weight: float | None


class _Scores(BaseModel):
    """What is read of a manifest's metrics: scores by name, and the ends of their intervals."""

    model_config = ConfigDict(strict=True, extra="allow")

    kps: float | None = None
    base_drift: float | None = None
    intervals: dict[str, Annotated[list[float | None], Field(min_length=2, max_length=2)] | None] | None = None


class _JudgeName(BaseModel):
    """What is read of a manifest's judge."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: str | None = None
    digest: str | None = None


class _DecoyReference(BaseModel):
    """How far a word that was never taught moves the base's images, with the seeds of these pairs."""

    model_config = ConfigDict(strict=True, extra="allow")

    word: str
    pairs: list[int]
    drift: list[float | None]


class _ConceptReference(BaseModel):
    """What later drift of a concept is measured against: embeddings of its photos [M, F], and scores per pair [N]."""

    model_config = ConfigDict(strict=True, extra="allow")

    photos: list[list[float | None]] | None = None
    kps: list[float | None] | None = None
    identity: list[float | None] | None = None
    base_drift: list[float | None] | None = None
    decoy: _DecoyReference | None = None


class _DriftReference(BaseModel):
    """What is read of a manifest's reference."""

    model_config = ConfigDict(strict=True, extra="allow")

    judge: _JudgeName | None = None
    concepts: dict[str, _ConceptReference] | None = None


def _shaped_as(model: type[BaseModel]) -> AfterValidator:
    """Return the validator of a document that is kept as it is, whatever else of other versions is in it."""

    def check(document: dict[str, Any] | None) -> dict[str, Any] | None:
        if document is not None:
            model.model_validate(document)
        return document

    return AfterValidator(check)


def _is_time(text: str) -> str:
    try:
        datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError) as error:
        raise ValueError(f"not a time: {error}") from None
    return text


class ManifestHead(BaseModel):
    """What a listing shows of a revision: its manifest without spec, objects, loss curves and embeddings."""

    model_config = ConfigDict(frozen=True)

    adapter_id: str
    revision: str
    status: RevisionStatus
    created: Annotated[str, AfterValidator(_is_time)]
    base_name: str
    base_fingerprint: str
    method: str
    rank: int = Field(ge=1)
    targets: str
    concepts: tuple[ManifestConcept, ...]
    metrics: Annotated[dict[str, Any] | None, _shaped_as(_Scores)]
    judge: Annotated[dict[str, Any] | None, _shaped_as(_JudgeName)]
    samples: tuple[str, ...]

    @property
    def name(self) -> str:
        """The revision's full reference, `id@r-...`."""
        return f"{self.adapter_id}@{self.revision}"


class Manifest(ManifestHead):
    """The immutable record of one revision; `checksum` is the sha256 of its other fields as canonical JSON."""

    schema_version: Literal[1]
    spec: dict[str, Any]
    image_digests: tuple[str, ...]
    objects: dict[str, StoredObject]
    training: dict[str, Any]
    reference: Annotated[dict[str, Any] | None, _shaped_as(_DriftReference)]
    package_version: str
    checksum: str

    @property
    def head(self) -> ManifestHead:
        """What a listing shows of it."""
        return ManifestHead.model_construct(**{name: getattr(self, name) for name in ManifestHead.model_fields})

    @property
    def text_layers(self) -> int:
        """How many layers of text encoders it changes."""
        count = self.training.get(TEXT_LAYERS, 0)
        return count if type(count) is int else 0

    @property
    def settings(self) -> ResolvedAdapter | ImportedAdapter:
        """What `spec` records: the settings of a trained adapter, or what is known of an imported one.

        RegistryError for what this cat-cluster cannot read, as of a later version.
        """
        kind = ImportedAdapter if self.method == "imported" else ResolvedAdapter
        try:
            return kind.model_validate(self.spec)
        except ValidationError as error:
            bad = ", ".join(".".join(str(part) for part in problem["loc"]) for problem in error.errors())
            raise RegistryError(
                f"the spec of {self.name} cannot be read (fields {bad}): it was published by cat-cluster "
                f"{self.package_version}, use that version or a later one"
            ) from error


def package_version() -> str:
    """Return the installed version of cat-cluster; RegistryError when only its source is on the path."""
    try:
        return importlib.metadata.version("cat-cluster")
    except importlib.metadata.PackageNotFoundError as error:
        raise RegistryError(
            "cat-cluster runs from source without being installed, so its version is unknown and cannot be recorded: "
            "run `pip install -e .` in its folder"
        ) from error


def revision_of(
    adapter_id: str,
    resolved: ResolvedAdapter | ImportedAdapter,
    image_digests: Sequence[str],
    base_fingerprint: str,
    training_version: int = 0,
) -> str:
    """Return `r-` + 12 hex of sha256(adapter id, resolved spec, image bytes, base fingerprint, training version).

    training_version: of the arithmetic that trained the adapter; 0 where it was trained elsewhere.
    """
    identity = {
        "adapter_id": adapter_id,
        "base_fingerprint": base_fingerprint,
        "image_digests": list(image_digests),
        # Version 2 began as minor version 0.2 of the package, and revisions of that time are to be found.
        "minor_version": ["0", str(training_version)],
        "spec": resolved.digest(),
    }
    return f"r-{sha256(_canonical(identity))[:12]}"


def manifest_bytes(draft: AdapterDraft, *, revision: str, created: str, objects: Mapping[str, StoredObject]) -> bytes:
    """Return the manifest of a draft as the JSON that is stored; numbers that are not finite become null."""
    resolved, text_layers = draft.resolved, len(draft.weights.of_text.layers)
    fields = {
        "schema_version": SCHEMA_VERSION,
        "adapter_id": draft.adapter_id,
        "revision": revision,
        "status": draft.status,
        "created": created,
        "base_name": draft.base_name,
        "base_fingerprint": draft.base_fingerprint,
        "method": resolved.method,
        "rank": draft.weights.rank,
        "targets": "as imported" if isinstance(resolved, ImportedAdapter) else resolved.training.targets,
        "concepts": [
            {"token": c.token, "class_noun": c.class_noun, "alpha": c.alpha, "weight": c.weight}
            for c in resolved.concepts
        ],
        "spec": resolved.model_dump(mode="json"),
        "image_digests": list(draft.image_digests),
        "objects": {name: stored.model_dump() for name, stored in objects.items()},
        "training": {**draft.training, **({TEXT_LAYERS: text_layers} if text_layers else {})},
        "metrics": draft.metrics,
        "judge": draft.judge,
        "reference": draft.reference,
        "samples": sorted(draft.samples),
        "package_version": package_version(),
    }
    try:
        plain = _plain(fields)
    except TypeError as error:
        raise RegistryError(f"the manifest of {draft.adapter_id} cannot be written as JSON: {error}") from error
    plain["checksum"] = sha256(_canonical(plain))
    return json.dumps(plain, indent=1, allow_nan=False, ensure_ascii=False).encode()


def parse_manifest(data: bytes, *, key: str, adapter_id: str, revision: str) -> Manifest:
    """Return the manifest stored under a key; RegistryError when it is damaged, newer, or of another revision."""
    remedy = f"restore {key} from a backup, or delete {adapter_id}@{revision} and train its spec again"
    try:
        fields = json.loads(data)
        # This refuses what no JSON can hold, and no response: infinities, nesting without end and half a character.
        content = _canonical(
            {k: v for k, v in fields.items() if k != "checksum"} if isinstance(fields, dict) else fields
        )
        if b"\\ud" in content:
            json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RegistryError(f"the manifest {key} is damaged (not JSON: {error}); {remedy}") from error
    if not isinstance(fields, dict):
        raise RegistryError(f"the manifest {key} is damaged (not a JSON object); {remedy}")
    version = fields.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise RegistryError(
            f"the manifest {key} has schema version {version}, this cat-cluster reads up to "
            f"{SCHEMA_VERSION}: upgrade it"
        )
    if fields.get("checksum") != sha256(content):
        raise RegistryError(f"the manifest {key} was changed after it was published (its checksum differs); {remedy}")
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        bad = ", ".join(".".join(str(part) for part in problem["loc"]) for problem in error.errors())
        raise RegistryError(f"the manifest {key} is damaged (fields {bad}); {remedy}") from error
    if (manifest.adapter_id, manifest.revision) != (adapter_id, revision):
        raise RegistryError(f"the manifest {key} belongs to {manifest.name}; {remedy}")
    return manifest


def sha256(data: bytes) -> str:
    """Return the sha256 of the bytes in hex."""
    return hashlib.sha256(data).hexdigest()


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _plain(value: Any) -> Any:
    """Return JSON's own types; a loss that became NaN is worth a null, not the loss of the whole adapter."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    raise TypeError(f"a {type(value).__name__} ({str(value)[:40]}) has no place in JSON; convert it first")
