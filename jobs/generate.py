"""Every generated file of the repository: `python -m jobs.generate` writes them, `--check` names those that are stale.

Whole files are made of their source; tables inside a page stand between `<!-- generated: NAME -->` and `<!-- end -->`.
Pictures carry the digest of the result files that they show, since drawings differ from machine to machine.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console

from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.spec.job import AdapterSpec, JobSpec
from cat_cluster.spec.sections import ClusterSpec, EvaluationSpec, MonitoringSpec, TextEncoderSpec, TrainingSpec
from cat_cluster.telemetry import LABELS, MOST_SERIES, OTHER, SERVING_METRICS, TRAINING_METRICS
from jobs.architecture_diagram import layers, way_of_the_data
from jobs.benchmark.figures import digest_in, digest_of
from jobs.benchmark.pages import PAGES, draw_picture, markdown_templates, page_texts, pictures
from jobs.benchmark.record import RESULTS, ROOT, measured_on, read_result
from serve.settings import Deployment, ProbeSettings, SafetySettings, ServeSettings, SigningSettings

# page -> the models whose fields it documents, each as a table named after the model
FIELD_TABLES: Mapping[str, tuple[type[BaseModel], ...]] = {
    "docs/training.md": (
        JobSpec,
        AdapterSpec,
        ConceptSpec,
        TrainingSpec,
        TextEncoderSpec,
        EvaluationSpec,
        ClusterSpec,
        MonitoringSpec,
    ),
    "docs/serving.md": (ServeSettings, SigningSettings, SafetySettings, ProbeSettings, Deployment),
}
_RULES = "k8s/monitoring/rules.yaml"
_OPERATOR_RULES = "k8s/monitoring/prometheusrule.yaml"
_OPERATIONS = "docs/operations.md"
_OPERATOR_HEAD = """\
# Generated from rules.yaml: change that, then `make generate`.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: cat-cluster
  labels: {app.kubernetes.io/part-of: cat-cluster}
spec:
"""


def generated_texts(root: Path = ROOT) -> dict[str, str]:
    """Return path -> content of every generated text file, as it should be. A new kind of file is one more line."""
    return {
        "docs/metrics.md": metrics_page(),
        "docs/images/architecture.svg": way_of_the_data(),
        "docs/images/layers.svg": layers(),
        _OPERATOR_RULES: operator_rules((root / _RULES).read_text(encoding="utf-8")),
        **{
            page: with_field_tables((root / page).read_text(encoding="utf-8"), *FIELD_TABLES[page])
            for page in FIELD_TABLES
        },
        _OPERATIONS: with_block((root / _OPERATIONS).read_text(encoding="utf-8"), "kubernetes", cluster_table()),
        **{_relative(PAGES / name): text for name, text in page_texts().items()},
    }


def stale_files(root: Path = ROOT) -> list[str]:
    """Return the paths of the generated files that are missing or are not what their source makes."""
    texts = [path for path, text in generated_texts(root).items() if _read(root / path) != text]
    drawn = {_relative(PAGES / name): digest_of(sources) for name, sources in pictures().items()}
    return texts + [path for path, digest in drawn.items() if digest_in(root / path) != digest]


def metrics_page() -> str:
    """Return docs/metrics.md: every metric and every label."""
    templates = markdown_templates(Path(__file__).parent / "templates")
    return templates.get_template("metrics.md.j2").render(
        training=TRAINING_METRICS, serving=SERVING_METRICS, labels=LABELS, most_series=MOST_SERIES, other=OTHER
    )


def operator_rules(rules: str) -> str:
    """Return Prometheus' rules as an object of its operator; comments stay."""
    lines = rules.splitlines()
    return _OPERATOR_HEAD + "".join(f"  {line}\n" if line else "\n" for line in lines[lines.index("groups:") :])


def with_field_tables(page: str, *models: type[BaseModel]) -> str:
    """Return a page with the table of each model's fields between its markers; ValueError where a marker is missing."""
    for model in models:
        page = with_block(page, model.__name__, field_table(model))
    return page


def with_block(page: str, name: str, text: str) -> str:
    """Return a page with a text between the markers of a name; ValueError where one is missing."""
    start = f"<!-- generated: {name} -->\n"
    head, found, rest = page.partition(start)
    _, end, tail = rest.partition("<!-- end -->")
    if not found or not end:
        raise ValueError(f"the page lacks {start.strip()} with <!-- end --> after it")
    return head + start + text + end + tail


def cluster_table(results: Path = RESULTS) -> str:
    """Return the Markdown table of what `make e2e` did on a real cluster, with what came out, failures included."""
    result = read_result("kubernetes", results)
    if result is None:
        return "\n`make e2e` has no result yet.\n\n"
    cluster = result["cluster"]
    rows = "".join(_tested_row(part) for part in result["parts"])
    where = f"Kubernetes {cluster['kubernetes']}, {cluster['nodes']} node, {', '.join(cluster['runtime'])}"
    return f"\n| `make e2e` | result | at commit |\n|---|---|---|\n{rows}\n{where}. {measured_on(result)}\n\n"


def _tested_row(part: Mapping[str, Any]) -> str:
    outcome = {"passed": "yes", "skipped": "not run"}.get(part["outcome"], "**failed**")
    figures = "; ".join(part["figures"])
    took = f"{part['seconds']:.0f} s"
    return f"| {part['part']} | {outcome}, {took}{': ' if figures else ''}{figures} | {part['commit'][:8]} |\n"


def field_table(model: type[BaseModel]) -> str:
    """Return the Markdown table of a model's fields: name, default, description."""
    schema = model.model_json_schema()
    rows = ["\n| field | default | what it is |\n|---|---|---|\n"]
    for name, field in schema["properties"].items():
        default = _default_text(field["default"]) if "default" in field else "see its text"
        if name in schema.get("required", ()):
            default = "required"
        rows.append(f"| `{name}` | {default} | {field['description']} |\n")
    return "".join([*rows, "\n"])


def _default_text(value: Any) -> str:
    return "see its table" if isinstance(value, dict) and value else f"`{json.dumps(value)}`"


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; name what is stale and exit with 1.")] = False,
) -> None:
    """Write the generated files that are stale: tables in docs, metrics, alert rules, benchmark pages and pictures."""
    console = Console(stderr=True, emoji=False)
    stale, texts = stale_files(), generated_texts()
    for path in stale:
        console.print(f"{'stale' if check else 'wrote'} {path}", soft_wrap=True)
        if check:
            continue
        if path in texts:
            (ROOT / path).write_text(texts[path], encoding="utf-8")
        else:
            draw_picture(Path(path).name, ROOT / path)
    if check and stale:
        console.print("run `make generate`")
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
