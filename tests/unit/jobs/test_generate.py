"""Every generated file is what its source makes; a change of a source makes exactly its files stale."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, Field

from cat_cluster.telemetry import LABELS, SERVING_METRICS, TRAINING_METRICS
from jobs.benchmark.pages import PAGES, pictures
from jobs.benchmark.record import ROOT
from jobs.generate import field_table, generated_texts, metrics_page, operator_rules, stale_files, with_field_tables

TEXTS = generated_texts()
PICTURES = [(PAGES / name).relative_to(ROOT).as_posix() for name in pictures()]


@pytest.fixture(scope="module")
def stale() -> list[str]:
    return stale_files()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for path in (*TEXTS, *PICTURES, "k8s/monitoring/rules.yaml"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    return tmp_path


@pytest.mark.parametrize("path", [*TEXTS, *PICTURES])
def test_no_generated_file_is_stale(stale: list[str], path: str) -> None:
    assert path not in stale, f"{path} is stale: run `make generate`"


def test_only_what_differs_from_its_source_is_stale(copy: Path) -> None:
    assert stale_files(copy) == []
    page, picture = copy / "docs/benchmarks/study.md", copy / "docs/benchmarks/packing.png"
    page.write_text(page.read_text(encoding="utf-8").replace("0.341", "0.431"), encoding="utf-8")
    shutil.copy(copy / "docs/benchmarks/study.png", picture)
    (copy / "docs/metrics.md").unlink()
    (copy / "docs/benchmarks/study.png").unlink()
    rules = copy / "k8s/monitoring/rules.yaml"
    rules.write_text(rules.read_text(encoding="utf-8") + "# one more line\n", encoding="utf-8")
    assert set(stale_files(copy)) == {
        "docs/metrics.md",
        "k8s/monitoring/prometheusrule.yaml",
        "docs/benchmarks/study.md",
        "docs/benchmarks/study.png",
        "docs/benchmarks/packing.png",
    }


class Engine(BaseModel):
    """A model to document."""

    name: str = Field(description="Its name.")
    cylinders: int | None = Field(default=None, description="How many.")


def test_the_table_of_a_model_stands_between_its_markers() -> None:
    page = "above\n<!-- generated: Engine -->\nold\n<!-- end -->\nbelow <!-- end -->\n"
    table = (
        "\n| field | default | what it is |\n|---|---|---|\n"
        "| `name` | required | Its name. |\n| `cylinders` | `null` | How many. |\n\n"
    )
    assert field_table(Engine) == table
    written = with_field_tables(page, Engine)
    assert written == f"above\n<!-- generated: Engine -->\n{table}<!-- end -->\nbelow <!-- end -->\n"
    assert with_field_tables(written, Engine) == written
    for lacking in ("no table", "<!-- generated: Engine -->\nno end"):
        with pytest.raises(ValueError, match="generated: Engine"):
            with_field_tables(lacking, Engine)


def test_the_operator_is_given_the_same_rules() -> None:
    rules = (ROOT / "k8s/monitoring/rules.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(operator_rules(rules))["spec"] == yaml.safe_load(rules)


def test_the_metrics_page_has_every_metric_and_label() -> None:
    page = metrics_page()
    assert all(f"`{spec.name}`" in page and spec.help in page for spec in (*TRAINING_METRICS, *SERVING_METRICS))
    assert all(f"`{name}`" in page and label.help in page for name, label in LABELS.items())
