"""The study of stacks: adapters trained one by one and summed, against joint ones of the same concepts, and the gate.

Every method is drawn with the same prompts and seeds, on concepts that no setting was chosen by. The gate carries an
adapter only where its token is in the prompt, so that one token of one adapter is that adapter alone: what tells stacks
from the gate is `both`, where two tokens stand before the noun.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from cat_cluster.data.concepts import has_token
from cat_cluster.evaluation.prompts import DECOYS, POCKET_TEMPLATES
from cat_cluster.files import write_whole
from cat_cluster.models.base_model import load_base_model
from cat_cluster.spec.choices import SamplerName
from cat_cluster.spec.sections import TrainingSpec
from jobs.benchmark.record import Start, training_digest, write_result
from jobs.benchmark.study.measure import JOINT, SEEDS
from jobs.benchmark.study.trials import SEEDS_APART, Subject, TaughtConcept, Trial, TrialRunner, pocket_subject
from jobs.benchmark.study.triggers import FIRST_SEED, GUIDANCE, TRIGGERS, Arrangement, Bench, Carried

DECOY_FRACTION = 0.5
TRIALS = (
    Trial("lora", "lora"),
    Trial("cat", training={"decoy_fraction": 0.0}),
    Trial("cat-decoys", training={"decoy_fraction": DECOY_FRACTION}),
)
# Two and two are never of one class, so that "a zwx cup" asks for nothing that was taught.
CONCEPTS = tuple(name for _, names in JOINT for name in names)
TOKENS = ("sks", "zwx", "ohwx", "qrv", "vtk", "hnf", "olbk", "pjy")
SIZES = (2, 4, 8)
JOINT_SIZES = (4, 8)
JOINT_TRAINING = {"rows_per_concept": 2}
# Ten steps of this sampler draw what twenty of DDIM do (looked at side by side), in half of the time.
STEPS = 10
SAMPLER: SamplerName = "dpmpp_2m"
ALONE, GATE = "alone", "gate"
_RESAMPLED = 2_000
_DRIFT = " base_drift"

Scores = Mapping[str, Mapping[str, Any]]  # arrangement -> concept -> scores


def run(start: Start, folder: Path, console: Console, *, images: int, seeds: Sequence[int] = SEEDS) -> Path:
    """Train and draw every method and seed, and write the result file; what was measured is kept in `folder`.

    images: per prompt and trigger. Raises CatClusterError when an adapter fails.
    """
    subjects = [pocket_subject(name, token) for name, token in zip(CONCEPTS, TOKENS, strict=True)]
    taught = [subject.concepts[0] for subject in subjects]
    runner = TrialRunner(start, folder, {}, {"enabled": False}, max_pack=len(subjects))
    base = load_base_model("pocket")
    bench = Bench(base, taught, images, steps=STEPS, sampler=SAMPLER)
    place = folder / _digest(taught, images) / "scores"
    measured: dict[str, dict[str, Any]] = {}
    for seed in seeds:
        drawn_with = replace(bench, first_seed=FIRST_SEED + SEEDS_APART * seed)
        for trial in TRIALS:
            path = place / f"{trial.name}-s{seed}.json"
            if not path.exists():
                weights = runner.weights(trial, subjects, seed, base, console)
                together = replace(trial, name=f"{trial.name}-joint", training={**trial.training, **JOINT_TRAINING})
                weights |= runner.weights(together, joint_subjects(subjects), seed, base, console)
                found = drawn_with.measure(weights, arrangements(bench))
                record = {"start": asdict(start), "training": dict(trial.training), "scores": found}
                write_whole(path, json.dumps(record).encode())
                console.print(f"measured {trial.name}, seed {seed}")
            measured.setdefault(trial.name, {})[str(seed)] = json.loads(path.read_text(encoding="utf-8"))
    result = {
        "training": TrainingSpec().model_dump(mode="json"),
        "joint_training": JOINT_TRAINING,
        "decoy_fraction": DECOY_FRACTION,
        "images": images * len(POCKET_TEMPLATES),
        "concepts": {one.name: one.token for one in taught},
        "decoys": list(DECOYS),
        "drawn_with": {"sampler": SAMPLER, "steps": STEPS, "guidance": GUIDANCE},
        "seeds": list(seeds),
        "summary": {
            trial: summary({seed: own["scores"] for seed, own in found.items()}) for trial, found in measured.items()
        },
        "trials": measured,
    }
    return write_result("stacks", result, start)


def _digest(taught: Sequence[TaughtConcept], images: int) -> str:
    trials = [[trial.name, trial.method, dict(trial.training)] for trial in TRIALS]
    drawn = [images, TRIGGERS, DECOYS, STEPS, SAMPLER, GUIDANCE, FIRST_SEED]
    return training_digest([[asdict(one) for one in taught], trials, drawn, SIZES, JOINT_SIZES, JOINT_TRAINING])


def joint_subjects(subjects: Sequence[Subject]) -> list[Subject]:
    """Return adapters of four and of eight concepts, the same that are stacked."""
    return [
        Subject(_joint_name(size, place), tuple(one.concepts[0] for one in subjects[size * place : size * (place + 1)]))
        for size in JOINT_SIZES
        for place in range(len(subjects) // size)
    ]


def arrangements(bench: Bench) -> Mapping[str, Arrangement]:
    """Return which adapters the images of each concept and trigger carry, in every arrangement.

    alone: the concept's own. stack-n: its own and its neighbours'. gate: of the largest stack those whose token is in
    the prompt. joint-n: one adapter of n concepts.
    """
    names = [concept.name for concept in bench.taught]
    kinds = (ALONE, *(f"stack-{n}" for n in SIZES), GATE, *(f"joint-{n}" for n in JOINT_SIZES))
    plan: dict[str, dict[tuple[str, str], Carried]] = {kind: {} for kind in kinds}
    for place, concept in enumerate(bench.taught):
        for trigger in TRIGGERS:
            key = (concept.name, trigger)
            plan[ALONE][key] = (concept.name,)
            for size in SIZES:
                first = place // size * size
                plan[f"stack-{size}"][key] = tuple(names[first : first + size])
            prompt = bench.prompts(concept, trigger)[0]
            plan[GATE][key] = tuple(other.name for other in bench.taught if has_token(prompt, other.token))
            for size in JOINT_SIZES:
                plan[f"joint-{size}"][key] = (_joint_name(size, place // size),)
    return plan


@dataclass(frozen=True)
class Estimate:
    """A mean over concepts and seeds with its 95% interval, and the same of its ratio to the adapters alone."""

    mean: float
    interval: tuple[float, float]
    ratio: tuple[float, float, float] | None


def summary(scores: Mapping[str, Scores]) -> dict[str, dict[str, Any]]:
    """Return {arrangement: {metric: Estimate as JSON}} of seed -> scores of one method.

    Concepts are drawn again 2,000 times, each with all its seeds: an interval says how far other concepts may differ.
    ratio: to `alone` on the same draws; None where the adapters alone have a mean of no more than 0.01.
    """
    seeds = list(scores.values())
    concepts = list(seeds[0][ALONE])
    draws = np.random.default_rng(0).integers(len(concepts), size=(_RESAMPLED, len(concepts)))
    values = {
        arrangement: [[_flat(seed[arrangement][concept]) for seed in seeds] for concept in concepts]
        for arrangement in seeds[0]
    }
    found: dict[str, dict[str, Any]] = {}
    for arrangement, cells in values.items():
        for metric in cells[0][0]:
            own, alone = (
                np.array([np.mean([cell[metric] for cell in row]) for row in table]) for table in (cells, values[ALONE])
            )
            found.setdefault(arrangement, {})[metric] = asdict(_estimate(own, alone, draws))
    return found


def judges_summed(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the judges in a method's summary."""
    return [metric.removesuffix(_DRIFT) for metric in table[ALONE] if metric.endswith(_DRIFT)]


def _estimate(own_C: NDArray[np.float64], alone_C: NDArray[np.float64], draws: NDArray[np.int64]) -> Estimate:
    means = own_C[draws].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    ratio = None
    if alone_C.mean() > 0.01:
        ratios = means / np.maximum(alone_C[draws].mean(axis=1), 1e-3)
        least, most = np.percentile(ratios, [2.5, 97.5])
        ratio = (float(own_C.mean() / alone_C.mean()), float(least), float(most))
    return Estimate(float(own_C.mean()), (float(low), float(high)), ratio)


def _flat(scores: Mapping[str, Any]) -> dict[str, float]:
    flat = {f"recognised {trigger}": float(share) for trigger, share in scores["recognised"].items()}
    for judge, own in scores["judges"].items():
        flat |= {f"{judge} gain {trigger}": float(gain) for trigger, gain in own["gain"].items()}
        flat |= {f"{judge} {name}": own[name] for name in ("base_drift", "followed") if own[name] is not None}
    return flat


def _joint_name(size: int, place: int) -> str:
    return f"joint-{size}-{place}"
