"""Reading a spec file, and saying what is wrong in it: one line per bad field, with its path and line number."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from cat_cluster.errors import SpecError
from cat_cluster.spec.yaml_bounds import build, compose, decode, read_bytes

Location = tuple[str | int, ...]
FieldError = tuple[Location, str]


@dataclass(frozen=True)
class SpecDocument:
    """A parsed YAML document: its data, the line of each place in it (from 1), and keys that are given twice.

    source: the file or address that messages name.
    """

    source: str
    data: object
    lines: Mapping[Location, int]
    errors: tuple[FieldError, ...]


def read_yaml(path: Path) -> SpecDocument:
    """Parse a file as `parse_yaml` does; raises SpecError also when it cannot be read."""
    try:
        content = read_bytes(path.expanduser())
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}; give the path of a YAML job spec") from error
    return parse_yaml(content, str(path))


def parse_yaml(content: bytes, source: str) -> SpecDocument:
    """Parse one YAML document of keys; raises SpecError when it is none, or breaks a bound."""
    try:
        node = compose(decode(content))
        data = build(node)
    except UnicodeDecodeError as error:
        raise SpecError(f"{source}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{source}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise SpecError(
            f"{source}: must hold keys such as name and adapters, got {describe(data)}; "
            "`cat-cluster spec schema` lists them"
        )
    lines: dict[Location, int] = {}
    errors = tuple(_walk(node, (), lines, set())) if node is not None else ()
    return SpecDocument(source, data, lines, errors)


def spec_error(
    document: SpecDocument,
    error: ValidationError | None,
    sections: Mapping[str, type[BaseModel]],
    further: Sequence[FieldError],
) -> SpecError:
    """Return one error that lists every bad field of the file, in the order of their lines.

    sections: the model of each section's key, "" for the top level; near-miss suggestions come from them.
    """
    found = [] if error is None else [_explain(detail, sections) for detail in error.errors()]
    errors = list(dict.fromkeys([*document.errors, *found, *further]))
    errors.sort(key=lambda one: _line(one[0], document.lines))
    count = "1 field" if len(errors) == 1 else f"{len(errors)} fields"
    report = [f"  {path_text(at)} (line {_line(at, document.lines)}): {text}" for at, text in errors]
    return SpecError("\n".join([f"{document.source}: {count} cannot be used as written", *report]))


def field_lines(error: ValidationError, sections: Mapping[str, type[BaseModel]]) -> list[str]:
    """Return a line for each bad field of what is in no file: its path, if it has one, and what is wrong with it."""
    found = dict.fromkeys(_explain(detail, sections) for detail in error.errors())
    return [f"{path_text(at)}: {text}" if at else text for at, text in found]


def path_text(location: Location) -> str:
    """Write a place as a path: ("adapters", 1, "id") is adapters[1].id."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.removeprefix(".") or "(the whole file)"


def describe(value: object) -> str:
    """Write a bad value briefly, however large it is."""
    return "nothing" if value is None else reprlib.repr(value)


def _walk(node: yaml.Node, at: Location, lines: dict[Location, int], seen: set[int]) -> Iterator[FieldError]:
    lines.setdefault(at, node.start_mark.line + 1)
    if id(node) in seen:  # An alias: its anchor was walked, and may even contain it.
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _walk(item, (*at, index), lines, seen)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            place = (*at, key.value)
            lines[place] = line
            if key.value in first:
                yield place, f"is given twice (lines {first[key.value]} and {line}); keep one"
            first.setdefault(key.value, line)
            yield from _walk(value, place, lines, seen)


def _line(at: Location, lines: Mapping[Location, int]) -> int:
    """Return the line of the place or, for one that is not in the file, of the nearest place around it."""
    while at not in lines and at:
        at = at[:-1]
    return lines.get(at, 1)


def _explain(detail: Mapping[str, object], sections: Mapping[str, type[BaseModel]]) -> FieldError:
    at = detail["loc"]
    assert isinstance(at, tuple)
    kind, message, value = str(detail["type"]), str(detail["msg"]), detail["input"]
    match kind:
        case "missing":
            return at, f"is missing: {_description(at, sections)}"
        case "extra_forbidden":
            return at, _unknown_key(at, sections)
        case "refused":
            return at, message
        case "value_error":
            return at, message.removeprefix("Value error, ")
        case "string_type" if value is not None and not isinstance(value, dict | list):
            return at, f"must be text, got {describe(value)}; write it in quotes"
        case "string_pattern_mismatch":
            return at, f"{describe(value)} does not fit: {_description(at, sections)}"
        case "model_type" | "dict_type":
            return at, f"must be keys with values, got {describe(value)}"
        case "tuple_type" | "list_type":
            return at, f"must be a list, got {describe(value)}"
        case _:
            return (
                at,
                f"{message.replace('Input should', 'must').replace('String should', 'must')}, got {describe(value)}",
            )


def _section(at: Location, sections: Mapping[str, type[BaseModel]]) -> type[BaseModel]:
    names = [part for part in at[:-1] if isinstance(part, str)]
    return sections[names[-1] if names else ""]


def _description(at: Location, sections: Mapping[str, type[BaseModel]]) -> str:
    field = _section(at, sections).model_fields[str(at[-1])]
    return str(field.description)


def _unknown_key(at: Location, sections: Mapping[str, type[BaseModel]]) -> str:
    key, allowed = str(at[-1]), list(_section(at, sections).model_fields)
    homes = [f"under {name}" if name else "at the top level" for name in sections if key in sections[name].model_fields]
    if homes:
        return f"unknown key here; {key} belongs {' or '.join(homes)}"
    near = difflib.get_close_matches(key.lower().replace("-", "_"), allowed, n=1, cutoff=0.6)
    return f"unknown key; did you mean {near[0]}?" if near else f"unknown key; allowed here: {', '.join(allowed)}"
