"""The alpha question: how much identity each way of holding the base costs, on concepts kept for choosing settings.

One setting is varied at a time around a common one. The concepts of the study are others, so that the default that is
chosen here is not judged on what it was chosen by.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from jobs.benchmark.record import Start, write_result
from jobs.benchmark.study.compare import compare
from jobs.benchmark.study.trials import Trial, TrialRunner, pocket_subject, starts_of

TRAINING = {
    "steps": 300,
    "rank": 8,
    "targets": "attention_ff",
    "learning_rate": 2.0e-3,
    "lr_schedule": "cosine",
    "warmup_steps": 20,
    "rows_per_concept": 4,
    "cat_fraction": 0.5,
}
EVALUATION = {"images_per_prompt": 2, "steps": 20}
CONCEPTS = ("striped-cup", "clown-fish", "checked-house")
ON_ALL_CONCEPTS = ("alpha", "fraction", "teacher")  # the other groups are measured on the first two
LORA = "lora"
GROUPS: dict[str, tuple[Trial, ...]] = {
    "alpha": (
        Trial("cat-a0p1", alpha=0.1),
        Trial("cat-a0p3", alpha=0.3),
        Trial("cat-a1p0", alpha=1.0),
        Trial("cat-a3", alpha=3.0),
        Trial("cat-a5", alpha=5.0),
        Trial("cat-a10p0", alpha=10.0),
        Trial("cat-a30p0", alpha=30.0),
        Trial("cat-a100p0", alpha=100.0),
    ),
    "fraction": (
        Trial("cat-f100", alpha=3.0, training={"cat_fraction": 1.0}),
        Trial("cat-a3", alpha=3.0),
        Trial("cat-f25", alpha=3.0, training={"cat_fraction": 0.25}),
    ),
    "teacher": (
        Trial("cat-a3", alpha=3.0),
        Trial("cat-pool", alpha=3.0, training={"teacher": "pool"}),
        Trial("cat-pool16", alpha=3.0, training={"teacher": "pool", "pool_size": 16}),
        Trial("cat-pool-f25", alpha=3.0, training={"teacher": "pool", "cat_fraction": 0.25}),
    ),
    "prior_prompt": (
        Trial("cat-a3", alpha=3.0),
        Trial("cat-token-removed", alpha=3.0, training={"prior_prompt": "token_removed"}),
        Trial("cat-class-noun", alpha=3.0, training={"prior_prompt": "class_noun"}),
        Trial("cat-empty", alpha=3.0, training={"prior_prompt": "empty"}),
    ),
    "timesteps": (
        Trial("cat-a3", alpha=3.0),
        Trial("cat-high", alpha=3.0, training={"alpha_schedule": "high_noise"}),
        Trial("cat-low", alpha=3.0, training={"alpha_schedule": "low_noise"}),
    ),
    "budget": (
        Trial("cat-a3", alpha=3.0),
        Trial("cat-b01", alpha=3.0, training={"drift_budget": 0.01}),
    ),
    "targets": (
        Trial("cat-a3", alpha=3.0),
        Trial("cat-attention", alpha=3.0, training={"targets": "attention"}),
    ),
    "rank, rate, steps": (
        Trial("cat-a3", alpha=3.0),
        Trial("cat-r2", alpha=3.0, training={"rank": 2}),
        Trial("cat-lr1", alpha=3.0, training={"learning_rate": 1.0e-3}),
        Trial("cat-420", alpha=3.0, training={"steps": 420}),
        Trial("lora-420", "lora", training={"steps": 420}),
    ),
}


def run(start: Start, folder: Path, console: Console, groups: Sequence[str] = tuple(GROUPS)) -> Path:
    """Train, measure and compare the trials of these groups, keeping what was measured in `folder`."""
    runner = TrialRunner(start, folder, TRAINING, EVALUATION, max_pack=14)
    lora, measured = Trial(LORA, LORA), {}
    for concepts in (CONCEPTS, CONCEPTS[:2]):
        names = [name for name in groups if (name in ON_ALL_CONCEPTS) == (concepts == CONCEPTS)]
        subjects = [pocket_subject(concept) for concept in concepts]
        every = {trial.name: trial for name in names for trial in GROUPS[name]}
        cells = runner.run([lora, *every.values()], subjects, [0], console)  # in one call: fuller packs
        for name in names:
            trials = [lora, *GROUPS[name]]
            measured[name] = {
                "concepts": list(concepts),
                "trials": {
                    trial.name: {
                        "method": trial.method,
                        "alpha": trial.alpha,
                        "trained": starts_of(cells[trial.name, subject.name, 0] for subject in subjects),
                        **trial.training,
                    }
                    for trial in trials
                },
                "judges": compare(cells, [trial.name for trial in trials], subjects, [0], against=LORA),
            }
    return write_result("frontier", {"setting": TRAINING, "evaluation": EVALUATION, "groups": measured}, start)
