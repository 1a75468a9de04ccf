"""What commands say of values that they refuse, in words of their own and not in a library's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from cat_cluster.cli import __main__
from cat_cluster.cli.app import app
from cat_cluster.settings import Settings
from tests.support.tiny_jobs import CommandLine, assert_refused


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.mark.parametrize("words", [("generate", "--prompt", "a cup"), ("pocket", "grid")])
@pytest.mark.parametrize(
    ("out", "told"),
    [
        ("g5.jpg", "g5.jpg: images are written as PNG, and its suffix is .jpg; give --out a name that ends in .png"),
        ("newdir/", "newdir/: it is a folder; name a file in it"),
        ("", ": it is a folder; name a file in it"),
    ],
)
def test_an_image_is_not_written_to_what_is_no_name_of_a_png(
    command: CommandLine, tmp_path: Path, words: tuple[str, ...], out: str, told: str
) -> None:
    assert_refused(command(*words, "--out", f"{tmp_path}/{out}"), f"cannot write {tmp_path}/{out}", told)
    assert list(tmp_path.iterdir()) == []


def test_manifests_are_not_written_to_a_folder_that_is_yet_to_be(command: CommandLine, tmp_path: Path) -> None:
    ended = command("k8s", "render", "spec.yaml", "--out", f"{tmp_path}/new/")
    assert_refused(ended, "new/: it is a folder; name a file in it")


def test_generate_refuses_control_characters(command: CommandLine, tmp_path: Path) -> None:
    ended = command("generate", "--prompt", "a\x01b", "--out", tmp_path / "a.png")
    assert_refused(ended, r"prompt: holds the control character '\x01'; remove it")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--token", "sks", "--token", "SKS"), "two concepts have the same token: name each token once"),
        (("--token", "s k", "--token", "sks"), "concepts[0].token: 's k' must be one word, without spaces"),
        (
            ("--token", "ohwx", "--token", "s\u200bk"),
            r"concepts[1].token: 's\u200bk' holds '\u200b', which nobody sees",
        ),
        (("--token", "ohwx", "--token", "mug"), "concepts[1].token: 'mug' is a word of the class noun 'mug'"),
    ],
)
def test_import_says_what_is_wrong_in_plain_words(
    command: CommandLine, tmp_path: Path, options: tuple[str, ...], told: str
) -> None:
    file = tmp_path / "mug.safetensors"
    file.write_bytes(b"")
    nouns = ("--class-noun", "cup", "--class-noun", "mug")
    ended = command("adapters", "import", file, "--id", "mug", *options, *nouns, "--storage", tmp_path)
    assert_refused(ended, f"error mug.safetensors cannot be imported as asked:\n{told}")
    assert "Value error" not in ended.err


def test_import_names_the_rule_of_ids_and_not_a_pattern(command: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "mug.safetensors"
    file.write_bytes(b"")
    given = ("--id", "My Mug", "--token", "sks", "--class-noun", "mug", "--storage", tmp_path)
    assert_refused(command("adapters", "import", file, *given), "id: 'My Mug' does not fit: Name of the adapter")


def test_a_format_that_is_none_is_refused_with_those_there_are(command: CommandLine, tmp_path: Path) -> None:
    ended = command("adapters", "export", "cup", "--format", "x", "--out", tmp_path)
    assert ended.code == 2
    assert "'--format': 'x' is not one of 'diffusers', 'peft', 'kohya'" in ended.err


def test_errors_are_shown_without_what_a_terminal_obeys(command: CommandLine, tmp_path: Path) -> None:
    ended = command("spec", "check", tmp_path / "\x1b[31mred \u732b.yaml")
    assert_refused(ended, "/\\x1b[31mred \u732b.yaml: cannot be read")
    assert ended.err.replace("\n", "").isprintable()


@pytest.mark.parametrize("when", ["imported", "run"])
def test_an_interrupt_at_the_start_ends_in_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], when: str
) -> None:
    class Interrupted:
        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "cat_cluster.cli.app", Interrupted())
    if when == "run":
        monkeypatch.setitem(sys.modules, "cat_cluster.cli.app", type("Module", (), {"main": staticmethod(interrupt)}))
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert (ended.value.code, capsys.readouterr().err) == (130, "")


def test_generate_refuses_a_weight_that_cannot_be(command: CommandLine, tmp_path: Path) -> None:
    words = ("generate", "--prompt", "a (cup:12)", "--out", tmp_path / "a.png", "--weighting", "a1111")
    assert_refused(command(*words), "prompt: 'cup' has the weight 12", "may have 0 to 10: write a number")


def storage_helps(found: Any, *words: str) -> Iterator[tuple[str, str]]:
    """The words of each command that has --storage, and what its help says of it."""
    for name, one in getattr(found, "commands", {}).items():
        yield from storage_helps(one, *words, name)
    for option in found.params:
        if "--storage" in option.opts:
            yield " ".join(words), option.help


def test_every_command_says_what_storage_it_takes_without_the_option() -> None:
    default = Settings.model_fields["storage"].default
    found = dict(storage_helps(typer.main.get_command(app)))
    assert {"serve", "adapters list", "generate", "jobs list"} <= found.keys()
    for command, told in found.items():
        if command.startswith("k8s "):  # pods see no folder of this machine
            assert default not in told
        else:
            assert told.endswith(f"$CAT_STORAGE, else {default}."), command
