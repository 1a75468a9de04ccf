"""A stdout that cannot be written: one error for people, and no traceback beside it."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from tests.support.tiny_jobs import CommandLine


class Full(io.RawIOBase):
    """A file on a full disk."""

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        raise OSError(28, "No space left on device")


class Left(Full):
    """A pipe whose reader has ended."""

    def write(self, data: object) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def stdout_of(raw: io.RawIOBase, *, buffered: bool) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedWriter(raw), write_through=not buffered)


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("adapters", "list", "--json"), "No space left on device"),
        (("adapters", "verify", "cup", "--json"), "no adapter 'cup'"),
    ],
)
def test_a_full_disk_is_said_once(
    command: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: tuple[str, ...],
    said: str,
    buffered: bool,
) -> None:
    monkeypatch.setattr(sys, "stdout", stdout_of(Full(), buffered=buffered))
    ended = command(*words, "--storage", tmp_path)
    assert ended.code == 1
    assert said in ended.err
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_has_left_is_no_error_to_tell(
    command: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, buffered: bool
) -> None:
    monkeypatch.setattr(sys, "stdout", stdout_of(Left(), buffered=buffered))
    ended = command("adapters", "list", "--json", "--storage", tmp_path)
    assert (ended.code, ended.err) == (1, "")


def test_without_a_stdout_errors_are_still_told(
    command: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    ended = command("adapters", "verify", "cup", "--json", "--storage", tmp_path)
    assert (ended.code, ended.err.count("\n")) == (1, 1)
