"""Spec files that are no YAML, no mapping, or hostile; anchors, which are fine."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cat_cluster.errors import SpecError
from cat_cluster.spec.concept import DEFAULT_ALPHA
from cat_cluster.spec.job import load_spec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str) -> str:
    path = write(folder, text)
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "must hold keys"),
        ("- a\n- b", "must hold keys"),
        ("name: [", "cannot be read as YAML"),
        ("name: a\n\tb: c", "line 2"),
        ("name: a\n---\nname: b", "cannot be read as YAML"),
        ("name: 2024-13-45", "cannot be read as YAML"),
        ("name: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
        ("[" * 5000, "nested too deeply"),
        ("name: &a [*a]", "name (line 1)"),
        ("1: x", "Keys"),
    ],
)
def test_a_file_that_is_no_spec_is_refused(folder: Path, text: str, expected: str) -> None:
    assert expected in refusal(folder, text)


def test_unreadable_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"missing\.yaml: cannot be read"):
        load_spec(tmp_path / "missing.yaml")
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    with pytest.raises(SpecError, match="not UTF-8"):
        load_spec(tmp_path / "latin.yaml")


def test_an_alias_bomb_is_refused_briefly(folder: Path) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    assert len(refusal(folder, "\n".join(levels))) < 10_000


def test_anchors_are_not_repeats(folder: Path) -> None:
    spec = load_spec(
        write(
            folder,
            """\
name: spring
adapters:
  - id: cup
    concepts: [&cup {token: sks, class_noun: cup, images: photos}]
  - id: cup-two
    concepts: [*cup]
""",
        )
    )
    assert [adapter.concepts[0].alpha for adapter in spec.adapters] == [DEFAULT_ALPHA, DEFAULT_ALPHA]


def merge_bomb(levels: int) -> str:
    """Each mapping merges the one before it nine times: 538 bytes of it take most of a minute to build."""
    lines = ["a0: &a0 {k: v}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, levels)]
    return "\n".join(lines)


HOSTILE = {
    "hexadecimal": ("name: x\ntraining:\n  seed: 0x" + "f" * 200_000, "line 3: 0xffffffffff... is a number of 200,002"),
    "octal": ("name: 0" + "7" * 200_000, "line 1: 077"),
    "decimal": ("name: " + "1" * 5_000, "a number of 5,000 characters"),
    "sexagesimal": ("name: 1" + ":59" * 3_000, "a number of 9,001 characters; numbers have at most 100"),
    "sexagesimal float": ("name: 1" + ":59" * 3_000 + ".5", "a number of 9,003 characters"),
    "long number as a key": ("0x" + "f" * 200_000 + ": 1", "a number of 200,002 characters"),
    "tagged number": ('name: !!int "' + "1" * 5_000 + '"', "a number of 5,000 characters"),
    "bad tagged numbers": ('name: !!int ""', "not of the kind it looks like"),
    "bad tagged date": ("name: !!timestamp x", "not of the kind it looks like"),
    "merge bomb": (merge_bomb(10), "line 2: << (a merge of keys) is not read; write the keys out"),
    "merge": ("name: x\nbase: &a {b: c}\ntraining:\n  <<: *a", "line 4: << (a merge"),
    "tagged merge": ('!!merge "x": {a: b}', "line 1: << (a merge"),
    "many values": ("name: [" + "x, " * 100_001 + "x]", "more than 100,000 values"),
    "deep by aliases": ("\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 120))]), "too deeply"),
    "large": ("name: x\n" + "# comment\n" * 500_000, "it is larger than 4 MiB"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_at_once_and_briefly(folder: Path, kind: str) -> None:
    text, expected = HOSTILE[kind]
    start = time.monotonic()
    message = refusal(folder, text)
    assert expected in message
    assert len(message) < 1_000
    assert time.monotonic() - start < 5


def test_text_that_only_looks_like_a_long_number_is_text(folder: Path) -> None:
    """What is quoted, or holds a letter, has no bound of its own."""
    spec = load_spec(
        write(
            folder,
            f"""\
name: "{"1" * 100}"
adapters:
  - {{id: cup, concepts: [{{token: sks, class_noun: {"x" * 5000}, images: photos}}]}}
  - {{id: cup-two, concepts: [{{token: sks, class_noun: "{"1" * 5000}", images: photos}}]}}
""",
        )
    )
    assert [len(adapter.concepts[0].class_noun) for adapter in spec.adapters] == [5000, 5000]
