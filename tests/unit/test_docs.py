"""What the documents say exists, exists: links, commands, spec fields, test files, examples."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from cat_cluster.cli.app import app
from cat_cluster.registry.manifest import Manifest
from cat_cluster.settings import Settings
from cat_cluster.spec.job import JobSpec
from jobs.benchmark.__main__ import app as benchmark_app

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# The log tells what was tried and when; names in it are those of its day.
HISTORY = {ROOT / "docs" / "log.md"}
CURRENT = [document for document in DOCUMENTS if document not in HISTORY]
# Names in the pages that belong to other programs, or to files that the reader or a command makes.
OF_OTHERS = {
    *(
        "adapter_config.json",
        "exported/pytorch_lora_weights.safetensors",
        "manifest.json",
        "report.html",
        "report.json",
    ),
    *("out/demo/report.html", "out/demo/report.json", "out/demo/stacks.png"),
    *("work/progress.jsonl", "text_encoder_2/", "tokenizer_2/"),  # of `pocket pretrain`
    *("draw_photos.py", "program.py", "photos/spotted-cup"),
    *("models/anime", "models/anime.safetensors", "owner/name", "owner/name/anime.safetensors"),  # bases of a reader's
    *("openai/clip-vit-base-patch32", "stable-diffusion-v1-5/stable-diffusion-v1-5", "utils/eval_utils.py"),
    *(
        "aliases/",
        "files/",
        "inputs/",
        "objects/",
        "quarantine/",
        "runs/",
        "checkpoints/",
        "probes/",
    ),  # keys of the store
    *("serve.batch", "serve.multiplexed"),  # Ray's
    *("down_lr_weight", "mid_lr_weight", "up_lr_weight"),  # kohya's
    *("--cni", "--local-s3"),  # minikube's, and k8s/secrets.sh's
}
_READ = {".py", ".js", ".css", ".sh", ".toml", ".yaml", ".yml", ".json", ".html", ".j2", ""}
_PRUNED = {
    ".git",
    ".venv",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    "__pycache__",
    "out",
    "build",
    "node_modules",
}
_PATH = re.compile(
    r"[\w.-]*\w/(?:[\w.-]+/)*[\w.-]*|[\w-]+(?:\.[\w-]+)*\.(?:py|js|css|sh|toml|md|j2|yaml|yml|json|html)"
)
_MODULE = re.compile(r"(?<![\w./-])(?:cat_cluster|serve|jobs|tests)(?:\.[a-z_]\w*)+(?![\w/]|\.\w)")
_IDENTIFIER = re.compile(r"[a-z]\w*_\w*|_\w+|[A-Z][a-z]+[A-Z]\w*")
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


def option_names(parameter: Any) -> list[str]:
    """Return the names of an option, also those that turn it off."""
    return [*parameter.opts, *parameter.secondary_opts]


def parse_command(words: list[str], *, whole: bool) -> None:
    """Find the command that `words` name and, if `whole`, let it parse its arguments; raises what is wrong."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        assert name in command.commands, f"no command {name!r} in {' '.join(words)!r}"
        command = command.commands[name]
    options = {option for parameter in command.params for option in option_names(parameter)}
    given = {word.partition("=")[0] for word in rest if word.startswith("--")} - {"--help"}
    assert given <= options, f"{' '.join(words)!r} has no option {given - options}"
    if whole:
        assert not hasattr(command, "commands"), f"{' '.join(words)!r} is a group, not a command"
        command.make_context(" ".join(words), rest)


def code_of(text: str) -> Iterator[str]:
    """Yield the inline code of a page, and the lines of its fenced blocks."""
    yield from _INLINE.findall(text)
    for _, _, body in _FENCE.findall(text):
        yield from body.splitlines()


@cache
def tree() -> frozenset[str]:
    """Return every file and folder (with a slash at its end) of the project, relative to its root."""
    found = set()
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in _PRUNED and not name.endswith(".egg-info")]
        here = Path(folder).relative_to(ROOT)
        found |= {(here / name).as_posix() for name in files} | {f"{(here / name).as_posix()}/" for name in folders}
    return frozenset(found)


@cache
def project_words() -> frozenset[str]:
    """Return every word of the project's files but for its pages."""
    words: set[str] = set()
    for name in tree():
        if Path(name).suffix in _READ and not name.endswith("/"):
            words.update(re.findall(r"\w+", (ROOT / name).read_text(encoding="utf-8", errors="replace")))
    return frozenset(words)


def in_tree(name: str) -> bool:
    """Whether a path as a page writes it, whole or only its end, is a file or a folder of the project."""
    return any(f"/{entry}".endswith((f"/{name}", f"/{name}/")) for entry in tree())


def named_paths(document: Path) -> set[str]:
    """Return what looks like a path in a page's inline code and in its drawings, command lines left out."""
    text = document.read_text(encoding="utf-8")
    whole = {code for code in _INLINE.findall(text) if _PATH.fullmatch(code)}
    drawn = {name for block in blocks(document, "", "text") for name in re.findall(r"[\w/-]+\.(?:py|js|yaml)\b", block)}
    return whole | drawn


def in_package(dotted: str) -> bool:
    """Whether a dotted name is a module of the project, or a name in one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        path = "/".join(parts[:end])
        if f"{path}.py" in tree() or f"{path}/" in tree():
            module = importlib.import_module(".".join(parts[:end])) if end < len(parts) else None
            return len(parts) - end <= 1 and (module is None or hasattr(module, parts[-1]))
    return False


def all_commands(command: Any) -> Iterator[Any]:
    """Yield a command and every command below it."""
    yield command
    for below in getattr(command, "commands", {}).values():
        yield from all_commands(below)


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


@pytest.mark.slow
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


@pytest.mark.parametrize("document", CURRENT, ids=documented)
def test_every_named_file_and_folder_exists(document: Path) -> None:
    missing = {code for code in named_paths(document) if not in_tree(code)} - OF_OTHERS
    assert not missing, f"{documented(document)} names files that are not there: {sorted(missing)}"


@pytest.mark.parametrize("document", CURRENT, ids=documented)
def test_every_named_module_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    dotted = {name for code in code_of(text) for name in _MODULE.findall(code)} - OF_OTHERS
    missing = sorted(name for name in dotted if not in_package(name))
    assert not missing, f"{documented(document)} names modules that are not there: {missing}"


@pytest.mark.parametrize("document", CURRENT, ids=documented)
def test_every_named_identifier_is_written_somewhere_in_the_project(document: Path) -> None:
    named = {code for code in _INLINE.findall(document.read_text(encoding="utf-8")) if _IDENTIFIER.fullmatch(code)}
    missing = sorted(named - project_words() - OF_OTHERS)
    assert not missing, f"{documented(document)} names what is nowhere in the project: {missing}"


@pytest.mark.parametrize("document", CURRENT, ids=documented)
def test_every_named_environment_variable_is_read(document: Path) -> None:
    named = set(re.findall(r"\bCAT_[A-Z]\w*", document.read_text(encoding="utf-8")))
    settings = {f"CAT_{name.upper()}" for name in Settings.model_fields}
    missing = sorted(named - settings - project_words())
    assert not missing, f"{documented(document)} names variables that nothing reads: {missing}"


@pytest.mark.parametrize("document", CURRENT, ids=documented)
def test_every_short_command_and_option_exists(document: Path) -> None:
    root: Any = typer.main.get_command(app)
    groups = {name for name, command in root.commands.items() if hasattr(command, "commands")}
    benchmarks: Any = typer.main.get_command(benchmark_app)
    commands = [*all_commands(root), *all_commands(benchmarks)]
    options = {option for command in commands for parameter in command.params for option in option_names(parameter)}
    unknown = []
    for code in _INLINE.findall(document.read_text(encoding="utf-8")):
        first, *rest = code.split()[:2] or [""]
        if first in groups and rest and re.fullmatch(r"[a-z|-]+", rest[0]):
            unknown += [code for name in rest[0].split("|") if name not in root.commands[first].commands]
        elif re.match(r"--[a-z]", first) and first.partition("=")[0] not in options | OF_OTHERS:
            unknown.append(code)
    assert not unknown, f"{documented(document)} names commands or options that are not there: {unknown}"


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
                exec(ast.unparse(node), {})  # a name may be a module that nothing has imported yet


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
