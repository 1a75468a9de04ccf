"""What every command refuses before it runs: values that no option means, whatever their type lets through."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from cat_cluster.errors import OutputError, SpecError


class CheckedCommand(TyperCommand):
    """A command that refuses empty values, text that is not UTF-8, numbers that are not finite or beyond 64 bits."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as typer does, and check each value; typer.BadParameter names the option."""
        _check_given(args)
        rest: list[str] = super().parse_args(ctx, args)
        for parameter in self.params:
            hint = " / ".join(parameter.opts)
            for value in _each(ctx.params.get(parameter.name)):
                if isinstance(value, float) and not math.isfinite(value):
                    raise typer.BadParameter(f"{value} is not a finite number", ctx=ctx, param_hint=hint)
                if isinstance(value, int) and not -(2**63) <= value < 2**63:
                    raise typer.BadParameter("is beyond 64 bits; give a smaller number", ctx=ctx, param_hint=hint)
        return rest


def check_all_values(app: typer.Typer) -> None:
    """Make every command of an app, and of those below it, a CheckedCommand."""
    for command in app.registered_commands:
        command.cls = CheckedCommand
    for group in app.registered_groups:
        if group.typer_instance is not None:
            check_all_values(group.typer_instance)


def output_folder(folder: Path) -> Path:
    """Return a folder to write to; raises OutputError when a file is in its way, or it may not be written."""
    for place in (folder, *folder.absolute().parents):
        if place.is_dir():
            if os.access(place, os.W_OK | os.X_OK):
                return folder
            raise OutputError(f"cannot write to {folder}: {place} is not this user's to write; choose another")
        if os.path.lexists(place):
            raise OutputError(f"cannot write to {folder}: {place} is a file; name a folder")
    return folder


def output_file(given: str | Path) -> Path:
    """Return a file to write, as it was typed; raises OutputError for a folder, or one that cannot be written to."""
    path = Path(given)
    if path.is_dir() or str(given).endswith(os.sep):
        raise OutputError(f"cannot write {given}: it is a folder; name a file in it")
    output_folder(path.parent)
    return path


def png_file(given: str | Path) -> Path:
    """Return a PNG file to write; raises OutputError as `output_file` does, and for the suffix of another format."""
    path = output_file(given)
    if path.suffix.lower() not in ("", ".png"):
        raise OutputError(
            f"cannot write {path}: images are written as PNG, and its suffix is {path.suffix}; give --out a name that "
            "ends in .png"
        )
    return path


def read_file(path: Path | None) -> bytes | None:
    """Return what a file holds, None of no file; raises SpecError when it cannot be read."""
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}; check the path and its permissions") from error


def above_zero(value: float | None) -> float | None:
    """Return a number, or none; typer.BadParameter unless it is above 0."""
    if value is not None and not value > 0:
        raise typer.BadParameter(f"must be above 0, got {value:g}")
    return value


def _check_given(args: Sequence[str]) -> None:
    for before, given in zip(("", *args), args, strict=False):
        option, equals, value = given.partition("=") if given.startswith("--") else (before, "=", given)
        if not equals:
            continue
        where = f"{option} is" if option.startswith("-") and option != "--" else "an argument is"
        if not value.strip():
            raise typer.BadParameter(f"{where} empty; give a value, or leave it out")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise typer.BadParameter(f"{where} not UTF-8 text: {value!a}") from None


def _each(value: object) -> Iterator[object]:
    if isinstance(value, list | tuple):
        yield from value
    else:
        yield value
