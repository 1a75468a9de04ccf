"""The files around the code agree: versions of Python, the version of the package, and what CI and the hooks run."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_ci_runs_on_every_python_that_the_package_claims() -> None:
    claimed = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d", name)]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["jobs"]["ci"]["strategy"]["matrix"]["python"] == claimed
    first, last = claimed[0], claimed[-1]
    after = f"3.{int(last.removeprefix('3.')) + 1}"
    assert PROJECT["requires-python"] == f">={first},<{after}"
    assert workflow["jobs"]["ci"]["steps"][-1] == {"run": ".ci/run"}


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


def test_what_ci_and_the_hooks_run_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = [
        re.findall(r"\bmake ([a-z0-9-]+)", (ROOT / name).read_text()) for name in (".ci/run", ".pre-commit-config.yaml")
    ]
    assert all(called)
    assert {name for names in called for name in names} <= targets
    hooks = {
        hook["entry"]
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repo["hooks"]
    }
    lint = re.search(r"^lint: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert lint is not None
    assert hooks == {f"make {name}" for name in lint[1].split()}


def test_the_tests_of_a_real_cluster_are_run_each_once_and_the_removal_last() -> None:
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(r"^e2e: .*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert recipe is not None
    files = re.findall(r"tests/e2e/(test_\w+\.py)", recipe[1])
    assert sorted(files) == sorted(path.name for path in (ROOT / "tests" / "e2e").glob("test_*.py"))
    assert (files[0], files[-1]) == ("test_install.py", "test_removal.py")
