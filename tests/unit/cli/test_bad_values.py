"""Bad values on the command line: each is refused in a sentence, by exit code 1 or 2, whatever the command."""

from __future__ import annotations

import inspect
import json
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import typer
from rich.emoji import Emoji

from cat_cluster.cli.app import app
from tests.support.tiny_jobs import CommandLine, Finished, adapter, assert_refused, write_photos, write_spec

pytestmark = pytest.mark.slow


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@dataclass(frozen=True)
class Value:
    """A parameter of a command: how it is given on the command line (none: by its place), and its type."""

    option: str | None
    kind: Any
    required: bool


@dataclass(frozen=True)
class Command:
    """A command by its words, and its parameters."""

    words: tuple[str, ...]
    values: tuple[Value, ...]

    @property
    def has_json(self) -> bool:
        return any(value.option == "--json" for value in self.values)


TREE = typer.main.get_command(app)


def commands() -> Iterator[Command]:
    """Every command of the command line, found in its tree."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), TREE)]
    while waiting:
        words, found = waiting.pop()
        below = getattr(found, "commands", None)
        if below is not None:
            waiting += [((*words, name), one) for name, one in below.items()]
            continue
        hints = get_type_hints(inspect.unwrap(found.callback))
        values = [
            Value(
                one.opts[0] if one.param_type_name == "option" else None,
                item_type(hints[one.name]),
                bool(one.required),
            )
            for one in found.params
            if one.name in hints
        ]
        assert len(values) == len(hints) - ("return" in hints), words
        yield Command(words, tuple(values))


def item_type(hint: Any) -> Any:
    """The type of one value: of X | None and of list[X] it is X."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = [one for one in get_args(hint) if one is not type(None)]
    return get_args(hint)[0] if get_origin(hint) is list else hint


ALL = {" ".join(one.words): one for one in commands()}
HUGE = "9" * 23


def bad_values(kind: Any, folder: Path) -> list[str]:
    """Values that no parameter of the type may have; they must be refused for what they are."""
    if kind is int:
        return ["x", "", "1.5", "nan", "-1", HUGE, f"-{HUGE}"]
    if kind is float:
        return ["x", "", "nan", "inf", "-inf"]
    if kind is Path:
        return ["", " ", "\udcff", str(folder / "file" / "below" / "deep")]
    if kind is str:
        return ["", " ", "\t", "a\udcff"]
    if kind is datetime:
        return ["x", "", "2026-12-01", "2026-12-01T09:00", "2026-13-01T09:00+01:00"]  # a time without a zone is no time
    if kind is bool:
        return []
    assert get_origin(kind) is Literal, f"say here what a bad {kind} is"
    return ["nosuch", "", "\udcff"]


def odd_values(kind: Any, folder: Path) -> list[str]:
    """Values that some parameter of the type may have: they may do no worse than fail."""
    if kind is int:
        return ["0", "2000000000", str(2**63 - 1), "0x10"]
    if kind is float:
        return ["-5", "0", "1e308", "-1e308"]
    if kind is Path:
        return [f"{folder / 'file'}/", str(folder), str(folder / "none"), "x" * 300, "/dev/null", "-"]
    if kind is str:
        return ["x" * 300, "Bad NS", "-", "../..", "a\nb", "{}", "s3://", "http://[", "https://", "[bold", "@", "%00"]
    return []


def good(value: Value, folder: Path) -> str:
    if value.kind is Path:
        return str(folder / "spec.yaml") if value.option is None else str(folder / "new" / "place")
    if get_origin(value.kind) is Literal:
        return str(get_args(value.kind)[0])
    return "7" if value.kind in (int, float) else "cup"


def line(command: Command, changed: Value, given: str, folder: Path) -> list[str]:
    """The words of a command with what it requires, and one value given."""
    words = list(command.words)
    places = []
    for value in command.values:
        if value is not changed and not value.required:
            continue
        text = given if value is changed else good(value, folder)
        if value.option is None:
            places.append(text)
        else:
            words.append(f"{value.option}={text}" if text.startswith("-") else value.option)
            words += [] if text.startswith("-") else [text]
    if command.has_json:
        words.append("--json")
    return [*words, *(["--"] if any(place.startswith("-") for place in places) else []), *places]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file and a spec, where no command gets as far as computing: the device's name is a bad one."""
    (tmp_path / "file").write_text("a file")
    write_spec(tmp_path / "spec.yaml", "pocket", [adapter("cup", write_photos(tmp_path / "photos"))])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAT_DEVICE", "nowhere")
    monkeypatch.setattr(typer.main, "get_command", lambda _: TREE)  # built once, as in a process of its own
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nosuch"))  # no cluster of whoever runs this is asked
    return tmp_path


def run(command: CommandLine, words: list[str]) -> Finished:
    """Run a command whose words a test would not let through, such as bytes that are no UTF-8."""
    try:
        finished = command(*words)
    except Exception as error:
        raise AssertionError(f"cat-cluster {words!a} ends in a traceback") from error
    assert "Traceback" not in finished.err, words
    if finished.code and "--json" in words:
        assert set(finished.json()["error"]) == {"type", "message"}, words
    return finished


@pytest.mark.parametrize("name", ALL)
def test_every_bad_value_of_every_command_is_refused(name: str, command: CommandLine, place: Path) -> None:
    one = ALL[name]
    for value in one.values:
        for given in bad_values(value.kind, place):
            words = line(one, value, given, place)
            finished = run(command, words)
            assert finished.code in (1, 2), (words, finished)
            assert "CAT_DEVICE" not in finished.err, f"{words!a} is accepted"
        for given in odd_values(value.kind, place):
            assert run(command, line(one, value, given, place)).code in (0, 1, 2)


def test_no_help_turns_into_a_picture() -> None:
    """Rich draws `:ID:` as an emoji, in a text that shows what to type."""

    def texts(command: Any) -> Iterator[str]:
        yield command.help or ""
        yield from (option.help or "" for option in command.params if hasattr(option, "help"))
        for below in getattr(command, "commands", {}).values():
            yield from texts(below)

    found = list(texts(TREE))
    assert len(found) > 200
    assert [text for text in found if Emoji.replace(text) != text] == []


def test_every_command_is_found() -> None:
    """The fuzz above is worth what it finds: this one counts on other ways to a command than the tree."""
    groups = [app, *(group.typer_instance for group in app.registered_groups if group.typer_instance is not None)]
    assert len(ALL) == sum(len(group.registered_commands) for group in groups)
    assert {"demo", "generate", "adapters import", "k8s render", "k8s submit", "pocket pretrain"} <= set(ALL)


FINDINGS: dict[str, tuple[list[str], str]] = {
    "demo onto a file": (["demo", "--out", "file/"], "file is a file; name a folder"),
    "pretrain onto a file": (["pocket", "pretrain", "--out", "file/"], "file is a file; name a folder"),
    "pretrain below a file": (["pocket", "pretrain", "--out", "file/a/b"], "file is a file; name a folder"),
    "no judge": (["evaluate", "cup", "--judge", ""], "--judge is empty"),
    "no judge of an import": (
        ["adapters", "import", "file", "--id", "a", "--token", "sks", "--class-noun", "cup", "--judge", " "],
        "--judge is empty",
    ),
    "too many images": (["evaluate", "cup", "--images-per-prompt", "2000000000"], "1000000000"),
    "a huge seed": (["generate", "--prompt", "a", "--out", "a.png", "--seed", HUGE], "--seed"),
    "a negative seed": (["generate", "--prompt", "a", "--out", "a.png", "--seed", "-1"], "--seed"),
    "no output": (["generate", "--prompt", "a", "--out", ""], "--out is empty"),
    "a folder as output": (["generate", "--prompt", "a", "--out", "."], "it is a folder; name a file in it"),
    "an output below a file": (["generate", "--prompt", "a", "--out", "file/a.png"], "file is a file; name a folder"),
    "strength nan": (
        ["generate", "--prompt", "a", "--out", "a.png", "--strength", "nan"],
        "nan is not a finite",
    ),
    "strength inf": (
        ["generate", "--prompt", "a", "--out", "a.png", "--strength", "inf"],
        "inf is not a finite",
    ),
    "no time": (["pocket", "pretrain", "--out", "new", "--minutes", "-5"], "must be above 0, got -5"),
    "emojis of Pocket-SD": (
        ["pocket", "pretrain", "--out", "new", "--emojis", "."],
        "--emojis and --real-judge are pocket-xl's",
    ),
    "no emojis": (
        ["pocket", "pretrain", "--base", "pocket-xl", "--out", "new", "--emojis", "none"],
        "give the unpacked npm package emoji-datasource-google 16.0.0",
    ),
    "a grid of no base": (["pocket", "grid", "--weights", "new"], "new has no model_index.json; name a folder"),
    "no base": (["base", "path", ""], "an argument is empty"),
    "a base of blanks": (["base", "path", "--", " "], "an argument is empty"),
    "a bad namespace": (["k8s", "render", "spec.yaml", "--namespace", "Bad NS"], "--namespace 'Bad NS': must hold"),
    "a bad queue": (["k8s", "render", "spec.yaml", "--queue", "bad queue!"], "--queue 'bad queue!': must hold"),
    "no image": (["k8s", "render", "spec.yaml", "--image", ""], "--image is empty"),
    "a bad image": (["k8s", "render", "spec.yaml", "--image", "a b"], "--image 'a b': is not the name of an image"),
    "bad CPUs": (["k8s", "render", "spec.yaml", "--worker-cpu", "two"], "--worker-cpu 'two': must be a number of CPUs"),
    "bad memory": (
        ["k8s", "render", "spec.yaml", "--worker-memory", "4GB"],
        "--worker-memory '4GB': must be an amount",
    ),
    "no memory": (["k8s", "render", "spec.yaml", "--head-memory", "4"], "--head-memory '4': is 4 bytes, and Ray alone"),
    "a priority in no queue": (
        ["k8s", "render", "spec.yaml", "--priority", "soon"],
        "--priority soon: is the place in",
    ),
    "a hold in a queue": (
        ["k8s", "render", "spec.yaml", "--queue", "cats", "--suspend"],
        "--suspend: Kueue starts a job in its queue all the same",
    ),
    "a bad namespace of a submission": (
        ["k8s", "submit", "spec.yaml", "--namespace", "Bad NS"],
        "--namespace 'Bad NS'",
    ),
    "a submission without a cluster": (["k8s", "submit", "spec.yaml"], "no cluster is configured"),
    "no adapter": (["adapters", "alias", "nosuch", "prod"], "no adapter 'nosuch'"),
}


@pytest.mark.parametrize("finding", FINDINGS)
def test_what_was_found_is_refused_in_a_sentence(
    finding: str, command: CommandLine, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setenv("CAT_DEVICE", "cpu")
    words, said = FINDINGS[finding]
    spec = write_spec(place / "spec.yaml", "pocket", [adapter("cup", place / "photos")])
    spec.write_text(spec.read_text().replace(str(place / "photos"), "s3://bucket/photos"))
    storage = ["--storage", "s3://bucket/cat"] if words[0] == "k8s" else []
    finished = run(command, [*words, *storage])
    assert finished.code in (1, 2)
    assert said in finished.err
    assert finished.out == ""


def test_an_error_is_one_json_document_where_that_was_asked_for(command: CommandLine, place: Path) -> None:
    refused = command("adapters", "list", "--storage", place / "file", "--json")
    assert_refused(refused, "is a file")
    assert refused.json()["error"]["type"] == "StoreError"
    assert refused.json()["error"]["message"] in refused.err
    misused = command("adapters", "list", "--nosuch", "--json")
    assert (misused.code, misused.json()["error"]["type"]) == (2, "UsageError")
    assert "--nosuch" in misused.json()["error"]["message"]
    assert command("adapters", "list", "--nosuch").out == ""


def test_bombs_of_yaml_are_refused_wherever_a_command_reads_some(
    command: CommandLine, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAT_DEVICE", "cpu")
    bomb = place / "bomb.yaml"
    bomb.write_text("a: &a {k: v}\n" + "".join(f"b{n}: &b{n} {{<<: [*a, *a]}}\n" for n in range(9)))
    for words in (
        ["serve", "--config", bomb],
        ["submit", place / "spec.yaml", "--address", "http://127.0.0.1:1", "--runtime-env", bomb],
        ["spec", "check", bomb],
    ):
        assert_refused(command(*words), "bomb.yaml", "<< (a merge of keys) is not read")


def test_the_json_of_an_error_needs_no_terminal(command: CommandLine, place: Path) -> None:
    assert json.loads(command("base", "path", "", "--json").out)["error"]["type"] == "UsageError"
    assert sys.argv[-1] == "--json"
