"""The shipped weights: what the model card says of them, measured again on a small scale."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from diffusers import StableDiffusionPipeline

from cat_cluster.models.pocket import weights_path, world
from cat_cluster.models.pocket.pretraining import quality
from cat_cluster.models.pocket.pretraining.pretrain import general_prompts
from cat_cluster.models.pocket.pretraining.recipe import Recipe
from cat_cluster.models.pocket.pretraining.unknown_words import word_positions
from cat_cluster.models.pretraining.clip import tokenize

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pocket() -> quality.PocketModels:
    return quality.load_pocket(weights_path(), steps=20)


def test_all_files_together_take_at_most_16_mb() -> None:
    files = [path for path in weights_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    assert not [path for path in files if path.suffix not in {".safetensors", ".json", ".txt"}]


def test_the_stock_pipeline_gets_fp32_without_asking() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(weights_path())
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    assert pipeline.safety_checker is None


def test_photos_of_unseen_concepts_survive_the_vae(pocket: quality.PocketModels) -> None:
    figures = quality.vae_figures(pocket)
    assert figures["psnr_db"] >= 30
    assert all(share >= 0.97 for share in figures["similarity_kept"].values())


def test_both_judges_tell_concepts_of_one_class_apart(pocket: quality.PocketModels) -> None:
    for accuracy in quality.concept_accuracy(pocket).values():
        assert accuracy["same_class"] >= 0.95


def test_every_object_is_drawn_as_asked(pocket: quality.PocketModels) -> None:
    asked = list(
        zip(world.OBJECTS, ("red", "blue", "yellow", "green") * 2, world.PLACES + world.PLACES[:2], strict=True)
    )
    prompts = [f"a photo of a {colour} {noun} {place}" for noun, colour, place in asked]
    found = pocket.classifier.predict(quality.generate(pocket.pipeline, prompts, range(8), pocket.steps))
    right = [
        (labels["object"] == noun) + (labels["colour"] == colour) + (labels["place"] == place)
        for labels, (noun, colour, place) in zip(found, asked, strict=True)
    ]
    assert sum(right) >= 22  # of 24; chance is under 4


def test_an_unknown_word_leaves_its_mark_from_its_place_on(pocket: quality.PocketModels) -> None:
    tokenizer, encoder = pocket.pipeline.tokenizer, pocket.pipeline.text_encoder
    ids = tokenize(tokenizer, ["a photo of a cup on grass", "a photo of a sks cup on grass"])
    with torch.no_grad():
        plain, worded = encoder(ids).last_hidden_state
    place = int(word_positions(ids[:1], ids[1:], tokenizer)[0].int().argmax())
    nearest = torch.cdist(worded, plain).amin(1)  # of each state to any state of the plain prompt
    assert nearest[:place].max() < 0.5
    assert nearest[place:].min() > 3


def test_the_card_describes_these_files() -> None:
    card = json.loads((weights_path() / "card.json").read_text(encoding="utf-8"))
    prompts = (weights_path() / "general_prompts.txt").read_text(encoding="utf-8").splitlines()
    assert prompts == general_prompts(card["recipe"]["general_prompts"], card["seed"])
    assert card["recipe"] == json.loads(json.dumps(asdict(Recipe())))
    for stage, note in card["training"].items():
        assert note["steps"] == card["recipe"][f"{stage}_steps"]
    for judge in ("clip", "classifier"):
        fidelity = card["figures"]["prompt_fidelity"][judge]
        assert fidelity["object"] >= 0.95
        assert fidelity["colour"] >= 0.90
        assert fidelity["place"] >= 0.95
