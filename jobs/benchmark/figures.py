"""The pictures of docs/benchmarks: the frontier, the study's ratios, what packing gives, and serving."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from jobs.benchmark.study.aims import Aim
from jobs.benchmark.study.compare import judges_of

_DIGEST = "Inputs"  # the key in a PNG's text
_INK, _QUIET, _PAPER = "#20262d", "#66707a", "#ffffff"
_LORA, _CAT, _REACHED, _MISSED = "#d97706", "#0f8b7e", "#0f8b7e", "#c2413b"
_SERIES = ("#0f8b7e", "#2f6fb0", "#7c5cd6", "#b0457b", "#6b7f1d", "#8a5a2b", "#3d8fa8", "#555f6a")


def digest_of(sources: Sequence[Path]) -> str:
    """Return the digest of result files that a picture of them carries."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def digest_in(picture: Path) -> str | None:
    """Return the digest of the result files that a PNG shows, or None for one that carries none or is missing."""
    if not picture.is_file():
        return None
    with Image.open(picture) as image:
        found: str | None = image.info.get(_DIGEST)
        return found


def draw_frontier(result: Mapping[str, Any], path: Path, digest: str) -> None:
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
    figure.savefig(path, metadata={_DIGEST: digest})


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
    results: Mapping[str, Mapping[str, Any]], aims: Mapping[str, Sequence[Aim]], path: Path, digest: str
) -> None:
    """CAT over plain LoRA with 95% intervals and the aim of each ratio; a panel per part of the study."""
    figure = Figure(figsize=(6.4 * len(results), 4.6), dpi=130, layout="constrained", facecolor=_PAPER)
    FigureCanvasAgg(figure)
    for axes, (part, result) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        judges = judges_of(result["judges"])
        rows = [(aim, judge) for aim in aims[part] for judge in judges]
        for place, (aim, judge) in enumerate(reversed(rows)):
            ratio = aim.measured(result["judges"][judge]["cat"])
            if ratio is None:
                continue
            estimate, low, high = (1e3 if value is None else max(value, 1e-3) for value in ratio)
            colour = _REACHED if aim.reached_by(estimate) else _MISSED
            axes.plot([low, high], [place, place], color=colour, linewidth=2.4, alpha=0.5)
            axes.plot(estimate, place, "o", color=colour, markersize=7)
            axes.plot(aim.ratio, place, "|", color=_INK, markersize=16, markeredgewidth=1.6)
        axes.axvline(1.0, color=_QUIET, linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_yticks(range(len(rows)), [f"{aim.metric.replace('_', ' ')}, {judge}" for aim, judge in reversed(rows)])
        _style(axes, part, "CAT / plain LoRA (log); the bar is the aim", "")
    figure.savefig(path, metadata={_DIGEST: digest})


def draw_packing(result: Mapping[str, Any], path: Path, digest: str) -> None:
    """Concepts per hour at 1, 2 and 4 rows, and peak memory per concept over the size of the pack."""
    figure = Figure(figsize=(12.4, 4.4), dpi=130, layout="constrained", facecolor=_PAPER)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    methods = list(next(iter(result["rows"].values()))["concepts_per_hour"])
    colours = ("#9aa3ab", "#d9a441", _CAT, "#c58b2a", "#0b5f56")
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        places = [n + (i - (len(methods) - 1) / 2) * width for n in range(len(result["rows"]))]
        values = [entry["concepts_per_hour"][method] for entry in result["rows"].values()]
        left.bar(places, values, width * 0.92, color=colours[i % len(colours)], label=method)
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
    figure.savefig(path, metadata={_DIGEST: digest})


def draw_serving(result: Mapping[str, Any], path: Path, digest: str) -> None:
    """Throughput beside the engine's, which is 1; p95 latency over the arrival rate, both in shares of capacity."""
    parts = result["parts"]
    figure = Figure(figsize=(12.4, 4.4), dpi=130, layout="constrained", facecolor=_PAPER)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    bars = [("engine", 1.0, _CAT)]
    for name, colour in (("serial", _QUIET), ("peft", _LORA)):
        compared = parts.get(name, {"backends": {}})["backends"]
        bars += [
            (backend, 1.0 / found["engine_over"], colour)
            for backend, found in compared.items()
            if not backend.startswith("engine")
        ]
    for place, (name, value, colour) in enumerate(reversed(bars)):
        left.barh(place, value, color=colour, height=0.7)
        left.text(value + 0.01, place, f"{value:.2f}", va="center", fontsize=8, color=_INK)
        left.text(0.02, place, name, va="center", fontsize=8, color=_PAPER)
    left.set_yticks([])
    _style(left, "Throughput, 16 adapters", "images per second, the engine's = 1", "")
    poisson = parts.get("poisson")
    if poisson is not None:
        for colour, name in zip(
            (_CAT, _LORA, _SERIES[1]), next(iter(poisson["rates"].values()))["backends"], strict=True
        ):
            values = [found["backends"][name]["p95_s"] for found in poisson["rates"].values()]
            right.plot([float(share) for share in poisson["rates"]], values, "o-", color=colour, label=name)
        right.set_yscale("log")
        right.legend(frameon=False, fontsize=8, labelcolor=_INK)
    _style(right, "Random arrivals, 10 to 30 steps", "arrivals, as a share of the engine's capacity", "p95 latency, s")
    figure.savefig(path, metadata={_DIGEST: digest})


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
