"""Comparisons of trials: estimates are plain means over runs, ratios are paired, missing seeds are left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cat_cluster.evaluation.intervals import ConceptFeatures, score
from jobs.benchmark.record import Start
from jobs.benchmark.study.compare import compare, judges_of, prompts_followed
from jobs.benchmark.study.trials import Measured, Subject, TaughtConcept

pytestmark = pytest.mark.slow

START = Start("2026-11-25T06:03:30+00:00", "3e808594ebfb", dirty=False)

SUBJECTS = [Subject(name, (TaughtConcept(name, "sks", "cup"),)) for name in ("cup", "fish", "car")]


def features(seed: int, pull: float) -> ConceptFeatures:
    """Unit rows; `pull` draws the images with the token towards the photos and those without away from the base."""
    rng = np.random.default_rng(seed)

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    photos = unit(rng.normal(size=(3, 8)) * 0.1 + 1)
    base, with_token = unit(rng.normal(size=(6, 8))), unit(rng.normal(size=(6, 8)))
    return ConceptFeatures(
        token="sks",
        without_NF=unit(base + 0.1 * pull * rng.normal(size=(6, 8))),
        with_NF=unit(with_token + pull * photos[0]),
        base_without_NF=base,
        base_with_NF=with_token,
        photos_MF=photos,
        text_NF=base,
        fisher_N=np.full(6, pull),
    )


def measured(seed: int, pull: float) -> Measured:
    return Measured({"judge": {"sks": features(seed, pull)}}, {"sks": {"rate": pull}}, {}, {}, START)


CELLS = {
    (trial, subject.name, seed): measured(10 * place + seed, pull)
    for trial, pull, seeds in (("lora", 1.0, (0, 1)), ("cat", 3.0, (0, 1)), ("late", 2.0, (0,)))
    for place, subject in enumerate(SUBJECTS)
    for seed in seeds
}


def test_estimates_are_means_over_concepts_and_seeds() -> None:
    found = compare(CELLS, ["lora", "cat", "late"], SUBJECTS, (0, 1), against="lora")
    for trial, seeds in (("lora", (0, 1)), ("cat", (0, 1)), ("late", (0,))):
        runs = [CELLS[trial, subject.name, seed].judges["judge"]["sks"] for subject in SUBJECTS for seed in seeds]
        for metric in ("kps", "identity_gain", "base_drift", "fisher_drift"):
            plain = np.mean([score(metric, [run]) for run in runs])  # type: ignore[list-item]
            assert found["judge"][trial][metric]["estimate"] == pytest.approx(plain)
        assert found["recognition"][trial]["rate"] == {"lora": 1.0, "cat": 3.0, "late": 2.0}[trial]


def test_what_two_trials_share_cancels_in_their_ratio() -> None:
    found = compare(CELLS, ["lora", "cat", "late"], SUBJECTS, (0, 1), against="lora")["judge"]
    assert found["lora"]["identity_gain"]["ratio"] == [1.0, 1.0, 1.0]
    assert found["cat"]["fisher_drift"]["ratio"] == pytest.approx([3.0, 3.0, 3.0])
    assert found["late"]["fisher_drift"]["ratio"] == pytest.approx([2.0, 2.0, 2.0])
    low, high = found["cat"]["identity_gain"]["interval"]
    assert low < found["cat"]["identity_gain"]["estimate"] < high


def test_an_image_follows_its_prompt_when_no_other_prompt_is_nearer() -> None:
    """What all images share, such as an unusual concept, changes their similarity to every prompt alike."""
    one = features(0, 1.0)
    text = np.eye(8)[[0, 1, 2, 0, 1, 2]]
    images = np.eye(8)[[0, 1, 0, 0, 2, 2]] + 5.0 * np.eye(8)[[7]]
    followed = replace(one, text_NF=text, with_NF=images / np.linalg.norm(images, axis=1, keepdims=True))
    assert prompts_followed(followed) == pytest.approx(4 / 6)
    assert prompts_followed(replace(one, text_NF=None)) is None
    assert judges_of(compare(CELLS, ["lora"], SUBJECTS, (0, 1), against="lora")) == ["judge"]
