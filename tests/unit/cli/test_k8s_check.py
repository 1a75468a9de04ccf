"""`k8s check --json` prints one JSON document, whatever it is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.tiny_jobs import CommandLine

TEXTS = {
    "right": "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: a}\n",
    "wrong": "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: a, annotations: {k: y}}\n",
    "empty": "---\n",
    "no YAML": "a: [",
    "no text": "\x00",
    "a list": "- a\n",
    "a list as a key": "? [a, b]\n: c\n",
    "a mapping as a key": "? {a: b}\n: c\n",
    "not a number": "a: .nan\n",
    "nested deeply": "a: " + "{a: " * 5000 + "}" * 5000,
    "an alias bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)),
    "an unknown tag": "a: !!python/object:os.system x\n",
    "a list of nothing": "apiVersion: v1\nkind: List\nitems: [null]\n",
    "a kind that is no text": "apiVersion: v1\nkind: [a]\nmetadata: {name: a}\n",
    "metadata that is none": "apiVersion: v1\nkind: Pod\nmetadata: [a]\n",
    "a group that is not known": "apiVersion: example.org/v1\nkind: Pod\nmetadata: {name: a}\nspec: [a]\n",
    "a large number": "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {healthCheckNodePort: 99999999999}\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_there_is_always_one_json_document(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(TEXTS[name])
    done = CommandLine(monkeypatch, capsys)("k8s", "check", str(file), "--json")
    record = json.loads(done.out)
    if "error" in record:
        assert done.code == 1
        assert "\n" not in record["error"]["message"]
    else:
        assert done.code == (1 if record["problems"] else 0)
        assert record["documents"] == 1
        assert record["not_looked_at"]
    assert ("error" in record or bool(record["problems"])) == (name not in ("right", "a group that is not known"))


@pytest.mark.parametrize("words", [["k8s", "check", "--json"], ["k8s", "check", "none.yaml", "--json"]])
def test_also_without_a_file(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(json.loads(CommandLine(monkeypatch, capsys)(*words).out)) == {"error"}
