"""Bounds of YAML that people hand over: a short text must not cost minutes, memory or a traceback.

Specs, settings and manifests are read with these. The text is parsed as a stream and given up at the first bound it
breaks, before anything of it is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 4 << 20
MAX_VALUES = 100_000  # with aliases expanded; a spec of a thousand concepts has about 10,000
MAX_DEPTH = 100
MAX_NUMBER = 100  # characters
_MERGE = "tag:yaml.org,2002:merge"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def read_text(path: Path) -> str:
    """Return a file's UTF-8 text without a byte order mark; raises OSError, UnicodeDecodeError and YAMLError."""
    return decode(read_bytes(path))


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes, up to one more than `decode` takes; raises OSError."""
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def decode(data: bytes) -> str:
    """Return UTF-8 text without a byte order mark; raises UnicodeDecodeError, and YAMLError for too much of it."""
    if len(data) > MAX_BYTES:
        raise yaml.YAMLError(f"it is larger than {MAX_BYTES >> 20} MiB; split it into several files")
    return data.decode("utf-8-sig")


def load_yaml(text: str) -> Any:
    """Return the one document of a text; raises YAMLError, naming the line, for what is no YAML or breaks a bound."""
    return build(compose(text))


def compose(text: str) -> yaml.Node | None:
    """Return the node of the one document of a text, none of an empty one; raises YAMLError as `check_bounds` does."""
    check_bounds(text)
    return yaml.compose(text, Loader=yaml.CSafeLoader)


def build(node: yaml.Node | None) -> Any:
    """Return the data of a composed document; raises YAMLError."""
    try:
        return None if node is None else yaml.constructor.SafeConstructor().construct_document(node)
    except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        # What a value's own tag makes of it: a date of month 13, or `!!int ""`.
        raise yaml.YAMLError(f"a value is not of the kind it looks like ({error}); write it in quotes") from error


def check_bounds(text: str) -> None:
    """Raise YAMLError, naming the line, where a text holds too much, too deep, too long a number, or a merge (`<<`)."""
    for _ in bounded_events(text):
        pass


def bounded_events(text: str, *, merges: bool = False, max_values: int = MAX_VALUES) -> Iterator[yaml.Event]:
    """Yield the events of a text's documents, and raise YAMLError as `check_bounds` does at the first broken bound.

    merges: they are allowed. max_values: of one document, of which aliases may stand for MAX_VALUES.
    """
    total = written = 0
    anchors: dict[str, tuple[int, int]] = {}
    # Per open list or mapping: its anchor, the total before it, and the levels inside it so far.
    places: list[tuple[str | None, int, int]] = []
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        levels = 0
        match event:
            case yaml.ScalarEvent():
                total, written = total + 1, written + 1
                _check_scalar(event, merges=merges)
                anchors[event.anchor or ""] = (1, 0)  # no alias has an empty name
            case yaml.CollectionStartEvent():
                places.append((event.anchor, total, 0))
                total, written = total + 1, written + 1
            case yaml.CollectionEndEvent():
                anchor, before, levels = places.pop()
                levels += 1
                anchors[anchor or ""] = (total - before, levels)
            case yaml.AliasEvent():
                values, levels = anchors.get(event.anchor or "", (1, 0))
                total += values
            case yaml.DocumentStartEvent():
                anchors, total, written = {}, 0, 0
        if levels and places:
            anchor, before, inside = places[-1]
            if levels > inside:
                places[-1] = (anchor, before, levels)
        if len(places) + levels > MAX_DEPTH:
            raise _refusal(event, f"it is nested too deeply; at most {MAX_DEPTH} levels are read")
        if total > max_values or total - written > MAX_VALUES:
            most = max_values if total > max_values else MAX_VALUES
            raise _refusal(event, f"it holds more than {most:,} values, aliases counted as what they stand for")
        yield event


def _check_scalar(event: yaml.ScalarEvent, *, merges: bool) -> None:
    plain = event.implicit[0]
    if not merges and (event.tag == _MERGE or (plain and event.value == "<<")):
        raise _refusal(event, "<< (a merge of keys) is not read; write the keys out")
    if len(event.value) > MAX_NUMBER and _is_number(event):
        start = event.value[:12]
        raise _refusal(
            event, f"{start}... is a number of {len(event.value):,} characters; numbers have at most {MAX_NUMBER}"
        )


def _is_number(event: yaml.ScalarEvent) -> bool:
    if event.tag is not None:
        return event.tag in _NUMBERS
    # A resolver's patterns for plain scalars, by first character.
    patterns = yaml.SafeLoader.yaml_implicit_resolvers.get(event.value[:1], ())
    return event.implicit[0] and any(tag in _NUMBERS and pattern.match(event.value) for tag, pattern in patterns)


def _refusal(event: yaml.Event, text: str) -> yaml.YAMLError:
    assert event.start_mark is not None  # one that is parsed has its place
    return yaml.YAMLError(f"line {event.start_mark.line + 1}: {text}")
