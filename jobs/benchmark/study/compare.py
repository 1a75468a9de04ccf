"""Comparisons of trials: every metric with its interval, and its paired ratio to plain LoRA on the same runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cat_cluster.evaluation.intervals import (
    METRICS,
    ConceptFeatures,
    Interval,
    Resampled,
    paired_difference_interval,
    paired_ratio_interval,
    resample,
)
from cat_cluster.evaluation.metrics import Array
from jobs.benchmark.study.trials import Measured, Subject

Cells = Mapping[tuple[str, str, int], Measured]
Run = tuple[Subject, int]


def compare(
    cells: Cells, trials: Sequence[str], subjects: Sequence[Subject], seeds: Sequence[int], against: str
) -> Any:
    """Return {judge: {trial: {metric: {estimate, interval, ratio, difference}}}} and tables beside the judges.

    ratio and difference are to the trial `against`, paired over concepts, training seeds and image seeds. A trial that
    was run on fewer subjects or seeds is compared on those.
    """
    runs = {
        trial: tuple((s, seed) for s in subjects for seed in seeds if (trial, s.name, seed) in cells)
        for trial in trials
    }
    found: dict[str, Any] = {}
    for judge in next(iter(cells.values())).judges:
        # Each trial beside the other on the same runs; what was drawn once is not drawn again.
        keys = {(name, own) for trial, own in runs.items() for name in (trial, against)}
        drawn = {key: resample(_runs(cells, key[0], key[1], judge)) for key in keys}
        found[judge] = {trial: _metrics(drawn[trial, own], drawn[against, own]) for trial, own in runs.items()}
    found["recognition"] = {trial: _recognition(cells, trial, own) for trial, own in runs.items()}
    found["prompts_followed"] = {trial: _prompts_followed(cells, trial, own) for trial, own in runs.items()}
    return found


def leak_means(leaks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return {judge: {trial: {own, other, decoy, none}}}: the means of leak matrices by what was put before the noun.

    leaks: `trial/subject` -> judge -> {tokens, triggers, values}, as LeakMatrix.to_json gives them. The words are the
    concept's own token, the other tokens of its adapter (None in an adapter of one concept), a decoy, and no word.
    """
    cells: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name, judges in leaks.items():
        trial = name.partition("/")[0]
        for judge, matrix in judges.items():
            kinds = cells.setdefault(judge, {}).setdefault(trial, {"own": [], "other": [], "decoy": [], "none": []})
            for token, row in zip(matrix["tokens"], matrix["values"], strict=True):
                for trigger, value in zip(matrix["triggers"], row, strict=True):
                    kinds["own" if trigger == token else _kind(trigger, matrix["tokens"])].append(value)
    return {
        judge: {
            trial: {kind: float(np.mean(values)) if values else None for kind, values in kinds.items()}
            for trial, kinds in trials.items()
        }
        for judge, trials in cells.items()
    }


def _kind(trigger: str, tokens: Sequence[str]) -> str:
    if trigger in tokens:
        return "other"
    return "none" if trigger == "none" else "decoy"


def judges_of(table: Mapping[str, Any]) -> list[str]:
    """Return the judges of a comparison, without the tables that stand beside them."""
    return [name for name in table if name not in ("recognition", "prompts_followed")]


def prompts_followed(concept: ConceptFeatures) -> float | None:
    """Return share_followed of the images with the token; None for a judge that cannot read."""
    return None if concept.text_NF is None else share_followed(concept.with_NF, concept.text_NF)


def share_followed(images_NF: Array, texts_NF: Array) -> float:
    """Return the share of images that are nearer to their own prompt than to any other of the set.

    Prompt similarity falls when the concept is unlike its class noun, whatever else the image shows; that offset is the
    same for every prompt and cancels here.
    """
    similar = images_NF @ texts_NF.T
    own = np.diagonal(similar)
    return float((own >= similar.max(axis=1) - 1e-9).mean())


def _runs(cells: Cells, trial: str, runs: Sequence[Run], judge: str) -> list[ConceptFeatures]:
    """One entry per concept and training seed, named by the concept: runs of one concept are drawn together."""
    return [
        replace(cells[trial, subject.name, seed].judges[judge][concept.token], token=f"{subject.name}/{concept.name}")
        for subject, seed in runs
        for concept in subject.concepts
    ]


def _metrics(own: Resampled, other: Resampled) -> dict[str, Any]:
    table = {}
    for metric in METRICS:
        interval = own.interval(metric)
        if interval is not None:
            table[metric] = {
                "estimate": interval.estimate,
                "interval": interval.ends(),
                "ratio": _json(paired_ratio_interval(metric, own, other)),
                "difference": _json(paired_difference_interval(metric, own, other)),
            }
    return table


def _json(interval: Interval | None) -> list[float | None] | None:
    return None if interval is None else [interval.estimate, *interval.ends()]


def _prompts_followed(cells: Cells, trial: str, runs: Sequence[Run]) -> dict[str, float]:
    """Mean share over concepts and seeds, for each judge that can read."""
    found: dict[str, list[float]] = {}
    for subject, seed in runs:
        for judge, concepts in cells[trial, subject.name, seed].judges.items():
            shares = [prompts_followed(concept) for concept in concepts.values()]
            found.setdefault(judge, []).extend(share for share in shares if share is not None)
    return {judge: float(np.mean(shares)) for judge, shares in found.items() if shares}


def _recognition(cells: Cells, trial: str, runs: Sequence[Run]) -> dict[str, Any] | None:
    """Mean shares over concepts and seeds; None where no concept is of the pocket world."""
    found = [one for subject, seed in runs for one in cells[trial, subject.name, seed].recognition.values()]
    if not found:
        return None
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}
