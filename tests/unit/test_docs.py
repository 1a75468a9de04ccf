"""What the documents say exists, exists: links, commands, spec fields, test files, examples."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from cat_cluster.cli.app import app
from cat_cluster.registry.manifest import Manifest
from cat_cluster.spec.job import JobSpec

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_SHELL_END = {"|", ">", ">>", "&&", "||", ";", "&"}


def blocks(document: Path, *languages: str) -> Iterator[str]:
    """Yield the fenced blocks of a document in these languages, without their indentation."""
    for indent, language, body in _FENCE.findall(document.read_text(encoding="utf-8")):
        if language in languages:
            yield "\n".join(line.removeprefix(indent) for line in body.splitlines())


def shell_lines(document: Path) -> Iterator[str]:
    """Yield the commands of the shell blocks, continued lines joined."""
    for block in blocks(document, "sh", "bash", "console", ""):
        yield from (line.strip().removeprefix("$ ") for line in block.replace("\\\n", " ").splitlines())


def command_words(line: str, program: str) -> list[str] | None:
    """Return the words after `program` up to a pipe or redirection; None for another program's line."""
    try:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
    except ValueError:  # prose in an untyped block, with an apostrophe
        return None
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if not words or Path(words[0]).name != program:
        return None
    end = next((i for i, word in enumerate(words) if word in _SHELL_END), len(words))
    return words[1:end]


def parse_command(words: list[str], *, whole: bool) -> None:
    """Find the command that `words` name and, if `whole`, let it parse its arguments; raises what is wrong."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        assert name in command.commands, f"no command {name!r} in {' '.join(words)!r}"
        command = command.commands[name]
    options = {option for parameter in command.params for option in parameter.opts}
    given = {word.partition("=")[0] for word in rest if word.startswith("--")} - {"--help"}
    assert given <= options, f"{' '.join(words)!r} has no option {given - options}"
    if whole:
        assert not hasattr(command, "commands"), f"{' '.join(words)!r} is a group, not a command"
        command.make_context(" ".join(words), rest)


def anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def documented(document: Path) -> str:
    return str(document.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=documented)
def test_every_relative_link_resolves(document: Path) -> None:
    links = [link for link in _LINK.findall(document.read_text(encoding="utf-8")) if "://" not in link]
    missing = []
    for link in links:
        file, _, anchor = link.partition("#")
        target = document.parent / file if file else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert not missing, f"{documented(document)} links to what is not there: {missing}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=documented)
def test_every_command_line_parses(document: Path) -> None:
    for line in shell_lines(document):
        words = command_words(line, "cat-cluster")
        if words is not None:
            parse_command(words, whole=True)
    for code in _INLINE.findall(document.read_text(encoding="utf-8")):
        words = command_words(code, "cat-cluster")
        if words:
            parse_command([word for word in words if not word.isupper()], whole=False)


@pytest.mark.parametrize("document", DOCUMENTS, ids=documented)
def test_every_make_target_exists(document: Path) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    found = [command_words(line, "make") for line in shell_lines(document)]
    found += [command_words(code, "make") for code in _INLINE.findall(document.read_text(encoding="utf-8"))]
    named = {word for words in found if words for word in words if "=" not in word}
    assert named <= targets, f"{documented(document)} names make targets that are not there: {named - targets}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=documented)
def test_every_named_file_of_the_project_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    own = re.compile(r"(tests|cat_cluster|jobs|docs|\.ci)/[\w./-]+")
    named = {code for code in _INLINE.findall(text) if own.fullmatch(code)}
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing, f"{documented(document)} names what is not there: {missing}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=documented)
def test_examples_are_valid(document: Path) -> None:
    for block in blocks(document, "yaml"):
        data = yaml.safe_load(block)
        if "adapters" in data:
            JobSpec.model_validate(data)
    for block in blocks(document, "json"):
        json.loads(block)
    for block in blocks(document, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cat_cluster"):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_the_example_of_the_readme_is_the_shipped_spec() -> None:
    shown = yaml.safe_load(next(blocks(ROOT / "README.md", "yaml")))
    assert shown == yaml.safe_load((ROOT / "jobs" / "specs" / "single.yaml").read_text(encoding="utf-8"))


def test_every_manifest_field_is_documented() -> None:
    text = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    missing = [name for name in Manifest.model_fields if f"`{name}`" not in text]
    assert not missing, f"docs/adapters.md does not name {missing}"


@pytest.mark.parametrize(
    "bad",
    ["trane jobs/specs/single.yaml", "train", "train spec.yaml --no-such-option", "adapters", "generate --prompt cup"],
)
def test_the_check_itself_refuses_wrong_commands(bad: str) -> None:
    with pytest.raises(Exception, match=r"."):
        parse_command(bad.split(), whole=True)
