"""The objects of a revision, named by their content: the weights, and the sample pictures."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from cat_cluster.errors import RegistryError
from cat_cluster.lora.formats import to_safetensors
from cat_cluster.registry.manifest import WEIGHTS, AdapterDraft, StoredObject, sha256
from cat_cluster.registry.references import object_key

PHOTO_PREFIX = "photo-"  # of the names of training photos, and of what belongs to them, among a revision's samples
_SAMPLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def draft_objects(draft: AdapterDraft, revision: str) -> dict[str, tuple[StoredObject, bytes]]:
    """Return name -> (where it will lie, its bytes) of a draft's weights and samples.

    Raises AdapterFormatError for weights that are not finite, RegistryError for a bad sample name.
    """
    draft.weights.check_finite()
    weights = to_safetensors(draft.weights, "diffusers", weights_metadata(draft, revision))
    objects = {WEIGHTS: (_stored(weights, ".safetensors"), weights)}
    for name, data in draft.samples.items():
        if name == WEIGHTS or not _SAMPLE_NAME.fullmatch(name):
            raise RegistryError(
                f"sample {name[:80]!r} of {draft.adapter_id} needs another name: up to 100 letters, digits and ._- , "
                f"not beginning with '.', and not {WEIGHTS!r}"
            )
        objects[name] = (_stored(data, PurePosixPath(name).suffix), data)
    return objects


def weights_metadata(draft: AdapterDraft, revision: str) -> dict[str, str]:
    """Return the safetensors header of published weights: our own record, and the ModelSpec fields others read.

    It holds no time of day, so the same weights always make the same object.
    """
    tokens = ", ".join(concept.token for concept in draft.resolved.concepts)
    return {
        "cat_cluster.adapter_id": draft.adapter_id,
        "cat_cluster.revision": revision,
        "cat_cluster.base_name": draft.base_name,
        "cat_cluster.base_fingerprint": draft.base_fingerprint,
        "cat_cluster.tokens": tokens,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": f"{draft.adapter_id}@{revision}",
        "modelspec.architecture": f"{draft.base_name}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.trigger_phrase": tokens,
    }


def _stored(data: bytes, suffix: str) -> StoredObject:
    digest = sha256(data)
    return StoredObject(key=object_key(digest, suffix), size=len(data), sha256=digest)
