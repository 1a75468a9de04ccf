"""The study of stacks: which adapters an image carries, what is summed up, and what its page says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cat_cluster.lora.bank import LoraBank
from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.lora.stacks import stack_weights
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.generate import ImageRow, generate, image_array
from cat_cluster.models.pocket import world
from jobs.benchmark.pages import page_texts
from jobs.benchmark.record import Start, write_result
from jobs.benchmark.study.stacks import CONCEPTS, TOKENS, arrangements, joint_subjects, summary
from jobs.benchmark.study.trials import pocket_subject
from jobs.benchmark.study.triggers import FIRST_SEED, GUIDANCE, TRIGGERS, Bench
from tests.support.denoised_images import random_adapter

START = Start("2026-11-25T06:03:30+00:00", "3e808594ebfb", dirty=False)
SUBJECTS = [pocket_subject(name, token) for name, token in zip(CONCEPTS, TOKENS, strict=True)]


@pytest.fixture
def base(tiny_base_folder: Path) -> BaseModel:
    return load_base_model(str(tiny_base_folder))


@pytest.fixture
def bench(base: BaseModel) -> Bench:
    return Bench(base, [subject.concepts[0] for subject in SUBJECTS], 1, steps=4, sampler="dpmpp_2m")


def test_another_token_never_asks_for_what_was_taught() -> None:
    objects = [world.CONCEPTS[name].object for name in CONCEPTS]
    assert all(first != second for first, second in zip(objects[::2], objects[1::2], strict=True))
    assert len(set(TOKENS)) == len(CONCEPTS) == 8


def test_an_image_carries_its_group_and_through_the_gate_what_its_prompt_names(bench: Bench) -> None:
    plan = arrangements(bench)
    third, fourth = CONCEPTS[2:4]
    assert plan["alone"][third, "decoy"] == (third,)
    assert plan["stack-2"][third, "own"] == plan["stack-2"][fourth, "none"] == (third, fourth)
    assert plan["stack-4"][third, "own"] == CONCEPTS[:4]
    assert plan["stack-4"][CONCEPTS[7], "own"] == CONCEPTS[4:]
    assert plan["stack-8"][third, "other"] == CONCEPTS
    through = {trigger: plan["gate"][third, trigger] for trigger in TRIGGERS}
    assert through == {"own": (third,), "other": (fourth,), "both": (third, fourth), "decoy": (), "none": ()}
    joint = {subject.name: [concept.name for concept in subject.concepts] for subject in joint_subjects(SUBJECTS)}
    for size in (4, 8):
        for name in CONCEPTS:
            (adapter,) = plan[f"joint-{size}"][name, "own"]
            assert name in joint[adapter]
            assert len(joint[adapter]) == size
    assert all(set(own) == {(name, trigger) for name in CONCEPTS for trigger in TRIGGERS} for own in plan.values())


def test_each_cell_is_drawn_with_its_own_adapters(bench: Bench, base: BaseModel) -> None:
    one, two = (random_adapter(base, seed=seed) for seed in (1, 2))
    concept, prompts = bench.taught[0], bench.prompts(bench.taught[0], "own")
    names = [(concept.name, "own", carried) for carried in ((), ("one",), ("one", "two"))]
    drawn = bench.draw({"one": one, "two": two}, names)

    def alone(weights: AdapterWeights | None) -> Any:
        rows = [
            ImageRow(prompt, FIRST_SEED + i, 0 if weights is None else 1, 4, GUIDANCE, "dpmpp_2m")
            for i, prompt in enumerate(prompts)
        ]
        if weights is None:
            return image_array(generate(base, None, rows))
        bank = LoraBank.attach(base.unet, layers=list(weights.layers))
        try:
            bank.load(1, weights)
            return image_array(generate(base, bank, rows))
        finally:
            bank.detach()

    expected = [alone(None), alone(one), alone(stack_weights([(one, 1.0), (two, 1.0)]))]
    for name, images in zip(names, expected, strict=True):
        assert np.abs(drawn[name].astype(int) - images.astype(int)).max() <= 1
    assert (expected[1] != expected[2]).any()


def test_means_intervals_and_ratios() -> None:
    values = {"cup": (0.8, 0.6), "fish": (0.4, 0.2)}  # of two seeds

    def scores(value: float) -> dict[str, Any]:
        shares = {trigger: value / 2 if trigger == "own" else 0.0 for trigger in TRIGGERS}
        gains = dict.fromkeys(TRIGGERS, value)
        return {
            "recognised": shares,
            "judges": {"clip": {"gain": gains, "base_drift": value, "followed": None}},
        }

    seeds = {
        str(seed): {
            "alone": {name: scores(own[seed]) for name, own in values.items()},
            "stack-2": {name: scores(own[seed] / 2) for name, own in values.items()},
        }
        for seed in (0, 1)
    }
    found = summary(seeds)
    own = found["stack-2"]["clip gain own"]
    assert own["mean"] == pytest.approx(0.25)
    assert own["ratio"] == pytest.approx((0.5, 0.5, 0.5)), "each draw of concepts has both halves"
    assert own["interval"] == pytest.approx((0.15, 0.35)), "of two concepts, drawn again: one twice, the other, or both"
    assert found["stack-2"]["recognised own"]["mean"] == pytest.approx(0.125)
    assert found["stack-2"]["recognised decoy"]["ratio"] is None
    assert "clip followed" not in found["alone"]


def test_the_page_says_what_each_way_of_carrying_does(tmp_path: Path) -> None:
    def estimate(mean: float) -> dict[str, Any]:
        return {"mean": mean, "interval": (mean - 0.1, mean + 0.1), "ratio": (mean / 0.5, 0.4, 0.6)}

    def table(mean: float) -> dict[str, Any]:
        shares = {f"recognised {trigger}": estimate(mean) for trigger in TRIGGERS}
        gains = {f"clip gain {trigger}": estimate(mean / 2) for trigger in TRIGGERS}
        return {**shares, **gains, "clip base_drift": estimate(mean / 4), "clip followed": estimate(mean / 8)}

    result = {
        "training": {"steps": 7},
        "joint_training": {"rows_per_concept": 2},
        "decoy_fraction": 0.5,
        "images": 12,
        "concepts": {"cup": "sks", "fish": "zwx"},
        "decoys": ["wjq"],
        "drawn_with": {"sampler": "ddim", "steps": 9, "guidance": 4.0},
        "seeds": [0, 1],
        "summary": {"lora": {"alone": table(0.5), "stack-2": table(0.25)}},
        "trials": {},
    }
    write_result("stacks", result, START, tmp_path)
    page = page_texts(tmp_path)["stacks.md"]
    assert "| lora, stack-2 | 25% (15% to 35%) | 0.50x (0.40x to 0.60x) | 25% | 25% | 25% | 25% |" in page
    assert "(ddim, 9 steps, guidance 4.0)" in page
    assert "| lora, stack-2 | +0.125 (+0.025 to +0.225) |" in page
    assert "cup as sks, fish as zwx" in page
