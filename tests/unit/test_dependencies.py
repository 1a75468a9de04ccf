"""pyproject.toml lists what the code imports, and nothing else."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"cat_cluster", "serve", "jobs", "tests"}
# Of jobs/benchmark: peft is what it measures us against, and developers have it.
DEVELOPERS = {"peft"}
# Parts of a listed package that are imported under a name of their own, and what shares a namespace with one.
PARTS = {"botocore", "pydantic-core"}
PARTS |= {f"opentelemetry-{name}" for name in ("proto", "semantic-conventions")}
PARTS |= {f"opentelemetry-exporter-{name}" for name in ("prometheus", "http-transport", "otlp-common")}
PARTS |= {"opentelemetry-exporter-otlp-proto-common"}
# Not imported by us: torch.utils.tensorboard needs it.
THROUGH_OTHERS = {"tensorboard"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def listed(*groups: list[str]) -> set[str]:
    names = {re.match(r"[A-Za-z0-9._-]+", line)[0] for group in groups for line in group}  # type: ignore[index]
    return {normal(name) for name in names} - {"cat-cluster"}


def imported() -> Iterator[str]:
    """The top-level module of every import."""
    for folder in ("cat_cluster", "serve", "jobs"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    yield from (alias.name.partition(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom):
                    assert node.module is not None
                    yield node.module.partition(".")[0]


def test_every_package_that_is_imported_is_listed_and_the_other_way_round() -> None:
    distributions = packages_distributions()
    modules = set(imported()) - OURS - set(sys.stdlib_module_names)
    needed = {normal(name) for module in modules for name in distributions[module]}
    extras = PROJECT["optional-dependencies"]
    users = listed(
        PROJECT["dependencies"], *(extras[name] for name in ("c2pa", "cluster", "heic", "k8s", "otel", "s3", "serve"))
    )
    named = {normal(name) for name in re.findall(r'files\("(\w+)"\)', (ROOT / "serve/http/pages.py").read_text())}
    assert needed - DEVELOPERS - PARTS | named | THROUGH_OTHERS == users


def test_all_is_every_extra_of_users_but_one_and_developers_have_them() -> None:
    """pillow-heif's own licence is BSD-3, and that of its wheels GPLv2: whoever wants it asks for it."""
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == {"all", "c2pa", "cluster", "dev", "heic", "k8s", "otel", "s3", "serve"}
    assert extras["all"] == ["cat-cluster[c2pa,cluster,k8s,otel,s3,serve]"]
    assert "cat-cluster[all,heic]" in extras["dev"]


def test_every_listed_package_has_an_exact_version_to_test_with() -> None:
    exact = {
        normal(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    assert listed(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()) <= exact
