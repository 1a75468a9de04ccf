"""Rules of uniqueness in a job spec, on plain data, so that they are checked even where other fields are bad."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from cat_cluster.spec.yaml_file import FieldError, Location, path_text


def _repeats(places: Iterable[tuple[Location, object]], scope: str) -> Iterator[FieldError]:
    seen: dict[str, str] = {}
    for place, value in places:
        if not isinstance(value, str):
            continue
        key = value.strip().casefold()
        if key in seen:
            yield place, f"{value!r} is taken by {seen[key]}; {scope}"
        else:
            seen[key] = path_text(place)


def _entries(data: object, key: str) -> list[tuple[int, Mapping[str, object]]]:
    """Return the mappings of the list data[key] with their indices; none where it is not such a list."""
    found = data.get(key) if isinstance(data, Mapping) else None
    return [(i, e) for i, e in enumerate(found) if isinstance(e, Mapping)] if isinstance(found, list | tuple) else []


def id_repeats(job: object) -> Iterator[FieldError]:
    """Yield each adapter id of a job that an earlier adapter has."""
    ids: list[tuple[Location, object]] = [(("adapters", i, "id"), a.get("id")) for i, a in _entries(job, "adapters")]
    yield from _repeats(ids, "each adapter has an id of its own")


def token_repeats(adapter: object) -> Iterator[FieldError]:
    """Yield each token of an adapter that an earlier concept has, whatever its case; places are within the adapter."""
    tokens: list[tuple[Location, object]] = [
        (("concepts", k, "token"), concept.get("token")) for k, concept in _entries(adapter, "concepts")
    ]
    yield from _repeats(tokens, "each concept of an adapter has a token of its own")


def all_token_repeats(job: object) -> Iterator[FieldError]:
    """Yield the repeated tokens of every adapter of a job."""
    for index, adapter in _entries(job, "adapters"):
        for place, text in token_repeats(adapter):
            yield ("adapters", index, *place), text
