"""docs/architecture.md says of the rooms and their layers what the tree and the import contract say."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import cat_cluster

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
LAYERS = next(contract for contract in CONTRACTS if contract["type"] == "layers")["layers"]


def test_the_layers_of_the_page_are_those_of_the_contract() -> None:
    shown = re.search(r"highest first:\n\n```text\n(.*?)```", PAGE, re.DOTALL)
    assert shown is not None
    assert shown[1].splitlines() == LAYERS


def test_every_room_is_in_the_contract_and_on_the_page() -> None:
    rooms = {path.parent.name for path in (ROOT / "cat_cluster").glob("*/__init__.py")}
    files = {path.stem for path in (ROOT / "cat_cluster").glob("*.py")} - {"__init__"}
    assert {room for layer in LAYERS for room in layer.split(" | ")} == rooms | files
    named = {f"`cat_cluster/{room}/`" for room in rooms} | {f"`cat_cluster/{file}.py`" for file in files}
    named |= {f"`serve/{path.parent.name}/`" for path in (ROOT / "serve").glob("*/__init__.py")}
    assert not {name for name in named if name not in PAGE}
    assert len(rooms) <= 13
    assert len(files) <= 3
    assert len(LAYERS) <= 10


API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
RUNS = ", ".join(f"cat_cluster.runs.{path.stem}" for path in sorted((ROOT / "cat_cluster" / "runs").glob("[a-z]*.py")))
SIGNATURES = re.findall(r"^\| `(\w+)(\(.*?\))` \|", API, re.MULTILINE)


@pytest.mark.parametrize(("name", "signature"), SIGNATURES, ids=[name for name, _ in SIGNATURES])
def test_signatures_of_the_api_page_are_those_of_the_code(name: str, signature: str) -> None:
    """The page may leave out the last ones of what has a default."""
    (shown,) = ast.parse(f"def {name}{signature}: ...").body
    assert isinstance(shown, ast.FunctionDef)
    found = inspect.signature(getattr(cat_cluster, name)).parameters
    by_place = [parameter for parameter in found.values() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    told = [argument.arg for argument in shown.args.args]
    assert told == [parameter.name for parameter in by_place[: len(told)]]
    assert all(parameter.default is not parameter.empty for parameter in by_place[len(told) :])
    needed = len(told) - len(shown.args.defaults)
    assert all(parameter.default is parameter.empty for parameter in by_place[:needed])
    pairs = list(zip(by_place[needed : len(told)], shown.args.defaults, strict=True))
    for argument, default in zip(shown.args.kwonlyargs, shown.args.kw_defaults, strict=True):
        assert default is not None
        assert found[argument.arg].kind is inspect.Parameter.KEYWORD_ONLY
        pairs.append((found[argument.arg], default))
    for parameter, default in pairs:
        assert parameter.default == ast.literal_eval(default), parameter


@pytest.mark.parametrize("name", cat_cluster.__all__)
def test_every_name_of_the_api_is_there_and_documented(name: str) -> None:
    assert getattr(cat_cluster, name) is not None
    assert re.search(rf"^\| `{name}[`(]", API, re.MULTILINE)


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("cat_cluster", ("torch", "diffusers", "transformers", "ray")),
        pytest.param(
            "cat_cluster.registry, cat_cluster.cli.adapters", ("torch", "diffusers", "ray"), marks=pytest.mark.slow
        ),
        pytest.param("serve.app", ("torch", "diffusers", "transformers"), marks=pytest.mark.slow),  # an ingress
        pytest.param("serve.local", ("diffusers", "transformers"), marks=pytest.mark.slow),
        (RUNS, ("torch", "numpy", "ray", "boto3")),  # a service that trains nothing reads runs too
        ("jobs.train", ("torch", "diffusers", "transformers", "ray")),  # until the job is known to be right
    ],
)
def test_what_is_not_needed_is_not_imported(module: str, without: tuple[str, ...]) -> None:
    """To import diffusers and transformers takes each process seconds."""
    code = f"import sys, {module}; print([name for name in {without} if name in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"


def test_the_package_names_what_it_has() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = cat_cluster.no_such_name
