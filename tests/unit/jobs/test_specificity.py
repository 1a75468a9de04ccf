"""The benchmark of token specificity: sums of adapters, what is asked of them, and what its page says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cat_cluster.evaluation.judges import POCKET_CLASSIFIER, feature_rows, load_judge
from cat_cluster.evaluation.recognition import RecognitionHead
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.pocket import world
from jobs.benchmark.pages import page_texts
from jobs.benchmark.record import Start, write_result
from jobs.benchmark.study.measure import CONCEPTS as STUDIED
from jobs.benchmark.study.specificity import DECOYS, TOKENS
from jobs.benchmark.study.trials import TaughtConcept
from jobs.benchmark.study.triggers import TRIGGERS, Bench

START = Start("2026-11-25T06:03:30+00:00", "3e808594ebfb", dirty=False)
TAUGHT = (
    TaughtConcept("striped-cup", "sks", "cup"),
    TaughtConcept("clown-fish", "zwx", "fish"),
    TaughtConcept("banded-car", "qrv", "car"),
    TaughtConcept("blossom-tree", "vtk", "tree"),
)


@pytest.fixture
def base(tiny_base_folder: Path) -> BaseModel:
    return load_base_model(str(tiny_base_folder))


def test_a_share_is_not_chosen_on_the_studys_concepts() -> None:
    assert not set(TOKENS) & set(STUDIED)
    assert set(TOKENS) < set(world.CONCEPTS)
    assert len({*TOKENS.values(), *DECOYS}) == len(TOKENS) + len(DECOYS)
    assert len({world.CONCEPTS[name].object for name in list(TOKENS)[:5]}) == 5


def test_each_trigger_stands_before_the_class_noun(base: BaseModel) -> None:
    bench = Bench(base, TAUGHT, 2)
    prompts = {trigger: bench.prompts(TAUGHT[2], trigger) for trigger in TRIGGERS}
    assert prompts["own"][:2] == ["a picture of a qrv car on grass"] * 2
    assert prompts["other"][0] == "a picture of a vtk car on grass"
    assert bench.prompts(TAUGHT[3], "other")[0] == "a picture of a qrv tree on grass"
    assert prompts["both"][0] == "a picture of a qrv vtk car on grass"
    assert prompts["none"][-1] == "a picture of a car on a table"
    assert [prompt.split()[4] for prompt in prompts["decoy"]] == list(DECOYS) * 3
    assert {len(found) for found in prompts.values()} == {12}


@pytest.mark.slow
def test_scores_are_plain_loops_over_the_images() -> None:
    pocket, concept = load_base_model("pocket"), TAUGHT[0]
    bench, rng = Bench(pocket, TAUGHT[:2], 1), np.random.default_rng(0)
    photos = np.stack([photo for photo, _ in world.photos(world.CONCEPTS[concept.name], 6, seed=0)])
    scenes = {trigger: np.stack([world.draw(world.random_scene(rng)) for _ in range(6)]) for trigger in TRIGGERS}
    bench.__dict__["_of_base"] = {(concept.name, trigger): images for trigger, images in scenes.items()}  # not drawn
    judge = load_judge("pocket", pocket)
    rows = {trigger: feature_rows(judge, scenes[trigger]) for trigger in TRIGGERS}
    seen = feature_rows(judge, photos)
    # A head between the means of both; fitting one on rendered scenes takes half a minute.
    towards, scene_mean = seen.mean(0), rows["none"].mean(0)
    weight = towards - scene_mean
    head = RecognitionHead(judge, weight, float(-weight @ (towards + scene_mean) / 2), 1.0)
    bench._heads[concept.name] = head
    found = bench.scores(concept, {**scenes, "own": photos})

    def harmonic(images: Any) -> float:
        similar = [(1 + float(image @ photo)) / 2 for image in images for photo in seen]
        return len(similar) / sum(1 / value for value in similar)

    scores = found["judges"]["pocket"]
    assert scores["gain"]["own"] == pytest.approx(harmonic(seen) - harmonic(rows["own"]))
    assert scores["gain"]["own"] > 0.02
    assert [scores["gain"][trigger] for trigger in TRIGGERS[1:]] == [0.0] * 4
    assert scores["base_drift"] == pytest.approx(0.0, abs=1e-9)
    for trigger, images in {**rows, "own": seen}.items():
        closer = [float(image @ weight) + head.bias > 0 for image in images]
        assert found["recognised"][trigger] == pytest.approx(sum(closer) / 6)
    assert found["recognised"]["own"] > 0.8 > found["recognised"]["none"]
    texts = judge.text_features(bench.prompts(concept, "none"))
    assert texts is not None
    nearest = (seen @ (texts / texts.norm(dim=1, keepdim=True)).double().numpy().T).argmax(axis=1)
    assert scores["followed"] == pytest.approx(sum(int(best) == place for place, best in enumerate(nearest)) / 6)
    assert found["judges"][POCKET_CLASSIFIER]["followed"] is None


def test_the_page_shows_means_over_concepts_for_each_share(tmp_path: Path) -> None:
    def scores(value: float) -> dict[str, Any]:
        gain = dict(zip(TRIGGERS, (value, value / 2, value, value / 4, value / 8), strict=True))
        return {"recognised": gain, "judges": {"pocket": {"gain": gain, "base_drift": value / 16, "followed": None}}}

    def arm(*values: float) -> dict[str, Any]:
        return {name: scores(value) for name, value in zip(("cup", "fish"), values, strict=True)}

    result = {
        "training": {"steps": 7},
        "images": 12,
        "concepts": {"cup": "sks", "fish": "zwx"},
        "decoys": list(DECOYS),
        "base": {"base": arm(0.0, 0.0)},
        "shares": {"0": {"alone": arm(0.6, 1.0), "stack": arm(0.2, 0.6)}},
    }
    write_result("specificity", result, START, tmp_path)
    page = page_texts(tmp_path)["specificity.md"]
    assert "| 0 | 80% | 40% | 80% | 20% | 10% | +0.800 | +0.400 | +0.800 | +0.200 | +0.100 | 0.050 |" in page
    assert "| 0 | 40% | 20% | 40% | 10% | 5% | +0.400 | +0.200 | +0.400 | +0.100 | +0.050 | 0.025 |" in page
    assert page.count("| the base alone | 0% |") == 2
    assert "cup as sks, fish as zwx" in page
    assert "7 steps" in page
