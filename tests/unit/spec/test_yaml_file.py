"""Spec files that are no YAML, no mapping, or hostile; anchors and merge keys that are fine."""

from __future__ import annotations

from pathlib import Path

import pytest

from cat_cluster.errors import SpecError
from cat_cluster.spec.job import DEFAULT_ALPHA, load_spec


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
        ("name: [", "is not YAML"),
        ("name: a\n\tb: c", "line 2"),
        ("name: a\n---\nname: b", "is not YAML"),
        ("name: 2024-13-45", "is not YAML"),
        ("name: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("[" * 5000, "nested too deep"),
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


def test_merge_keys_and_anchors_are_not_repeats(folder: Path) -> None:
    spec = load_spec(
        write(
            folder,
            """\
name: spring
adapters:
  - id: cup
    concepts: [&cup {token: sks, class_noun: cup, images: photos}]
  - id: cup-two
    concepts: [{<<: *cup, alpha: 1.0}]
""",
        )
    )
    assert [adapter.concepts[0].alpha for adapter in spec.adapters] == [DEFAULT_ALPHA, 1.0]
