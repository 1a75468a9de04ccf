"""The house's own budgets: rooms small enough to read in one sitting."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for package in ("cat_cluster", "serve", "jobs") for path in (ROOT / package).rglob("*.py"))


def test_files_stay_under_400_lines_and_functions_under_60() -> None:
    assert len(SOURCES) > 40
    long_files = {path.name: n for path in SOURCES if (n := len(path.read_text().splitlines())) > 400}
    long_functions = {
        f"{path.name}:{node.name}": node.end_lineno - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno >= 60
    }
    assert long_files == {}
    assert long_functions == {}


def test_every_module_says_what_it_is() -> None:
    assert [path.name for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text()))] == []
