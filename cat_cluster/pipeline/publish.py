"""What is published of an adapter beside its weights: its photos and their digests, its measures, sample pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from cat_cluster.data.concepts import Concept, image_digests
from cat_cluster.evaluation.recognition import DESIGN_FILE
from cat_cluster.evaluation.results import Evaluation
from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.generate import png_of
from cat_cluster.registry import AdapterDraft
from cat_cluster.registry.objects import PHOTO_PREFIX
from cat_cluster.spec.choices import RevisionStatus
from cat_cluster.spec.imported import ImportedAdapter
from cat_cluster.spec.job import ResolvedAdapter

PHOTO_SIDE = 512  # photos are kept for measuring, and every judge looks at less
SAMPLES = 4


def adapter_draft(
    resolved: ResolvedAdapter | ImportedAdapter,
    base: BaseModel,
    concepts: Sequence[Concept],
    weights: AdapterWeights,
    evaluation: Evaluation | None,
    *,
    training: dict[str, Any],
    training_version: int = 0,
    status: RevisionStatus = "published",
) -> AdapterDraft:
    """Return what the registry publishes of an adapter.

    evaluation: None where it was not measured; training_version: 0 for an adapter that was trained elsewhere.
    """
    metrics = None if evaluation is None else evaluation.to_json()
    return AdapterDraft(
        adapter_id=resolved.id,
        resolved=resolved,
        base_name=base.name,
        base_fingerprint=base.fingerprint,
        image_digests=image_digests(concepts),
        weights=weights,
        training={"prediction_type": base.schedule.prediction_type, **training},
        metrics=metrics,
        judge=None if metrics is None else metrics["judge"],
        reference=None if evaluation is None else evaluation.reference(),
        samples={**photo_objects(concepts), **({} if evaluation is None else sample_objects(evaluation))},
        status=status,
        training_version=training_version,
    )


def photo_objects(concepts: Sequence[Concept]) -> dict[str, bytes]:
    """Return the photos an adapter was taught with, as objects of its revision: it can be measured anywhere later.

    Names are photo-<concept index>-<photo index>.png; a pocket concept's design goes along.
    """
    objects = {}
    for k, concept in enumerate(concepts):
        for n, example in enumerate(concept.examples):
            image = example.image.copy()
            image.thumbnail((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            objects[f"{PHOTO_PREFIX}{k}-{n:03d}.png"] = buffer.getvalue()
        design = concept.examples[0].path.parent / DESIGN_FILE
        if design.is_file():
            objects[f"{PHOTO_PREFIX}{k}-{DESIGN_FILE}"] = design.read_bytes()
    return objects


def sample_objects(evaluation: Evaluation) -> dict[str, bytes]:
    """Return a few pictures per concept for listings: with its token and, on the same seeds, without."""
    objects = {}
    for k, images in enumerate(evaluation.images):
        for name, pictures in (("with", images.with_token), ("without", images.without_token)):
            chosen = np.linspace(0, len(pictures) - 1, min(SAMPLES, len(pictures))).round().astype(int)
            for n, index in enumerate(chosen):
                objects[f"sample-{k}-{name}-{n}.png"] = png_of(pictures[index], {})
    return objects
