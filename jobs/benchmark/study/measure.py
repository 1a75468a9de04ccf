"""The study: CAT against plain LoRA on concepts that no setting was chosen by, alone, in joint adapters, and on photos.

Both methods have the job spec's own defaults and equal draws; `lora` differs from `cat` in the CAT term alone. `paper`
is the published recipe of that term: prior prompts with only the token removed, alpha 1, every row, no fixed draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from cat_cluster.models.pocket import world
from cat_cluster.spec.concept import DEFAULT_ALPHA
from cat_cluster.spec.sections import TrainingSpec
from jobs.benchmark.record import Start, write_result
from jobs.benchmark.study.compare import compare
from jobs.benchmark.study.frontier import EVALUATION
from jobs.benchmark.study.trials import Measured, Subject, TaughtConcept, Trial, TrialRunner, pocket_subject, starts_of

LORA, CAT = Trial("lora", "lora"), Trial("cat")
PAPER = Trial("paper", alpha=1.0, training={"prior_prompt": "token_removed", "cat_fraction": 1.0, "teacher": "online"})
CONCEPTS = (
    "spotted-cup",
    "checked-cup",
    "dusk-fish",
    "candy-house",
    "ladybird-car",
    "bee-boat",
    "harlequin-star",
    "spotted-flower",
)
JOINT = (
    ("joint-one", ("spotted-cup", "dusk-fish", "ladybird-car", "spotted-flower")),
    ("joint-two", ("checked-cup", "candy-house", "bee-boat", "harlequin-star")),
)
TOKENS = ("sks", "zwx", "ohwx", "qrv")
SEEDS = (0, 1, 2)
# Folder, token, class noun and captions of the paper's own photos, as they lie beside the project.
PHOTOS = (
    ("cat_statue", "shs", "statue", "txt"),
    ("clock", "sts", "clock", "metadata"),
    ("colorful_teapot", "scs", "teapot", "metadata"),
    ("physics_mug", "cic", "mug", "metadata"),
    ("round_bird", "usu", "bird", "metadata"),
)


def run(start: Start, folder: Path, console: Console, photos: Path | None, parts: Sequence[str]) -> list[Path]:
    """Run these parts (single, joint, photos) and write a result file for each; what was measured is kept in `folder`.

    photos: the folder of the paper's concepts, for `photos`.
    """
    pocket = [pocket_subject(name) for name in CONCEPTS]
    joint = [_joint(name, concepts) for name, concepts in JOINT]
    plans = {
        "single": _Plan([([LORA, CAT], pocket, SEEDS), ([PAPER], pocket[::2], SEEDS[:1])]),
        "joint": _Plan([([LORA, CAT], joint, SEEDS)], {"rows_per_concept": 2}, 1),
    }
    if photos is not None:
        plans["photos"] = _Plan([([LORA, CAT], [_photographed(photos, *entry) for entry in PHOTOS], SEEDS[:1])])
    return [_measure(start, folder, part, plans[part], console) for part in parts]


@dataclass(frozen=True)
class _Plan:
    """A part of the study: trials on subjects and seeds, the first on all of them.

    A joint adapter has four concepts, so fewer rows and images of each.
    """

    runs: Sequence[tuple[Sequence[Trial], Sequence[Subject], Sequence[int]]]
    training: Mapping[str, Any] = field(default_factory=dict)
    images_per_prompt: int = 2


def _measure(start: Start, folder: Path, part: str, plan: _Plan, console: Console) -> Path:
    evaluation = {**EVALUATION, "images_per_prompt": plan.images_per_prompt}
    runner, subjects = TrialRunner(start, folder, plan.training, evaluation, max_pack=8), plan.runs[0][1]
    cells: dict[tuple[str, str, int], Measured] = {}
    for some, own, seeds in plan.runs:
        cells |= runner.run(some, own, seeds, console)
    trials = {trial: (own, seeds) for some, own, seeds in plan.runs for trial in some}
    result: dict[str, Any] = {
        "training": TrainingSpec(**plan.training).model_dump(mode="json"),
        "default_alpha": DEFAULT_ALPHA,
        "evaluation": evaluation,
        "subjects": {subject.name: [concept.name for concept in subject.concepts] for subject in subjects},
        "trials": {
            t.name: {
                "method": t.method,
                "alpha": t.alpha,
                "subjects": len(own),
                "seeds": list(seeds),
                "trained": starts_of(cells[t.name, subject.name, seed] for subject in own for seed in seeds),
                **t.training,
            }
            for t, (own, seeds) in trials.items()
        },
        "judges": compare(cells, [trial.name for trial in trials], subjects, SEEDS, against=LORA.name),
    }
    result["leaks"] = {
        f"{trial.name}/{subject.name}": cells[trial.name, subject.name, seeds[0]].leaks
        for trial, (own, seeds) in trials.items()
        for subject in own
    }
    return write_result(f"study-{part}", result, start)


def _joint(name: str, concepts: Sequence[str]) -> Subject:
    return Subject(
        name,
        tuple(
            TaughtConcept(concept, token, world.CONCEPTS[concept].object)
            for concept, token in zip(concepts, TOKENS, strict=True)
        ),
    )


def _photographed(photos: Path, name: str, token: str, class_noun: str, captions: str) -> Subject:
    taught = TaughtConcept(name, token, class_noun, photos / name, captions)
    return Subject(name.replace("_", "-"), (taught,))
