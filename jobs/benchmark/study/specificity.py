"""Token specificity: how many decoy rows it takes until an adapter answers to its own token alone.

The shares are compared on concepts that the study does not use, so that a share chosen here is not judged on what it
was chosen by.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from cat_cluster.evaluation.prompts import DECOYS, POCKET_TEMPLATES
from cat_cluster.files import write_whole
from cat_cluster.models.base_model import load_base_model
from jobs.benchmark.record import Start, training_digest, write_result
from jobs.benchmark.study.trials import Trial, TrialRunner, pocket_subject
from jobs.benchmark.study.triggers import BASE, FIRST_SEED, GUIDANCE, STEPS, TRIGGERS, Arrangement, Bench, Carried

SHARES = (0.0, 0.25, 0.5, 0.75)
TOKENS = {
    "striped-cup": "sks",
    "clown-fish": "zwx",
    "checked-house": "ohwx",
    "banded-car": "qrv",
    "blossom-tree": "vtk",
    "banded-star": "hnf",
}


def run(
    start: Start,
    folder: Path,
    console: Console,
    *,
    steps: int,
    concepts: int,
    images: int,
    shares: Sequence[float] = SHARES,
) -> Path:
    """Train `concepts` adapters (an even number) for `steps` steps at each share of decoys; measure each and a stack.

    images: per prompt and trigger. A share that was measured before is read back from `folder`. Raises
    CatClusterError when an adapter fails.
    """
    subjects = [pocket_subject(name, token) for name, token in list(TOKENS.items())[:concepts]]
    taught = [subject.concepts[0] for subject in subjects]
    runner = TrialRunner(start, folder, {"steps": steps}, {"enabled": False}, max_pack=concepts)
    setting = [[asdict(one) for one in taught], steps, images, TRIGGERS, DECOYS, STEPS, GUIDANCE, FIRST_SEED]
    place = folder / training_digest(setting) / "scores"
    bench = Bench(load_base_model("pocket"), taught, images)
    together = tuple(one.name for one in taught)
    plan = {
        "alone": carrying({name: (name,) for name in together}),
        "stack": carrying(dict.fromkeys(together, together)),
    }
    measured: dict[str, Any] = {}
    for share in (None, *shares):
        name = "base" if share is None else f"{share:g}"
        path = place / f"{name}.json"
        if not path.exists():
            if share is None:
                found = bench.measure({}, {"base": carrying({one.name: BASE for one in taught})})
            else:
                trial = Trial(f"decoys-{share * 100:g}".replace(".", "-"), training={"decoy_fraction": share})
                found = bench.measure(runner.weights(trial, subjects, 0, bench.base, console), plan)
            write_whole(path, json.dumps({"start": asdict(start), **found}).encode())
            console.print(f"measured {name}")
        measured[name] = json.loads(path.read_text(encoding="utf-8"))
    result = {
        "training": {"steps": steps},
        "images": images * len(POCKET_TEMPLATES),
        "concepts": {one.name: one.token for one in taught},
        "decoys": list(DECOYS),
        "base": measured.pop("base"),
        "shares": measured,
    }
    return write_result("specificity", result, start)


def carrying(carried: Mapping[str, Carried]) -> Arrangement:
    """Return the arrangement in which all images of a concept carry the same adapters, whatever their trigger."""
    return {(name, trigger): names for name, names in carried.items() for trigger in TRIGGERS}


def means(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the scores of concepts as their mean over them, in the form that one concept's have."""

    def mean(values: Sequence[Any]) -> Any:
        if isinstance(values[0], Mapping):
            return {key: mean([value[key] for value in values]) for key in values[0]}
        return None if values[0] is None else float(np.mean(values))

    averaged: dict[str, Any] = mean(list(scores.values()))
    return averaged
