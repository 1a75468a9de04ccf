"""Reading documents of YAML or JSON as Kubernetes' parser reads them."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from typing import Any

import yaml

from cat_cluster.cluster.kuberay.checks.yaml_text import TAG, plain_tag
from cat_cluster.spec.yaml_bounds import bounded_events

MAX_VALUES = 1_000_000  # of one document, which may be a List of thousands of objects
_MERGE, _NO_KEY = object(), object()
_TRUE = {"y", "yes", "true", "on"}
_TEXT_TAGS = {f"{TAG}{name}" for name in ("str", "timestamp")}
_VALUE_TAGS = {f"{TAG}{name}" for name in ("null", "bool", "int", "float")}
_COLLECTION_TAGS = (None, "!", f"{TAG}map", f"{TAG}seq")
_WHOLE = 1e21  # floats below it are written without an exponent, and are integers to Kubernetes if they are whole


def load_documents(text: str) -> Iterator[Any]:
    """Yield the data of each document, None of an empty one.

    As in Kubernetes' parser keys are text, numbers are those of JSON, times are text, and a merge (`<<`) overwrites
    what stands before it. Raises YAMLError, naming the line: for what is no YAML, breaks a bound or is no JSON, and for
    a key that is given twice.
    """
    builder = _Builder()
    for event in bounded_events(text, merges=True, max_values=MAX_VALUES):
        if isinstance(event, yaml.DocumentStartEvent):
            builder = _Builder()
        elif isinstance(event, yaml.DocumentEndEvent):
            yield builder.root
        else:
            builder.take(event)


class _Open:
    """A list or mapping whose end is still to come: its data, anchor, the key that waits, the keys given so far."""

    __slots__ = ("anchor", "data", "given", "key")

    def __init__(self, data: list[Any] | dict[str, Any], anchor: str | None) -> None:
        self.data, self.anchor = data, anchor
        self.key: Any = _NO_KEY
        self.given: set[str] = set()


class _Builder:
    """Builds the data of one document from its events."""

    def __init__(self) -> None:
        self.root: Any = None
        self._open: list[_Open] = []
        self._anchors: dict[str, Any] = {}

    def take(self, event: yaml.Event) -> None:
        """Take the next event; raises YAMLError."""
        if isinstance(event, yaml.ScalarEvent):
            value = _MERGE if self._is_merge(event) else _scalar(event)
            if event.anchor is not None:
                self._anchors[event.anchor] = value
            self._add(value, event)
        elif isinstance(event, yaml.CollectionStartEvent):
            if event.tag not in _COLLECTION_TAGS:
                raise _error(event, f"the tag {event.tag} is not read; leave it out")
            self._open.append(_Open([] if isinstance(event, yaml.SequenceStartEvent) else {}, event.anchor))
        elif isinstance(event, yaml.CollectionEndEvent):
            done = self._open.pop()
            if done.anchor is not None:
                self._anchors[done.anchor] = done.data
            self._add(done.data, event)
        elif isinstance(event, yaml.AliasEvent):
            self._add(self._anchored(event), event)

    def _is_merge(self, event: yaml.ScalarEvent) -> bool:
        in_key = bool(self._open) and isinstance(self._open[-1].data, dict) and self._open[-1].key is _NO_KEY
        return in_key and event.implicit[0] and event.value == "<<"

    def _anchored(self, event: yaml.AliasEvent) -> Any:
        name = event.anchor or ""
        if any(one.anchor == name for one in self._open):
            raise _error(event, f"the anchor {name} holds itself")
        if name not in self._anchors:
            raise _error(event, f"there is no anchor {name} before it")
        return self._anchors[name]

    def _add(self, value: Any, event: yaml.Event) -> None:
        if not self._open:
            self.root = value
            return
        place = self._open[-1]
        data = place.data
        if isinstance(data, list):
            data.append(value)
        elif place.key is _NO_KEY:
            place.key = value if value is _MERGE else _key(value, event)
            if place.key in place.given:
                raise _error(event, f"the key {place.key!r} is given twice")
        elif place.key is _MERGE:
            merged = list(reversed(value)) if isinstance(value, list) else [value]
            if not all(isinstance(one, dict) for one in merged):
                raise _error(event, "<< must be given a mapping, or a list of mappings")
            for one in merged:
                data.update(one)
            place.key = _NO_KEY
        else:
            data[place.key] = value
            place.given.add(place.key)
            place.key = _NO_KEY


def _key(value: Any, event: yaml.Event) -> str:
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, dict | list):
        what = {type(None): "nothing", dict: "a mapping", list: "a list"}[type(value)]
        raise _error(event, f"a key is {what}; it must be text, a number or a boolean")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _scalar(event: yaml.ScalarEvent) -> Any:
    text, tag = event.value, event.tag
    if tag is None or tag == "!":
        if tag is not None or not event.implicit[0]:
            return text
        tag = plain_tag(text)
        return text if tag in (f"{TAG}str", f"{TAG}merge") else _value(tag, text, event)
    if tag in _TEXT_TAGS or not tag.startswith(TAG):
        return text
    if tag == f"{TAG}binary":
        try:
            return base64.b64decode("".join(text.split()), validate=True).decode()
        except ValueError as error:
            raise _error(event, "!!binary must hold text in base64") from error
    found = plain_tag(text)
    if found == tag or (tag == f"{TAG}float" and found == f"{TAG}int"):
        return _value(found, text, event)
    if tag not in _VALUE_TAGS:
        raise _error(event, f"the tag {tag} is not read; leave it out")
    raise _error(event, f"{text[:40]!r} is not what its tag !!{tag.removeprefix(TAG)} says; leave the tag out")


def _value(tag: str, text: str, event: yaml.Event) -> Any:
    match tag.removeprefix(TAG):
        case "null":
            return None
        case "bool":
            return text.lower() in _TRUE
        case "int":
            return _integer(text.replace("_", ""))
    number = float(text.replace("_", "")) if text[-1].isdigit() or text[-1] == "." else math.inf  # .inf and .nan
    if not math.isfinite(number):
        raise _error(event, f"{text} is no number that an object of Kubernetes can hold")
    return int(number) if number.is_integer() and abs(number) < _WHOLE else number


def _integer(text: str) -> int:
    sign, digits = (text[0], text[1:]) if text[0] in "+-" else ("", text)
    if len(digits) > 1 and digits[0] == "0" and digits[1].isdigit():
        digits = f"0o{digits[1:]}"  # as in YAML 1.1
    return int(f"{sign}{digits}", 0)


def _error(event: yaml.Event, text: str) -> yaml.YAMLError:
    assert event.start_mark is not None  # one that is parsed has its place
    return yaml.YAMLError(f"line {event.start_mark.line + 1}: {text}")
