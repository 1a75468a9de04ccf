from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from cat_cluster.errors import BaseModelError
from cat_cluster.models.pocket import world
from cat_cluster.models.pocket.classifier import LABELS, load_classifier
from cat_cluster.models.pocket.clip import load_judge
from cat_cluster.models.pocket.pretraining import quality
from cat_cluster.models.pocket.pretraining.pretrain import general_prompts, pretrain
from cat_cluster.models.pocket.pretraining.recipe import Recipe
from cat_cluster.models.pretraining.clip import embed_images, embed_texts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pocket")
    pretrain(out, minutes=None, device="cpu", compile=False, seed=0, recipe=Recipe.tiny())
    return out


def test_the_stock_pipeline_loads_the_folder_without_a_dtype_and_draws(folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a photo of a sks cup", num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, world.SIZE, world.SIZE)
    assert torch.isfinite(images).all()


def test_the_tokenizer_is_in_clips_own_files(folder: Path) -> None:
    assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= {
        path.name for path in (folder / "tokenizer").iterdir()
    }
    assert StableDiffusionPipeline.from_pretrained(folder).tokenizer.model_max_length == Recipe.tiny().text_length


def test_the_weights_on_disk_are_half_size_where_they_may_be(folder: Path) -> None:
    types = {}
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model", "judge/model"):
        with safe_open(folder / f"{part}.safetensors", framework="pt") as file:
            types[part.split("/")[0]] = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert types.pop("text_encoder") == {torch.float32}
    assert set(map(frozenset, types.values())) == {frozenset({torch.float16})}


def test_a_finished_folder_is_left_as_it_is(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    pretrain(folder, minutes=None, device="cpu", compile=False, seed=0, recipe=Recipe.tiny())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_unfinished_folder_is_finished_from_its_stages(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "work", tmp_path / "work")
    pretrain(tmp_path, minutes=None, device="cpu", compile=False, seed=0, recipe=Recipe.tiny())
    for path in folder.rglob("*.safetensors"):
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_no_config_tells_where_it_was_made(folder: Path) -> None:
    pretrain_folder = str(folder)
    configs = [path for path in folder.glob("*/*.json") if path.parent.name != "work"]
    assert {"unet", "vae", "judge", "text_encoder"} <= {path.parent.name for path in configs}
    assert not [path for path in configs if pretrain_folder in path.read_text(encoding="utf-8")]


def test_each_stage_notes_its_steps(folder: Path) -> None:
    tiny = Recipe.tiny()
    done = {
        stage: json.loads((folder / "work" / f"{stage}.json").read_text())["step"]
        for stage in ("text", "words", "clip", "vae", "unet", "classifier")
    }
    assert done == {
        "text": tiny.text_steps,
        "words": tiny.words_steps,
        "clip": tiny.clip_steps,
        "vae": tiny.vae_steps,
        "unet": tiny.unet_steps,
        "classifier": tiny.classifier_steps,
    }


def test_the_judge_is_whole_with_the_text_half_of_the_base(folder: Path) -> None:
    judge = load_judge(folder)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    text = embed_texts(judge, pipeline.tokenizer, ["a red cup", "a photo of a fish at night"])
    ids = pipeline.tokenizer(["a red cup"], padding="max_length", max_length=32, return_tensors="pt").input_ids
    with torch.no_grad():
        pooled = judge.text_projection(pipeline.text_encoder(ids).pooler_output)
    torch.testing.assert_close(text[:1], torch.nn.functional.normalize(pooled, dim=-1))
    images = embed_images(judge, torch.rand(3, 3, world.SIZE, world.SIZE))
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(2))


def test_the_classifier_comes_back_and_predicts_every_label(folder: Path) -> None:
    model = load_classifier(folder / "classifier")
    images = torch.rand(5, 3, world.SIZE, world.SIZE)
    assert model.features(images).shape == (5, Recipe.tiny().classifier_channels[-1])
    found = model.predict(images, batch=2)
    assert len(found) == 5
    for labels in found:
        assert set(labels) == set(LABELS)
        assert all(labels[name] in (*LABELS[name], "") for name in LABELS)
        assert (labels["second_colour"] == "") == (labels["pattern"] == "plain")


def test_missing_judges_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"judge/model.safetensors is missing.*pocket pretrain"):
        load_judge(tmp_path)
    with pytest.raises(BaseModelError, match=r"pocket classifier.*pocket pretrain"):
        load_classifier(tmp_path)


def test_general_prompts_have_one_form_and_no_unknown_word(folder: Path) -> None:
    prompts = (folder / "general_prompts.txt").read_text(encoding="utf-8").splitlines()
    assert prompts == general_prompts(Recipe.tiny().general_prompts, 0)
    many = general_prompts(200, 0)
    assert len(set(many)) == 200
    known = {"a", "an", "of", "photo", "with", "and", "eyes", *world.OBJECTS, *world.COLOURS, *world.PATTERNS}
    known |= {word for place in world.PLACES for word in place.split()}
    telling = {*world.COLOURS, *world.PATTERNS}
    for prompt in many:
        words = set(prompt.split())
        assert prompt.startswith("a photo of ")
        assert words <= known
        assert words & telling


def test_every_figure_is_measured_and_written(folder: Path, tmp_path: Path) -> None:
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    assert card["recipe"] == json.loads(json.dumps(asdict(Recipe.tiny())))
    figures = card["figures"]
    assert set(card["training"]) == {"text", "words", "clip", "vae", "unet", "classifier"}
    assert figures["vae"]["psnr_db"] > figures["vae"]["psnr_db_worst"] > 0
    for judge in ("clip", "classifier"):
        assert set(figures["prompt_fidelity"][judge]) == {"object", "colour", "place"}
        assert 0 <= figures["concepts_told_apart"][judge]["same_class"] <= 1
        assert figures["diversity"][judge] >= 0
        assert set(figures["unknown_words"][judge]) == {"other_seed", "trained_style", "unseen_style"}
    assert quality.prompt_grid(folder, tmp_path / "grid.png", 0, steps=1).stat().st_size > 1_000
    assert quality.vae_picture(folder, tmp_path / "vae.png").stat().st_size > 1_000
