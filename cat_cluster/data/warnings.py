"""What people should know of an adapter's photos and captions before it is trained."""

from __future__ import annotations

from collections.abc import Sequence

from cat_cluster.data.caption_changes import tag_warnings
from cat_cluster.data.concepts import Concept, folder_warnings
from cat_cluster.data.crops import crop_warnings
from cat_cluster.data.text_length import check_caption_lengths
from cat_cluster.models.text_limit import TextLimit
from cat_cluster.spec.sections import TrainingSpec


def concept_warnings(
    adapter_id: str, concepts: Sequence[Concept], training: TrainingSpec, limit: TextLimit | None
) -> tuple[str, ...]:
    """Return all warnings of an adapter's concepts, each with whose it is; limit: None where no tokenizer is at hand.

    Raises ConceptError as check_caption_lengths does.
    """
    return (
        *folder_warnings(adapter_id, concepts),
        *tag_warnings(adapter_id, concepts, training),
        *(() if limit is None else check_caption_lengths(adapter_id, concepts, limit, training)),
        *crop_warnings(adapter_id, concepts, training),
    )
