"""What a test starts, its marks name; and in CI a skipped test fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.marks import GUARDED

TESTS = Path(__file__).parents[1]
SUITE = """
import os, pytest, ray
from playwright.sync_api import sync_playwright
from tests.support.s3_server import install

def start_ray():
    ray.init(address="local", include_dashboard=False, num_cpus=1, log_to_driver=False)

def start_browser():
    with sync_playwright():
        pass

@pytest.mark.parametrize("start", [start_ray, install, start_browser], ids=["ray", "s3", "browser"])
def test_unmarked(start):
    start()

@pytest.mark.s3
def test_marked():
    assert "lacks the mark" not in os.environ.get("CAT_S3_SERVER_DIR", "")
    assert "lacks the mark ray" in os.environ["RAY_TMPDIR"]

def test_skipped():
    pytest.skip("no kettle")

@pytest.mark.xfail(strict=True)
def test_expected_to_fail():
    assert False

def test_by_fixture(s3_server, request):
    assert request.node.get_closest_marker("s3")

@pytest.fixture
def s3_server():
    pass
"""


def run_suite(folder: Path, *, ci: bool) -> tuple[str, dict[str, str]]:
    """Run SUITE in a pytest of its own; its output, and the outcome of each test."""
    (folder / "test_suite.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.marks", "-p", "no:cacheprovider", "-v"]
    command += ["-p", "no:schemathesis"]  # imports itself at the end, which Python 3.11 fails at now and then
    # Without what pytest-xdist tells its workers, or plugins of this pytest would take it for one.
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in GUARDED.values() and not name.startswith("PYTEST_")
    }
    done = subprocess.run(
        [*command, "-c", "pyproject.toml", "--rootdir", folder, folder],
        cwd=TESTS.parent,
        env={**environment, "CI": "true" if ci else ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    outcomes = dict(re.findall(r"test_suite\.py::test_(\S+) (\w+)", done.stdout))
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    return done.stdout, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("ci", [False, True])
def test_a_missing_mark_is_found_and_a_skip_fails_in_ci(tmp_path: Path, ci: bool) -> None:
    output, outcomes = run_suite(tmp_path, ci=ci)
    assert outcomes == {
        "unmarked[ray]": "FAILED",
        "unmarked[s3]": "FAILED",
        "unmarked[browser]": "FAILED",
        "marked": "PASSED",
        "skipped": "FAILED" if ci else "SKIPPED",
        "expected_to_fail": "XFAIL",
        "by_fixture": "PASSED",
    }, output
    for mark in ("ray", "s3", "browser"):
        assert f"lacks the mark {mark}" in output
    assert ("no kettle (in CI no test may be skipped" in output) == ci


def imported_helpers(text: str) -> set[Path]:
    """The files of tests/support that a module imports."""
    names = re.findall(r"from tests\.support\.(\w+) import", text)
    for line in re.findall(r"from tests\.support import ([\w, ]+)", text):
        names += line.replace(" ", "").split(",")
    return {TESTS / "support" / f"{name}.py" for name in names}


# They look at what is refused before Ray starts, or take from a helper what needs none.
START_NO_RAY = {
    "test_connection.py",
    "test_demo_serving.py",
    "test_local.py",
    "test_local_ray.py",
    "test_serving_load.py",
    "test_stored_spec.py",
}


def test_modules_that_give_ray_a_folder_are_marked() -> None:
    """Such a module takes the guard away: it is marked, or so are its tests."""
    marked, unmarked = [], []
    for path in TESTS.rglob("test_*.py"):
        text = path.read_text()
        if path != Path(__file__) and any("RAY_TMPDIR" in one for one in [text, *map(read, imported_helpers(text))]):
            (marked if "pytest.mark.ray" in text else unmarked).append(path.name)
    assert set(unmarked) == START_NO_RAY
    assert len(marked) >= 5


def read(path: Path) -> str:
    return path.read_text()
