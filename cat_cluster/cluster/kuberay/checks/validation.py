"""Holding a document against a closed schema: quickly whether it fits, and where it does not, in plain words."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jsonschema_rs
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend

FieldPath = tuple[str | int, ...]
Finding = tuple[FieldPath, str]

_MAP_KEYS = "x-kubernetes-list-map-keys"
_INTEGERS = {"int32": 2**31, "int64": 2**63}


class SchemaCheck:
    """A schema, made ready once for many documents. map_keys: the keys of list items are unique."""

    def __init__(self, schema: Mapping[str, Any], *, map_keys: bool) -> None:
        self._quick = jsonschema_rs.Draft202012Validator(
            dict(schema), keywords={_MAP_KEYS: _MapKeys} if map_keys else None
        )
        self._thorough = (_Validator if map_keys else Draft202012Validator)(schema)

    def findings(self, document: Mapping[str, Any]) -> Iterator[Finding]:
        """Yield what the schema refuses, each at its path."""
        try:
            if self._quick.is_valid(document):
                return
        except ValueError:  # a number that JSON's usual readers cannot hold
            pass
        for error in self._thorough.iter_errors(document):
            yield from _explained(error)


def bounded_integers(schema: Any) -> Any:
    """Return a schema in which the formats int32 and int64 are limits: Go cannot decode a number beyond them."""
    if isinstance(schema, list):
        return [bounded_integers(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {word: bounded_integers(value) for word, value in schema.items()}
    limit = _INTEGERS.get(str(schema.get("format")))
    if limit is not None and "type" in schema:
        del kept["format"]
        kept["minimum"] = max(kept.get("minimum", -limit), -limit)
        kept["maximum"] = min(kept.get("maximum", limit - 1), limit - 1)
    return kept


def at(document: Any, path: FieldPath) -> Any:
    """Return the value at a path, None when there is none."""
    for part in path:
        if isinstance(document, list) and isinstance(part, int):
            document = document[part]
        else:
            document = document.get(part) if isinstance(document, dict) else None
    return document


def nearest(name: str, known: Mapping[str, Any] | list[str]) -> str:
    """Return the end of a message about an unknown name: what was probably meant, or what there is."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    return f"here may be {', '.join(sorted(known))}" if known else "nothing may be here"


def _second_items(keys: list[str], instance: Any, schema: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """Yield index and keys of each item that has those of one before it; a key that is left out has its default."""
    if not isinstance(instance, list):
        return
    properties = schema.get("items", {}).get("properties", {})
    seen = set()
    for index, item in enumerate(instance):
        if not isinstance(item, dict):
            continue
        values = tuple(str(item.get(key, properties.get(key, {}).get("default"))) for key in keys)
        if values in seen:
            yield index, ", ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
        seen.add(values)


def _unique_items(
    validator: Any, keys: list[str], instance: Any, schema: Mapping[str, Any]
) -> Iterator[ValidationError]:
    """An API server refuses two items of a list with the same keys."""
    for index, what in _second_items(keys, instance, schema):
        yield ValidationError(f"is the second with {what}; each may be there once", path=[index])


class _MapKeys:
    """The same rule for the quick check."""

    def __init__(self, parent_schema: dict[str, Any], value: list[str], schema_path: list[str | int]) -> None:
        self._schema, self._keys = parent_schema, value

    def validate(self, instance: Any) -> None:
        """Raise ValueError for a list that breaks it."""
        if next(_second_items(self._keys, instance, self._schema), None) is not None:
            raise ValueError


_Validator: Callable[[Any], Any] = extend(Draft202012Validator, {_MAP_KEYS: _unique_items})


def _shown(value: Any, *, in_quotes: bool) -> str:
    """Return a value for people; in_quotes: it should be text, which some values are in quotes only."""
    if isinstance(value, dict | list | str):
        return f"{value!r:.80}"
    return f"{json.dumps(value)}{'; write it in quotes' if in_quotes else ''}"


def _explained(error: ValidationError) -> Iterator[Finding]:
    """Turn a schema's error into findings: one for each unknown field, with what was probably meant."""
    path: FieldPath = tuple(error.absolute_path)
    if error.validator == "additionalProperties" and isinstance(error.schema, dict):
        known = error.schema.get("properties", {})
        patterns = error.schema.get("patternProperties", {})
        for name in map(str, error.instance):
            if name not in known and not any(re.search(pattern, name) for pattern in patterns):
                yield (*path, name), f"unknown field; {nearest(name, known)}"
    elif error.validator == "required":
        for name in error.validator_value:
            if name not in error.instance:
                yield (*path, str(name)), "is missing, and required"
    elif error.validator == "type":
        wanted = error.validator_value if isinstance(error.validator_value, list) else [error.validator_value]
        names = [one for one in wanted if one != "null"]
        yield path, f"must be {' or '.join(names)}, got {_shown(error.instance, in_quotes='string' in names)}"
    elif error.validator == "enum":
        yield path, f"{error.instance!r:.80} is not one of {', '.join(map(str, error.validator_value))}"
    elif error.validator == "pattern":
        yield path, f"{error.instance!r:.80} does not match {error.validator_value}"
    elif error.validator in ("minimum", "maximum"):
        least = error.validator == "minimum"
        yield path, f"must be at {'least' if least else 'most'} {error.validator_value}, got {error.instance!r:.80}"
    else:
        yield path, error.message[:200]
