"""The report of an evaluation: one HTML file that works offline, a picture grid as PNG, and JSON."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from cat_cluster.errors import EvaluationError
from cat_cluster.evaluation.curves import draw_curves, method_colour
from cat_cluster.evaluation.grid import Grid, concept_grid, draw_grids, png_of, thumbnail_png
from cat_cluster.evaluation.intervals import METRICS, paired_difference_interval, paired_ratio_interval
from cat_cluster.evaluation.recognition import Recognition
from cat_cluster.evaluation.results import Evaluation, JudgeScores
from cat_cluster.files import write_whole

GRID_ROWS = 4  # of each concept in the PNG
OPEN_ROWS = 6  # of each concept at once in the HTML; the others unfold
STACKS_TITLE = "Adapters that were trained one by one, and their sum"

METHOD_LABELS = {"lora": "LoRA", "cat": "CAT"}
# metric: title, better direction (+1 higher, -1 lower, 0 nearer to 1), what it says
_METRIC_TEXTS: Mapping[str, tuple[str, int, str]] = {
    "kps": (
        "Knowledge preservation (KPS)",
        1,
        "How different the same-seed images with and without the token are: the token alone brings the concept.",
    ),
    "kps_all_pairs": ("KPS, all pairs", 1, "The same over all pairs of images instead of same-seed pairs."),
    "identity_similarity": ("Identity similarity", 1, "How much images with the token look like the photos."),
    "identity_gain": ("Identity gain", 1, "What training added to that similarity; the untrained base is 0."),
    "prompt_similarity": ("Prompt similarity", 1, "How well images with the token follow the rest of the prompt."),
    "base_drift": ("Base drift", -1, "How far images without the token moved away from the base model's."),
    "fisher_drift": ("Fisher drift", -1, "How far noise predictions without the token left the base model's."),
    "diversity_ratio": ("Diversity ratio", 0, "Variety of images without the token, relative to the base model's."),
}
_TILES = ("kps", "base_drift", "identity_similarity", "identity_gain")


@dataclass(frozen=True, eq=False)
class MethodResult:
    """One evaluated adapter: the method that trained it, its evaluation, its loss history and training facts."""

    method: str
    evaluation: Evaluation
    history: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What the report calls it."""
        return METHOD_LABELS.get(self.method, self.method)


@dataclass(frozen=True, eq=False)
class ServedPicture:
    """A picture that the service drew: who drew it, its prompt and PNG, the revision, and its drift state."""

    label: str
    prompt: str
    png: bytes
    model: str
    drift: str


@dataclass(frozen=True, eq=False)
class Served:
    """Pictures that the service drew of several adapters at once; most adapters and rows that shared a U-Net call."""

    pictures: tuple[ServedPicture, ...]
    adapters_in_call: int
    rows_in_call: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Everything but the pictures themselves."""
        pictures = [{"model": p.model, "prompt": p.prompt, "drift": p.drift} for p in self.pictures]
        return {
            "pictures": pictures,
            "adapters_in_call": self.adapters_in_call,
            "rows_in_call": self.rows_in_call,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, eq=False)
class Stacks:
    """Stacks beside their adapters alone, drawn by the service; label -> the adapters that were summed."""

    grid: Grid
    adapters: Mapping[str, Sequence[str]]

    def to_json(self) -> dict[str, Any]:
        """Everything but the pictures themselves."""
        return {
            "adapters": {label: list(names) for label, names in self.adapters.items()},
            "prompts": list(self.grid.prompts),
            "seeds": list(self.grid.seeds),
        }


@dataclass(frozen=True, eq=False)
class ReportInput:
    """What a report shows; the last method is compared with the first, on the same prompts and seeds."""

    title: str
    base_name: str
    methods: tuple[MethodResult, ...]
    facts: Mapping[str, str] = field(default_factory=dict)
    served: Served | None = None
    stacks: Stacks | None = None


@dataclass(frozen=True)
class ReportFiles:
    """Where the files of a report lie; stacks only where it shows some."""

    html: Path
    png: Path
    json: Path
    stacks: Path | None = None


def write_report(out: Path, report: ReportInput) -> ReportFiles:
    """Write report.html, report.png, report.json and stacks.png into `out`; each appears whole or not at all."""
    if not report.methods:
        raise EvaluationError("a report needs at least one evaluated adapter")
    out.mkdir(parents=True, exist_ok=True)
    stacks = None if report.stacks is None else out / "stacks.png"
    files = ReportFiles(out / "report.html", out / "report.png", out / "report.json", stacks)
    grids = _grids(report)
    data = report_json(report)
    write_whole(files.png, png_of(draw_grids(grids, report.title, rows=GRID_ROWS)))
    if stacks is not None and report.stacks is not None:
        grid = report.stacks.grid
        write_whole(stacks, png_of(draw_grids([grid], STACKS_TITLE, rows=len(grid.prompts))))
    write_whole(files.json, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())
    write_whole(files.html, _render(report, grids, data["comparison"]).encode())
    return files


def report_json(report: ReportInput) -> dict[str, Any]:
    """Return the report as plain data: `methods.<name>` holds each evaluation, `comparison` last against first."""
    return {
        "title": report.title,
        "base": report.base_name,
        "facts": dict(report.facts),
        "methods": {
            result.method: {
                **result.evaluation.to_json(),
                "training_history": dict(result.history),
                "facts": dict(result.facts),
            }
            for result in report.methods
        },
        "comparison": _comparison(report.methods),
        **({} if report.served is None else {"served": report.served.to_json()}),
        **({} if report.stacks is None else {"stacks": report.stacks.to_json()}),
    }


def _comparison(methods: Sequence[MethodResult]) -> dict[str, Any] | None:
    """Ratio and difference of every metric, last method against first, paired by seed; None for one method."""
    if len(methods) < 2:
        return None
    reference, candidate = methods[0], methods[-1]
    judges = zip(candidate.evaluation.judges, reference.evaluation.judges, strict=True)
    return {
        "of": candidate.method,
        "against": reference.method,
        "judges": {left.name: {metric: _compared(metric, left, right) for metric in METRICS} for left, right in judges},
    }


def _compared(metric: str, candidate: JudgeScores, reference: JudgeScores) -> dict[str, Any]:
    if candidate.digest != reference.digest:
        raise EvaluationError(
            f"judge {candidate.name} differs between the methods: scores compare only under one judge"
        )
    ratio = paired_ratio_interval(metric, candidate.resampled, reference.resampled)
    difference = paired_difference_interval(metric, candidate.resampled, reference.resampled)
    return {
        name: None if found is None else {"estimate": found.estimate, "interval": found.ends()}
        for name, found in (("ratio", ratio), ("difference", difference))
    }


def _grids(report: ReportInput) -> list[Grid]:
    count = len(report.methods[0].evaluation.images)
    if any(len(result.evaluation.images) != count for result in report.methods):
        raise EvaluationError("the methods of a report must teach the same concepts")
    return [
        concept_grid([(result.label, result.evaluation.images[k]) for result in report.methods]) for k in range(count)
    ]


def _render(report: ReportInput, grids: Sequence[Grid], comparison: Mapping[str, Any] | None) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cat_cluster.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["png"] = _data_url
    concepts = [(images.token, images.class_noun) for images in report.methods[0].evaluation.images]
    judges = [_judge_view(report, index, comparison) for index in range(len(report.methods[0].evaluation.judges))]
    return environment.get_template("report.html.j2").render(
        report=report,
        colours=[method_colour(result.label) for result in report.methods],
        tiles=[row for row in judges[0]["rows"] if row["metric"] in _TILES],
        judges=judges,
        grids=[
            {"token": token, "class_noun": noun, **_grid_view(grid)}
            for (token, noun), grid in zip(concepts, grids, strict=True)
        ],
        stacks=None if report.stacks is None else _grid_view(report.stacks.grid),
        open_rows=OPEN_ROWS,
        curves=[(token, noun, curve) for token, noun in concepts if (curve := _curve(token, report)) is not None],
        recognition=[_recognition_view(token, report) for token, _ in concepts],
        spec=report.methods[0].evaluation.spec,
        same_spec=len({result.evaluation.spec for result in report.methods}) == 1,
    )


def _judge_view(report: ReportInput, index: int, comparison: Mapping[str, Any] | None) -> dict[str, Any]:
    scores = [result.evaluation.judges[index] for result in report.methods]
    name = scores[0].name
    compared = comparison["judges"][name] if comparison else {}
    return {
        "name": name,
        "digest": scores[0].digest,
        "rows": [
            _metric_row(metric, scores, compared.get(metric, {}))
            for metric in METRICS
            if scores[0].metrics[metric] is not None
        ],
        "leaks": [
            {
                "label": result.label,
                "triggers": judged.leaks.triggers,
                "rows": [
                    (token, [(float(value), _heat(float(value))) for value in row])
                    for token, row in zip(judged.leaks.tokens, judged.leaks.values, strict=True)
                ],
            }
            for result, judged in zip(report.methods, scores, strict=True)
        ],
    }


def _metric_row(metric: str, scores: Sequence[JudgeScores], compared: Mapping[str, Any]) -> dict[str, Any]:
    title, direction, text = _METRIC_TEXTS[metric]
    found = [judged.intervals[metric] for judged in scores]
    merits = [abs(value.estimate - 1.0) * -1.0 if direction == 0 else direction * value.estimate for value in found]
    best = merits.index(max(merits)) if len(found) > 1 and max(merits) > min(merits) else None
    return {
        "metric": metric,
        "title": title,
        "direction": direction,
        "text": text,
        "values": [(value.estimate, *value.ends()) for value in found],
        "best": best,
        "ratio": compared.get("ratio"),
    }


def _grid_view(grid: Grid) -> dict[str, Any]:
    blocks: dict[str, int] = {}
    for column in grid.columns:
        blocks[column.block] = blocks.get(column.block, 0) + 1
    rows = [
        {
            "prompt": prompt,
            "seed": seed,
            "cells": [
                (column, None if (picture := column.pictures[i]) is None else thumbnail_png(picture))
                for column in grid.columns
            ],
        }
        for i, (prompt, seed) in enumerate(zip(grid.prompts, grid.seeds, strict=True))
    ]
    return {"grid": grid, "blocks": list(blocks.items()), "rows": rows}


def _curve(token: str, report: ReportInput) -> bytes | None:
    return draw_curves(token, [(result.label, result.history) for result in report.methods])


def _recognition_view(token: str, report: ReportInput) -> dict[str, Any]:
    found = [(result.label, result.evaluation.recognition[token]) for result in report.methods]
    known = [(label, value) for label, value in found if isinstance(value, Recognition)]
    return {"token": token, "known": known, "reason": None if known else found[0][1]}


def _heat(value: float) -> str:
    """A CSS colour: warm where a trigger brings the concept, cool where it drives it away; 0.15 is full strength."""
    strength = min(1.0, abs(value) / 0.15) * 0.75
    return f"rgba({'217, 119, 6' if value > 0 else '47, 111, 176'}, {strength:.3f})"


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "\N{INFINITY}"
    if value != 0 and abs(value) < 0.0095:
        return f"{value:.1e}" if abs(value) < 5e-5 else f"{value:.4f}"
    return f"{value:.3f}"


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
