"""The pictures of docs/benchmarks: the frontier, the study's ratios, and what packing gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jobs.benchmark.study.compare import judges_of

_INK, _QUIET, _PAPER = "#20262d", "#66707a", "#ffffff"
_LORA, _CAT, _MET, _MISSED = "#d97706", "#0f8b7e", "#0f8b7e", "#c2413b"
_SERIES = ("#0f8b7e", "#2f6fb0", "#7c5cd6", "#b0457b", "#6b7f1d", "#8a5a2b", "#3d8fa8", "#555f6a")


def draw_frontier(result: Mapping[str, Any], path: Path) -> None:
    """Identity gain against base drift: a panel per group of trials and judge, plain LoRA in each of them."""
    groups = result["groups"]
    judges = judges_of(next(iter(groups.values()))["judges"])
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(4.1 * columns, 3.3 * rows * len(judges)), dpi=110, layout="constrained", facecolor=_PAPER)
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows * len(judges), columns, squeeze=False, sharex=True)
    for number, judge in enumerate(judges):
        for place in range(rows * columns):
            axes = panels[number * rows + place // columns][place % columns]
            if place >= len(groups):
                axes.set_visible(False)
                continue
            name = list(groups)[place]
            _frontier_panel(axes, groups[name]["judges"][judge], groups[name]["trials"])
            _style(axes, f"{name.replace('_', ' ')} ({judge})", "base drift (log)", "identity gain")
    figure.savefig(path)


def _frontier_panel(axes: Any, scores: Mapping[str, Any], trials: Mapping[str, Mapping[str, Any]]) -> None:
    for colour, name in zip((_LORA, *_SERIES), trials, strict=False):
        drift, gain = scores[name]["base_drift"], scores[name]["identity_gain"]
        axes.plot(drift["interval"], [gain["estimate"]] * 2, color=colour, linewidth=0.9, alpha=0.3)
        axes.plot([drift["estimate"]] * 2, gain["interval"], color=colour, linewidth=0.9, alpha=0.3)
        axes.plot(drift["estimate"], gain["estimate"], "o", color=colour, markersize=5, label=_short(trials[name]))
    axes.legend(frameon=False, fontsize=7.5, labelcolor=_INK, loc="lower left", handletextpad=0.2)
    axes.set_xscale("log")
    axes.set_xlim(0.003, 0.7)
    axes.set_ylim(0.0, 1.35 * max(scores[name]["identity_gain"]["estimate"] for name in scores))
    ticks = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def draw_study(
    results: Mapping[str, Mapping[str, Any]], targets: Mapping[str, Sequence[tuple[str, float]]], path: Path
) -> None:
    """CAT over plain LoRA with 95% intervals and the figure each ratio should reach; a panel per part of the study."""
    figure = Figure(figsize=(6.4 * len(results), 4.6), dpi=130, layout="constrained", facecolor=_PAPER)
    FigureCanvasAgg(figure)
    for axes, (part, result) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        judges = judges_of(result["judges"])
        rows = [(metric, goal, judge) for metric, goal in targets[part] for judge in judges]
        for place, (metric, goal, judge) in enumerate(reversed(rows)):
            ratio = measured_for_aim(result["judges"][judge]["cat"], metric)
            if ratio is None:
                continue
            estimate, low, high = (1e3 if value is None else max(value, 1e-3) for value in ratio)
            met = estimate <= goal if metric == "base_drift" else estimate >= goal
            axes.plot([low, high], [place, place], color=_MET if met else _MISSED, linewidth=2.4, alpha=0.5)
            axes.plot(estimate, place, "o", color=_MET if met else _MISSED, markersize=7)
            axes.plot(goal, place, "|", color=_INK, markersize=16, markeredgewidth=1.6)
        axes.axvline(1.0, color=_QUIET, linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_yticks(
            range(len(rows)), [f"{metric.replace('_', ' ')}, {judge}" for metric, _, judge in reversed(rows)]
        )
        _style(axes, part, "CAT / plain LoRA (log); the bar is the figure to reach", "")
    figure.savefig(path)


def measured_for_aim(scores: Mapping[str, Any], metric: str) -> list[float | None] | None:
    """Return what an aim is held against, [estimate, low, high]: the ratio to plain LoRA.

    diversity_ratio is a ratio itself, to the base, and stands for its own. None where a judge cannot tell.
    """
    if metric not in scores:
        return None
    score = scores[metric]
    found: list[float | None] | None = score["ratio"]
    return [score["estimate"], *score["interval"]] if metric == "diversity_ratio" else found


def draw_packing(result: Mapping[str, Any], path: Path) -> None:
    """Concepts per hour of each way at 1, 2 and 4 rows, and peak memory per concept over the size of the pack."""
    figure = Figure(figsize=(12.4, 4.4), dpi=130, layout="constrained", facecolor=_PAPER)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    ways = list(next(iter(result["rows"].values()))["concepts_per_hour"])
    colours = ("#9aa3ab", "#d9a441", _CAT, "#c58b2a", "#0b5f56")
    width = 0.8 / len(ways)
    for i, way in enumerate(ways):
        places = [n + (i - (len(ways) - 1) / 2) * width for n in range(len(result["rows"]))]
        values = [entry["concepts_per_hour"][way] for entry in result["rows"].values()]
        left.bar(places, values, width * 0.92, color=colours[i % len(colours)], label=way)
    left.set_xticks(range(len(result["rows"])), list(result["rows"]))
    left.legend(frameon=False, fontsize=8, labelcolor=_INK)
    _style(left, "Throughput", "rows per concept and step", "concepts / hour")
    sizes = [int(k) for k in result["memory"]]
    right.plot(
        sizes, [entry["per_concept_mib"] for entry in result["memory"].values()], "o-", color=_CAT, label="per concept"
    )
    right.plot(
        sizes, [entry["peak_mib"] for entry in result["memory"].values()], "o--", color=_LORA, label="the process"
    )
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xticks(sizes, [str(size) for size in sizes])
    right.legend(frameon=False, fontsize=8, labelcolor=_INK)
    _style(right, "Peak memory", "adapters in the pack", "MiB (log)")
    figure.savefig(path)


def _short(trial: Mapping[str, Any]) -> str:
    own = {key: value for key, value in trial.items() if key not in ("method", "alpha")}
    if trial["method"] == "lora":
        return " ".join(["LoRA", *(f"{key} {value}" for key, value in own.items())])
    text = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in own.items())
    return text or f"\N{GREEK SMALL LETTER ALPHA} {trial['alpha']:g}"


def _style(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_INK, fontweight="bold")
    axes.set_xlabel(x, color=_QUIET, fontsize=9)
    axes.set_ylabel(y, color=_QUIET, fontsize=9)
    axes.tick_params(colors=_QUIET, labelsize=8)
    axes.grid(color=_QUIET, alpha=0.15, linewidth=0.7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
