"""Marks that say what a test needs, a guard that finds a missing mark, and no skipped test in CI.

`ray`, `s3` and `browser` name what a test starts. `slow` is for tests that compile, pretrain or run Pocket-SD, fuzz,
benchmark, or start processes that load torch. A test of tests/unit with none of the four gets the mark `unit`:
`make unit` runs these.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, TypeVar

import pytest

UNIT = Path(__file__).parents[1] / "unit"
BY_FIXTURE = {"s3_server": "s3", "browser": "browser"}
# The variable that tells each where to find its files, here and in every child process. Without the mark it names a
# path that cannot be made, so that Ray, the S3 server and Playwright do not start, and say why.
GUARDED = {"ray": "RAY_TMPDIR", "s3": "CAT_S3_SERVER_DIR", "browser": "PLAYWRIGHT_NODEJS_PATH"}
Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Mark tests by the fixtures they use and by their folder."""
    for item in items:
        for fixture, mark in BY_FIXTURE.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(mark)
        if UNIT in item.path.parents and not any(map(item.get_closest_marker, (*GUARDED, "slow"))):
            item.add_marker("unit")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Let a test, with its fixtures, start what its marks name and nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        for mark, variable in GUARDED.items():
            if item.get_closest_marker(mark) is None:
                patch.setenv(variable, f"/dev/null/{item.name} lacks the mark {mark}")
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that is skipped in CI has failed."""
    return _fail_skipped_in_ci((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A module that is skipped in CI has failed."""
    return _fail_skipped_in_ci((yield))


def _fail_skipped_in_ci(report: Report) -> Report:
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI") == "true":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{reason} (in CI no test may be skipped: .ci/run installs what they need)"
    return report
