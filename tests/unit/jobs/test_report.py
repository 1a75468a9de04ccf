"""docs/benchmarks says what the result files say, and calls a missed figure missed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import pytest

from jobs.benchmark.pages import PAGES, page_texts, write_pages
from jobs.benchmark.record import RESULTS, ROOT, Start, read_result, write_result
from jobs.benchmark.study.aims import AIMS
from jobs.benchmark.study.compare import leak_means

START = Start("2026-11-25T06:03:30+00:00", "3e808594ebfb", dirty=False)


def test_there_is_no_page_without_results() -> None:
    assert {path.name for path in PAGES.glob("*.md")} == set(page_texts())


def test_every_result_says_where_it_comes_from() -> None:
    found = sorted(RESULTS.glob("*.json"))
    assert found
    for path in found:
        result = json.loads(path.read_text(encoding="utf-8"))
        assert {"benchmark", "measured", "commit", "dirty", "machine"} <= set(result)
        assert result["benchmark"] == path.stem
        assert {"processor", "cores", "threads", "gpu", "python", "versions"} <= set(result["machine"])


def test_a_result_file_records_its_start_and_this_machine(tmp_path: Path) -> None:
    path = write_result("tried", {"ratio": 2.0}, START, tmp_path)
    assert read_result("tried", tmp_path) == json.loads(path.read_text())
    assert read_result("not-measured", tmp_path) is None
    result = json.loads(path.read_text())
    assert (result["ratio"], result["measured"], result["commit"], result["dirty"]) == (2.0, *astuple(START))
    assert result["machine"]["versions"]["torch"]


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "missed"), [(1.0, False), (0.999, True)])
def test_a_ratio_below_its_aim_is_called_missed(tmp_path: Path, factor: float, missed: bool) -> None:
    score = {
        aim.metric: {"estimate": 0.95, "interval": [0.9, 1.0], "ratio": [aim.ratio] * 3, "difference": [0.0, 0.0, 0.0]}
        for aim in AIMS["single"]
    }
    score["identity_gain"]["ratio"] = [0.9 * factor] * 3
    write_result(
        "study-single",
        {
            "training": dict.fromkeys(
                ("steps", "rank", "targets", "learning_rate", "rows_per_concept", "prior_prompt", "cat_fraction"), 1
            )
            | {"teacher": "online"},
            "default_alpha": 5.0,
            "evaluation": {"images_per_prompt": 1, "steps": 20},
            "subjects": {"cup": ["cup"]},
            "trials": {name: {"subjects": 1, "seeds": [0]} for name in ("lora", "cat")},
            "judges": {
                "pocket": {"lora": score, "cat": score},
                "recognition": {"lora": None, "cat": None},
                "prompts_followed": {},
            },
        },
        START,
        tmp_path,
    )
    pages = write_pages(tmp_path, tmp_path / "pages")
    text = (tmp_path / "pages" / "study.md").read_text(encoding="utf-8")
    assert ("**missed**" in text) is missed
    assert (tmp_path / "pages" / "study.png").stat().st_size > 5_000
    assert {path.name for path in pages} == {"README.md", "study.md"}


def test_the_means_of_leaks_are_over_concepts_by_what_stood_before_the_noun() -> None:
    matrix = {
        "tokens": ["sks", "zwx"],
        "triggers": ["sks", "zwx", "none", "decoy wjq"],
        "values": [[0.4, 0.1, 0.0, 0.2], [0.3, 0.6, 0.1, 0.0]],
    }
    alone = {"tokens": ["sks"], "triggers": ["sks", "none", "decoy wjq"], "values": [[0.5, 0.25, 0.0]]}
    found = leak_means({"cat/one": {"pocket": matrix}, "lora/cup": {"pocket": alone}})["pocket"]
    assert found["cat"] == pytest.approx({"own": 0.5, "other": 0.2, "decoy": 0.1, "none": 0.05})
    assert found["lora"] == {"own": 0.5, "other": None, "decoy": 0.0, "none": 0.25}


def test_the_readme_has_the_figures_of_the_studys_result_files() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for part, start in (
        ("single", "| one concept per adapter |"),
        ("joint", "| four concepts per adapter, 2 rows each |"),
    ):
        result = read_result(f"study-{part}")
        assert result is not None
        scores, seen = result["judges"]["pocket"], result["judges"]["recognition"]
        cells = [
            " -> ".join(f"{scores[method][metric]['estimate']:.3f}" for method in ("lora", "cat"))
            for metric in ("kps", "base_drift", "identity_gain")
        ]
        rates = (f"{seen[m]['rate']:.0%} / {seen[m]['rate_without_token']:.0%}" for m in ("lora", "cat"))
        assert f"{start} {' | '.join(cells)} | {' -> '.join(rates)} |" in readme
    assert result is not None
    for trial, name in (("lora", "plain LoRA"), ("cat", "CAT")):
        means = leak_means(result["leaks"])["pocket"][trial]
        assert f"| {name} | {' | '.join(f'{value:.3f}' for value in means.values())} |" in readme


def test_the_readme_has_the_figures_of_the_demos_result_file() -> None:
    readme, result = (ROOT / "README.md").read_text(encoding="utf-8"), read_result("demo")
    assert result is not None
    methods = [result["methods"][name] for name in ("lora", "cat")]
    scores = [method["judges"]["pocket"] for method in methods]

    def row(title: str, values: Sequence[str]) -> str:
        cells = [rf"\*{{0,2}}{re.escape(value)}\*{{0,2}}" for value in values]
        return r"\| " + r" \| ".join([re.escape(title), *cells]) + r" \|"

    for title, metric in (
        ("KPS", "kps"),
        ("base drift", "base_drift"),
        ("identity similarity", "identity_similarity"),
        ("identity gain", "identity_gain"),
    ):
        assert re.search(row(title, [f"{one['metrics'][metric]:.3f}" for one in scores]), readme), title
    assert re.search(row("identity gain by a decoy word", [f"{one['decoy_gain']:.3f}" for one in scores]), readme)
    for title, name in (("with", "rate"), ("without", "rate_without_token")):
        rates = [f"{method['recognition'][name]:.0%}" for method in methods]
        assert re.search(row(f"recognised as the taught cup, {title} the token", rates), readme)
    diversity = [f"{one['metrics']['diversity_ratio']:.2f}" for one in scores]
    assert re.search(row("diversity of plain cups, relative to the base", diversity), readme)
    lora, cat = (method["judges"]["pocket-classifier"]["metrics"] for method in methods)
    assert f"KPS {cat['kps']:.3f} against {lora['kps']:.3f}, base drift {cat['base_drift']:.3f} against" in readme
