"""A job into the queue of a storage: its photos where everybody finds them, under the id that what it makes gives it.

Photos are read here, so what is needed for that is imported when it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from cat_cluster.runs.queue import enter
from cat_cluster.runs.run import Run, run_id_of
from cat_cluster.spec.job import AdapterSpec, JobSpec
from cat_cluster.store import ObjectStore


def enter_run(
    job: JobSpec,
    store: ObjectStore,
    *,
    owner: str,
    priority: int = 0,
    deadline: datetime | None = None,
    digests: Sequence[Sequence[str]] | None = None,
) -> tuple[Run, bool]:
    """Enter a job into the queue of a storage, for a training service; False where it waits or is worked on already.

    Its photos are stored first where the storage is no folder. digests: of its photos, as `image_digests_of` returns
    them, where another process has read them. Raises ConceptError for photos, RunError for a value out of bounds and
    when a driver outside of the queue is at work, StoreError.
    """
    store.check_access()
    run = Run(store, run_id_of(job, image_digests_of(job) if digests is None else digests))
    stored = with_stored_images(job, store).model_copy(update={"storage": store.url})
    _, is_new = enter(run, stored, owner=owner, priority=priority, deadline=deadline)
    return run, is_new


def image_digests_of(job: JobSpec, cache_dir: Path | None = None) -> list[list[str]]:
    """Return per adapter the digests of its photos and captions; ConceptError for what training would refuse.

    cache_dir: where photos from an address are kept; by default the cache of the settings.
    """
    from cat_cluster.data.concepts import image_digests, load_concepts

    return [
        image_digests(load_concepts(adapter.id, adapter.concepts, cache_dir, masked=adapter.training.masked_loss))
        for adapter in job.resolved()
    ]


def with_stored_images(job: JobSpec, store: ObjectStore) -> JobSpec:
    """Return the job with its photos in the storage, unless that is a folder, which only this machine can read."""
    from cat_cluster.data.s3_photos import store_images

    if store.url.startswith("file:"):
        return job

    def stored(adapter: AdapterSpec) -> AdapterSpec:
        concepts = tuple(
            concept
            if "://" in concept.images
            else concept.model_copy(update={"images": store_images(Path(concept.images), store)})
            for concept in adapter.concepts
        )
        return adapter.model_copy(update={"concepts": concepts})

    return job.model_copy(update={"adapters": tuple(stored(adapter) for adapter in job.adapters)})
