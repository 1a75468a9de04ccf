"""docs/benchmarks, made from the result files alone: tables, pictures, and whether each figure was reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.benchmark.cluster.measure import PARTS
from jobs.benchmark.cluster.page import cluster_page
from jobs.benchmark.figures import draw_frontier, draw_packing, draw_study, measured_for_aim
from jobs.benchmark.record import RESULTS, ROOT, measured_on, read_result
from jobs.benchmark.serving.page import PAGES as SERVING_PAGES
from jobs.benchmark.serving.page import draw_serving, serving_page
from jobs.benchmark.study.compare import judges_of

PAGES = ROOT / "docs" / "benchmarks"
STUDY_PARTS = ("single", "joint", "photos")
# metric -> the ratio of CAT to plain LoRA that was aimed at; base_drift at most, the others at least.
_AIMS = (
    ("kps", 1.5),
    ("identity_gain", 0.9),
    ("identity_similarity", 0.98),
    ("base_drift", 0.4),
    ("diversity_ratio", 0.9),
)
AIMS: dict[str, Sequence[tuple[str, float]]] = {
    "single": _AIMS,
    "joint": tuple((metric, 0.5 if metric == "base_drift" else aim) for metric, aim in _AIMS),
    "photos": _AIMS,
}
_SHOWN = ("kps", "identity_gain", "identity_similarity", "base_drift", "diversity_ratio", "prompt_similarity")


def write_pages(results: Path = RESULTS, pages: Path = PAGES) -> list[Path]:
    """Write a page for every result that is there, its picture, and the index; return the paths of the pages."""
    pages.mkdir(parents=True, exist_ok=True)
    texts = page_texts(results)
    frontier, packing = read_result("frontier", results), read_result("packing", results)
    study = _read_study(results)
    if frontier:
        draw_frontier(frontier, pages / "frontier.png")
    if study:
        draw_study(study, AIMS, pages / "study.png")
    if packing:
        draw_packing(packing, pages / "packing.png")
    for name in SERVING_PAGES:
        if served := read_result(name, results):
            draw_serving(served, pages / f"{name}.png")
    for name, text in texts.items():
        (pages / name).write_text(text, encoding="utf-8")
    return [pages / name for name in texts]


def page_texts(results: Path = RESULTS) -> dict[str, str]:
    """Return file name -> Markdown of every page, without drawing anything."""
    study = _read_study(results)
    frontier, levers, packing = (read_result(name, results) for name in ("frontier", "levers", "packing"))
    cluster = {part: found for part in PARTS if (found := read_result(f"cluster-{part}", results)) is not None}
    pages = {
        "cluster.md": cluster_page(cluster) if cluster else None,
        "study.md": _study_page(study) if study else None,
        "frontier.md": _frontier_page(frontier) if frontier else None,
        "levers.md": _levers_page(levers) if levers else None,
        "packing.md": _packing_page(packing) if packing else None,
        **{
            page: serving_page(served, f"{name}.png") if (served := read_result(name, results)) else None
            for name, page in SERVING_PAGES.items()
        },
    }
    found = {name: text for name, text in pages.items() if text is not None}
    return {"README.md": _index(found), **found}


def _read_study(results: Path) -> dict[str, dict[str, Any]]:
    return {part: found for part in STUDY_PARTS if (found := read_result(f"study-{part}", results)) is not None}


def _index(pages: Mapping[str, str]) -> str:
    rows = [f"- [{text.splitlines()[0].removeprefix('# ')}]({name})" for name, text in pages.items()]
    return "\n".join(
        [
            "# Benchmarks",
            "",
            "Every page here is made by `python -m jobs.benchmark report` from the result files in",
            "`jobs/benchmark/results`, which record the commit, the versions and the machine. Timings are ratios",
            "measured turn by turn in one process. To measure again: `python -m jobs.benchmark levers` (or `packing`,",
            "`serving`, `cluster`, `frontier`, `study`), then `report`.",
            "",
            *rows,
            "",
        ]
    )


def _study_page(study: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["# CAT against plain LoRA on held-out concepts", ""]
    first = next(iter(study.values()))
    settings = first["training"]
    shown = ("steps", "rank", "targets", "learning_rate", "rows_per_concept", "prior_prompt", "cat_fraction", "teacher")
    lines += [
        "No setting was chosen by these concepts ([the frontier](frontier.md) uses others). `cat` is the default of",
        f"the job spec (alpha {first['default_alpha']:g}; {', '.join(f'{name} {settings[name]}' for name in shown)});",
        "`lora` is the same without the CAT term, on equal draws; `paper` has token_removed, alpha 1, all rows.",
        "Intervals: paired bootstrap over concepts, then training seeds, then image seeds.",
        "",
        "![Ratios of CAT to plain LoRA with their intervals, and the figures to reach](study.png)",
    ]
    for part, result in study.items():
        lines += ["", f"## {part}", "", _part_facts(result), ""]
        for judge in judges_of(result["judges"]):
            lines += [f"Judge `{judge}`:", "", *_score_table(result, judge), ""]
        lines += _verdicts(part, result)
        lines += ["", measured_on(result)]
    return "\n".join([*lines, ""])


def _part_facts(result: Mapping[str, Any]) -> str:
    subjects = result["subjects"]
    named = "; ".join(
        name if len(concepts) == 1 else f"{name} ({', '.join(concepts)})" for name, concepts in subjects.items()
    )
    runs = ", ".join(
        f"{name} {trial['subjects']} on {len(trial['seeds'])} training seed{'s' * (len(trial['seeds']) > 1)}"
        for name, trial in result["trials"].items()
    )
    pairs = 6 * int(result["evaluation"]["images_per_prompt"])
    return (
        f"Adapters: {named}. Trained: {runs}; {result['training']['rows_per_concept']} rows per concept and step. "
        f"{pairs} image pairs per concept and seed."
    )


def _score_table(result: Mapping[str, Any], judge: str) -> list[str]:
    scores = result["judges"][judge]
    metrics = [metric for metric in _SHOWN if metric in next(iter(scores.values()))]
    recognition = result["judges"]["recognition"]
    heads = [*(metric.replace("_", " ") for metric in metrics), "recognised with / without token"]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for trial, score in scores.items():
        cells = [f"{score[metric]['estimate']:.3f} {_ends(score[metric]['interval'])}" for metric in metrics]
        share = recognition.get(trial)
        cells.append("-" if share is None else f"{share['rate']:.0%} / {share['rate_without_token']:.0%}")
        lines.append(f"| {trial} | {' | '.join(cells)} |")
    return lines


def _ends(interval: Sequence[float | None]) -> str:
    low, high = ("\N{INFINITY}" if end is None else f"{end:.3f}" for end in interval)
    return f"({low} to {high})"


def _verdicts(part: str, result: Mapping[str, Any]) -> list[str]:
    lines = ["| CAT / plain LoRA (diversity: CAT / base) | aim | " + " | ".join(judges_of(result["judges"])) + " |"]
    lines.append("|---" * (2 + len(judges_of(result["judges"]))) + "|")
    for metric, aim in AIMS[part]:
        cells = []
        for judge in judges_of(result["judges"]):
            found = measured_for_aim(result["judges"][judge]["cat"], metric)
            cells.append("-" if found is None else _judged(found, aim, lower=metric == "base_drift"))
        sign = "\N{LESS-THAN OR EQUAL TO}" if metric == "base_drift" else "\N{GREATER-THAN OR EQUAL TO}"
        lines.append(f"| {metric.replace('_', ' ')} | {sign} {aim:g}x | {' | '.join(cells)} |")
    for judge in judges_of(result["judges"]):
        difference = result["judges"][judge]["cat"].get("prompt_similarity", {}).get("difference")
        if difference is not None:
            estimate, low, high = difference
            verdict = "not lower" if high >= 0 else "**lower**"
            lines.append(f"\nPrompt similarity, `{judge}`: {estimate:+.3f} ({low:+.3f} to {high:+.3f}), {verdict}.")
    followed = {trial: shares for trial, shares in result["judges"]["prompts_followed"].items() if shares}
    if followed:
        shares = "; ".join(
            f"{trial} {', '.join(f'{share:.0%} ({judge})' for judge, share in own.items())}"
            for trial, own in followed.items()
        )
        lines.append(
            "\nImages with the token that are nearer to their own prompt than to the other evaluation prompts, where "
            f"the concept itself cancels: {shares}."
        )
    return lines


def _judged(ratio: Sequence[float | None], aim: float, *, lower: bool) -> str:
    estimate = ratio[0]
    assert estimate is not None
    reached = estimate <= aim if lower else estimate >= aim
    text = f"{estimate:.2f}x {_ends(ratio[1:])}"
    return text if reached else f"**missed** {text}"


def _frontier_page(result: Mapping[str, Any]) -> str:
    lines = [
        "# The frontier: what holding the base costs",
        "",
        "One training seed; each group varies one thing around the common setting: "
        + ", ".join(f"{key} {value}" for key, value in result["setting"].items())
        + ". Differences of 0.02 are noise.",
        "",
        "![Identity gain against base drift of every trial](frontier.png)",
    ]
    for name, group in result["groups"].items():
        pairs = 6 * int(result["evaluation"]["images_per_prompt"]) * len(group["concepts"])
        lines += [
            "",
            f"## {name.replace('_', ' ')}",
            "",
            f"{', '.join(group['concepts'])}; {pairs} image pairs a trial.",
            "",
        ]
        for judge in judges_of(group["judges"]):
            lines += [f"Judge `{judge}`:", "", *_score_table(group, judge), ""]
        changes = {trial: {k: v for k, v in own.items() if k != "method"} for trial, own in group["trials"].items()}
        lines += [
            f"- `{trial}`: {', '.join(f'{k} {v}' for k, v in change.items())}"
            for trial, change in changes.items()
            if trial != "lora"
        ]
    return "\n".join([*lines, "", measured_on(result), ""])


def _levers_page(result: Mapping[str, Any]) -> str:
    packs = result["adapters"]
    lines = [
        "# What each lever does to the time of a step",
        "",
        f"Pocket-SD, attention and feed-forward layers, rank 8, {result['rows_per_concept']} rows per concept. The",
        "ratio is to a plain LoRA step of as many adapters at equal identity rows, in the same turn.",
        "",
        "| | " + " | ".join(f"{k} adapter{'s' * (k != '1')}, ms | to LoRA" for k in packs) + " |",
        "|---" * (1 + 2 * len(packs)) + "|",
    ]
    for name in next(iter(packs.values())):
        cells = [f"{pack[name]['step_ms']:.0f} | {pack[name]['to_lora']:.2f}x" for pack in packs.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    layers = result["layers"]
    lines += [
        "",
        f"- Filling a pool of {result['pool_entries']} entries takes {result['pool_fill_ms']:.0f} ms, once.",
        f"- The bank: a forward of 16 rows of 8 adapters takes {layers['forward_to_bare']:.2f}x the bare U-Net's; a",
        f"  LoRA step of one adapter takes {layers['training_step_to_peft']:.2f}x that of PEFT with torch's AdamW.",
        "",
        measured_on(result),
        "",
    ]
    return "\n".join(lines)


def _packing_page(result: Mapping[str, Any]) -> str:
    lines = [
        "# Packing: many adapters in one forward",
        "",
        f"{result['adapters']} adapters, {result['training_steps']} steps each, one process. `reference` is a plain",
        "loop of PEFT and diffusers with the three forwards of CAT (`jobs/benchmark/training/peft_loop.py`);",
        "`packed` and `sequential` compute the same loss here; `levers` are a pool of 16 and half the rows, with its",
        "fill counted.",
        "",
        "![Concepts per hour, and memory per concept](packing.png)",
        "",
    ]
    ways = list(next(iter(result["rows"].values()))["speed_up"])
    lines += ["| rows per concept | " + " | ".join(ways) + " |", "|---" * (1 + len(ways)) + "|"]
    lines += [
        "| " + " | ".join([rows, *(f"{entry['speed_up'][way]:.2f}x" for way in ways)]) + " |"
        for rows, entry in result["rows"].items()
    ]
    lines += ["", "| adapters in the pack | peak MiB | per concept |", "|---|---|---|"]
    lines += [
        f"| {k} | {entry['peak_mib']:.0f} | {entry['per_concept_mib']:.0f} |" for k, entry in result["memory"].items()
    ]
    return "\n".join([*lines, "", measured_on(result), ""])
