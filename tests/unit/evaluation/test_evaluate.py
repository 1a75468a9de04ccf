"""The evaluator on a tiny base: an untrained adapter scores neutral, base images are shared, runs repeat exactly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cat_cluster.data.concepts import Concept, load_concept
from cat_cluster.errors import EvaluationError
from cat_cluster.evaluation.evaluate import Evaluator
from cat_cluster.evaluation.intervals import METRICS
from cat_cluster.evaluation.judges import ClipJudge, feature_rows
from cat_cluster.evaluation.results import Evaluation
from cat_cluster.lora.bank import LoraBank, adapted_layers
from cat_cluster.lora.formats import AdapterWeights, LoraLayer
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.generate import ImageRow, generate, image_array
from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.spec.sections import EvaluationSpec
from cat_cluster.training.methods import initial_weights

pytestmark = pytest.mark.slow

SPEC = EvaluationSpec(prompts=("a photo {} in red", "{} of a cup"), images_per_prompt=2, steps=2, guidance=2.0, seed=5)
UNTRAINED, TRAINED = 1, 2


def perturbed(weights: AdapterWeights, size: float) -> AdapterWeights:
    generator = torch.Generator().manual_seed(1)
    return AdapterWeights(
        {
            name: LoraLayer(layer.down, size * torch.randn(layer.up.shape, generator=generator))
            for name, layer in weights.layers.items()
        }
    )


@pytest.fixture(scope="module")
def bank(tiny_base: BaseModel) -> Iterator[LoraBank]:
    layers = adapted_layers(tiny_base.unet, "attention")
    start = initial_weights(tiny_base.unet, layers, rank=2, seed=0, draw_key="a")
    bank = LoraBank.attach(tiny_base.unet, layers=layers)
    try:
        bank.load(UNTRAINED, start)
        bank.load(TRAINED, perturbed(start, 2.0))
        yield bank
    finally:
        bank.detach()


@pytest.fixture(scope="module")
def concepts(tmp_path_factory: pytest.TempPathFactory) -> list[Concept]:
    found = []
    for token, noun, colour in (("sks", "cup", (200, 180, 20)), ("zwx", "fish", (30, 60, 200))):
        folder = tmp_path_factory.mktemp(token)
        for i in range(2):
            Image.new("RGB", (40 + i, 32), colour).save(folder / f"{i}.png")
        found.append(load_concept(ConceptSpec(token=token, class_noun=noun, images=str(folder))))
    return found


@pytest.fixture(scope="module")
def trained(tiny_base: BaseModel, bank: LoraBank, concepts: list[Concept], tiny_judge: ClipJudge) -> Evaluation:
    return Evaluator(tiny_base, bank, [tiny_judge]).evaluate(TRAINED, concepts, SPEC)


def test_an_untrained_adapter_changes_nothing(
    tiny_base: BaseModel, bank: LoraBank, concepts: list[Concept], tiny_judge: ClipJudge
) -> None:
    found = Evaluator(tiny_base, bank, [tiny_judge]).evaluate(UNTRAINED, concepts[:1], SPEC).to_json()
    assert found["base_drift"] == pytest.approx(0.0, abs=1e-6)
    assert found["fisher_drift"] == 0.0
    assert found["diversity_ratio"] == pytest.approx(1.0, abs=1e-3)
    assert found["identity_gain"] == pytest.approx(0.0, abs=1e-6)
    assert np.allclose(found["leak_matrix"]["values"], 0.0, atol=1e-6)


def test_a_changed_adapter_is_seen_to_change(trained: Evaluation) -> None:
    found = trained.to_json()
    assert found["base_drift"] > 1e-5
    assert found["fisher_drift"] > 1e-5
    assert found["diversity_ratio"] != 1.0
    assert np.abs(found["leak_matrix"]["values"]).max() > 1e-5


def test_images_are_those_of_generate_at_the_same_prompt_seed_and_slot(
    trained: Evaluation, tiny_base: BaseModel, bank: LoraBank
) -> None:
    images = trained.images[1]
    assert images.prompts == ("a photo fish in red",) * 2 + ("fish of a cup",) * 2
    assert images.token_prompts[2] == "zwx fish of a cup"
    assert images.seeds == (5, 6, 7, 8)
    arms = (
        (images.base_without, images.prompts, 0),
        (images.without_token, images.prompts, TRAINED),
        (images.with_token, images.token_prompts, TRAINED),
        (images.base_with, images.token_prompts, 0),
    )
    for pictures, prompts, slot in arms:
        row = ImageRow(prompts[2], 7, slot, SPEC.steps, SPEC.guidance, SPEC.sampler)
        alone = generate(tiny_base, bank, [row])[0].permute(1, 2, 0).mul(255.0)
        assert np.abs(pictures[2].astype(float) - alone.numpy()).max() <= 0.51 + 1e-3


def test_photos_are_centre_squares_at_the_resolution_of_the_base(trained: Evaluation) -> None:
    assert trained.images[0].photos.shape == (2, 16, 16, 3)
    assert np.array_equal(trained.images[0].photos[0, 8, 8], [200, 180, 20])


def test_the_json_has_the_contract_keys_and_survives_a_round_trip(trained: Evaluation) -> None:
    found = trained.to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert all(type(found[metric]) is float for metric in METRICS)
    assert found["judge"]["name"] == "tiny-clip"
    assert found["leak_matrix"]["tokens"] == ["sks", "zwx"]
    assert found["leak_matrix"]["triggers"] == ["sks", "zwx", "none", "decoy wjq"]
    assert found["recognition"]["rate"] is None
    assert "embedded base" in found["recognition"]["concepts"]["sks"]["not_available"]
    for metric in METRICS:
        assert found[metric] == pytest.approx((found["concepts"]["sks"][metric] + found["concepts"]["zwx"][metric]) / 2)
    reference = trained.reference()
    assert reference["judge"] == found["judge"]
    assert len(reference["concepts"]["sks"]["photos"]) == 2
    for token in ("sks", "zwx"):
        decoy = reference["concepts"][token]["decoy"]
        assert decoy["word"] == "wjq"
        assert sorted(decoy["pairs"]) == list(range(len(reference["concepts"][token]["kps"])))
        assert len(decoy["drift"]) == len(decoy["pairs"])
        assert min(decoy["drift"]) > 0
    assert 1 - np.mean(1 / (1 - np.array(reference["concepts"]["sks"]["kps"]))) ** -1 == pytest.approx(
        found["concepts"]["sks"]["kps"]
    )


def test_a_decoys_drift_is_that_of_the_pair_with_its_index(
    trained: Evaluation, tiny_base: BaseModel, bank: LoraBank, tiny_judge: ClipJudge
) -> None:
    """The images are made again, from the pair's own template and seed."""
    images = trained.images[1]
    decoy = trained.reference()["concepts"]["zwx"]["decoy"]
    for pair, drift in zip(decoy["pairs"], decoy["drift"], strict=True):
        prompt = images.token_prompts[pair].replace("zwx", decoy["word"])
        rows = [ImageRow(prompt, images.seeds[pair], slot, SPEC.steps, SPEC.guidance) for slot in (0, TRAINED)]
        base, own = feature_rows(tiny_judge, image_array(generate(tiny_base, bank, rows)))
        assert drift == pytest.approx((1 - float(base @ own)) / 2, abs=1e-4)
    assert min(np.diff(sorted(decoy["drift"]))) > 2e-4, "else pairs would not be told apart"


def test_the_same_spec_gives_the_same_images_and_scores(
    trained: Evaluation, tiny_base: BaseModel, bank: LoraBank, concepts: list[Concept], tiny_judge: ClipJudge
) -> None:
    again = Evaluator(tiny_base, bank, [tiny_judge]).evaluate(TRAINED, concepts, SPEC)
    assert again.to_json() == trained.to_json()
    assert np.array_equal(again.images[0].with_token, trained.images[0].with_token)


def test_base_images_are_made_once_and_shared_between_adapters(
    trained: Evaluation, tiny_base: BaseModel, bank: LoraBank, concepts: list[Concept], tiny_judge: ClipJudge
) -> None:
    totals: dict[int, int] = {}

    def note(slot: int) -> None:
        evaluator.evaluate(slot, concepts, SPEC, on_progress=lambda _, total: totals.__setitem__(slot, total))

    evaluator = Evaluator(tiny_base, bank, [tiny_judge])
    note(UNTRAINED)
    note(TRAINED)
    # Of each adapter 2 concepts x 4 prompts x (2 tokens, none, decoy), and as many of the base once.
    assert totals == {UNTRAINED: 2 * 2 * 4 * 4 * SPEC.steps, TRAINED: 2 * 4 * 4 * SPEC.steps}
    shared = evaluator.evaluate(TRAINED, concepts, SPEC)
    assert np.abs(shared.images[0].with_token.astype(int) - trained.images[0].with_token.astype(int)).max() <= 1


def test_a_single_image_is_refused_before_anything_is_generated(
    tiny_base: BaseModel, bank: LoraBank, concepts: list[Concept], tiny_judge: ClipJudge
) -> None:
    lone = SPEC.model_copy(update={"prompts": ("a {}",), "images_per_prompt": 1})
    with pytest.raises(EvaluationError, match="images_per_prompt"):
        Evaluator(tiny_base, bank, [tiny_judge]).evaluate(TRAINED, concepts, lone)


def test_without_judges_the_spec_names_one(
    tiny_base: BaseModel, bank: LoraBank, concepts: list[Concept], clip_folder: Path
) -> None:
    spec = SPEC.model_copy(update={"judge": str(clip_folder), "steps": 1})
    found = Evaluator(tiny_base, bank).evaluate(TRAINED, concepts[:1], spec)
    assert found.to_json()["judge"]["name"] == str(clip_folder)
