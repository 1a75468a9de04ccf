"""What a run over HTTP may ask for: photos that its caller may use, nothing of the service's machines, and so much."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.spec.job import AdapterSpec, JobSpec
from serve.http.access import Caller
from serve.http.training.job_bodies import refused
from serve.http.training.stored_files import StoredFile, StoredFiles
from serve.settings import ServeSettings

# Values above these take a worker's memory or hours, and are for those who have the cluster itself.
_MOST = {
    "training": {
        "rows_per_concept": 64,
        "accumulate": 64,
        "crops_per_image": 64,
        "pool_size": 4096,
        "resolution": 2048,
    },
    "evaluation": {"images_per_prompt": 64, "steps": 200},
}
_MOST_PROMPTS = 100
_JUDGES = ("auto", "pocket", "pocket-classifier")


@dataclass(frozen=True)
class UsableJob:
    """A job with its photos where training finds them. files: the uploads that it reads."""

    job: JobSpec
    files: tuple[StoredFile, ...]


def check_limits(job: JobSpec, settings: ServeSettings, *, as_fields: bool = False) -> None:
    """Refuse with 400 a job that asks for files or models of the service's machines, or for too much.

    as_fields: see `valid_job`.
    """
    lines = list(dict.fromkeys(_refusals(job, settings)))
    if lines:
        raise refused("\n".join(lines), as_fields=as_fields)


def with_photos(
    job: JobSpec, caller: Caller, files: StoredFiles, settings: ServeSettings, *, as_fields: bool = False
) -> UsableJob:
    """Return a job whose `images`, ids of the caller's files, are their addresses; 400 for those that are not there.

    Raises StoreError. as_fields: see `valid_job`.
    """
    found: dict[str, StoredFile] = {}
    lines: list[str] = []

    def usable(concept: ConceptSpec, place: str) -> ConceptSpec:
        images = concept.images
        if "://" in images and _is_listed(images, settings.training_sources):
            return concept
        file = found.get(images) or own_file(files, caller, images)
        if file is None:
            sources = f", or an address below {' or '.join(settings.training_sources)}" * bool(
                settings.training_sources
            )
            lines.append(
                f"{place}: {images[:80]!r} is none of your files; give the id of one of POST /v1/files{sources}"
            )
            return concept
        found[images] = file
        return concept.model_copy(update={"images": files.address(file)})

    adapters = []
    for number, adapter in enumerate(job.adapters):
        concepts = tuple(
            usable(concept, f"adapters[{number}].concepts[{k}].images") for k, concept in enumerate(adapter.concepts)
        )
        adapters.append(adapter.model_copy(update={"concepts": concepts}))
    if lines:
        raise refused("\n".join(lines), as_fields=as_fields)
    return UsableJob(job.model_copy(update={"adapters": tuple(adapters)}), tuple(found.values()))


def own_file(files: StoredFiles, caller: Caller, file_id: str) -> StoredFile | None:
    """Return a file that the caller may use, None where there is none: their own, of an admin any."""
    if not caller.is_admin and not file_id.startswith(f"file-{caller.name}-"):
        return None
    return files.find(file_id)


def _refusals(job: JobSpec, settings: ServeSettings) -> Iterator[str]:
    if job.storage is not None:
        yield "storage: is that of this service; leave it out"
    if len(job.adapters) > settings.max_run_adapters:
        yield f"adapters: has {len(job.adapters)} and may have {settings.max_run_adapters}; make several runs of it"
    for number, (given, adapter) in enumerate(zip(job.adapters, job.resolved(), strict=True)):
        base = f"adapters[{number}].base" if given.base is not None else "base"
        if adapter.base != settings.base:
            yield f"{base}: {adapter.base[:80]!r} is not the base of this service, {settings.base!r}; give that"
        training, evaluation = _place(given, number, "training"), _place(given, number, "evaluation")
        if adapter.training.general_prompts is not None:
            yield f"{training['general_prompts']}: is a file, and none of this service's machines is read; leave it out"
        if adapter.evaluation.judge not in _JUDGES:
            yield f"{evaluation['judge']}: {adapter.evaluation.judge[:80]!r} is none of {', '.join(_JUDGES)}; give one"
        if adapter.evaluation.prompts != "default" and len(adapter.evaluation.prompts) > _MOST_PROMPTS:
            yield f"{evaluation['prompts']}: has {len(adapter.evaluation.prompts)}, and may have {_MOST_PROMPTS}"
        most = {**_MOST["training"], "steps": settings.max_training_steps, "rank": settings.max_rank}
        yield from _too_large(adapter.training, most, training)
        yield from _too_large(adapter.evaluation, _MOST["evaluation"], evaluation)


def _too_large(section: object, most: Mapping[str, int], place: Mapping[str, str]) -> Iterator[str]:
    for name, limit in most.items():
        value = getattr(section, name)
        if value is not None and value > limit:
            yield f"{place[name]}: {value} is more than {limit}, the most over HTTP here; give less"


class _place(dict[str, str]):
    """By the name of a section's field, where it was given: at the adapter, or for the whole job."""

    def __init__(self, adapter: AdapterSpec, number: int, section: str) -> None:
        own = getattr(adapter, section)
        super().__init__()
        self._own = set() if own is None else own.model_fields_set
        self._number, self._section = number, section

    def __missing__(self, name: str) -> str:
        start = f"adapters[{self._number}]." if name in self._own else ""
        return f"{start}{self._section}.{name}"


def _is_listed(address: str, sources: Sequence[str]) -> bool:
    prefixes = [source.rstrip("/") for source in sources]
    return ".." not in address.split("/") and any(
        address == prefix or address.startswith(f"{prefix}/") for prefix in prefixes
    )
