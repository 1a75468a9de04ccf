from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open

from cat_cluster.models.pocket.classifier import load_classifier
from cat_cluster.models.pocket.clip import load_judge
from cat_cluster.models.pocket.places import PLACES
from cat_cluster.models.pocket_xl import world
from cat_cluster.models.pocket_xl.captions import with_article
from cat_cluster.models.pocket_xl.emojis import Emoji
from cat_cluster.models.pocket_xl.pretraining import classifier, quality, text, unet
from cat_cluster.models.pocket_xl.pretraining.pretrain import general_prompts, pretrain_xl
from cat_cluster.models.pocket_xl.pretraining.recipe import Recipe
from cat_cluster.models.pretraining import vae
from cat_cluster.models.pretraining.clip import embed_texts
from cat_cluster.models.pretraining.stage import optimise, run_stage

pytestmark = pytest.mark.slow
STAGES = {"vae", "clip", "classifier", "unet"}


def _pretrain(out: Path, package: Path) -> None:
    pretrain_xl(
        out, emojis=package, real_judge=None, minutes=None, device="cpu", compile=False, seed=0, recipe=Recipe.tiny()
    )


@pytest.fixture(scope="module", autouse=True)
def _a_small_vae_to_start_from(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Pocket-SD's takes a second for a picture of each test's many."""
    started_from = tmp_path_factory.mktemp("pocket")
    torch.manual_seed(0)
    vae.new_vae((8, 8, 8), 8, 64).save_pretrained(started_from / "vae")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("cat_cluster.models.pocket_xl.pretraining.vae.weights_path", lambda: started_from)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, package: Path) -> Path:
    out = tmp_path_factory.mktemp("pocket-xl")
    _pretrain(out, package)
    return out


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> StableDiffusionXLPipeline:
    loaded = StableDiffusionXLPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_the_stock_pipeline_loads_the_folder_without_a_dtype_and_draws_every_shape(
    pipeline: StableDiffusionXLPipeline,
) -> None:
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    assert {part.dtype for part in parts} == {torch.float32}
    assert pipeline.config.force_zeros_for_empty_prompt
    for height, width in ((64, 64), (48, 80), (64, 48)):
        images = pipeline("a truck", height=height, width=width, num_inference_steps=2, output_type="pt").images
        assert images.shape == (1, 3, height, width)
        assert torch.isfinite(images).all()


def test_a_picture_depends_on_the_original_size_and_the_crop(pipeline: StableDiffusionXLPipeline) -> None:
    def drawn(**sizes: tuple[int, int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline("a truck", num_inference_steps=2, generator=generator, output_type="pt", **sizes).images

    plain = drawn()
    assert not torch.equal(plain, drawn(original_size=(32, 32)))
    assert not torch.equal(plain, drawn(crops_coords_top_left=(0, 16)))


def test_both_tokenizers_have_one_vocabulary_and_pad_as_those_of_sdxl(pipeline: StableDiffusionXLPipeline) -> None:
    first, second = pipeline.tokenizer, pipeline.tokenizer_2
    assert first.get_vocab() == second.get_vocab()
    assert (first.pad_token, second.pad_token) == ("<|endoftext|>", "!")
    assert second.pad_token_id == 0
    assert first.model_max_length == second.model_max_length == Recipe.tiny().text_length
    assert first("a sks dog").input_ids == second("a sks dog").input_ids


def test_all_weights_are_half_size(folder: Path) -> None:
    for path in folder.glob("*/*.safetensors"):
        with safe_open(path, framework="pt") as file:
            types = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
        assert types <= {torch.float16, torch.int64}, path


def test_a_finished_folder_is_left_as_it_is(folder: Path, package: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    _pretrain(folder, package)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_unfinished_folder_is_finished_from_its_stages(folder: Path, package: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "work", tmp_path / "work")
    _pretrain(tmp_path, package)
    for path in folder.rglob("*.safetensors"):
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes()


_FILES = {
    "vae": ("vae/diffusion_pytorch_model.safetensors", vae),
    "clip": ("text_encoder_2/model.safetensors", text),
    "classifier": ("classifier/model.safetensors", classifier),
    "unet": ("unet/diffusion_pytorch_model.safetensors", unet),
}


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_run_killed_within_a_stage_and_run_again_gives_the_weights_of_one_that_was_not(
    folder: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    shutil.copytree(folder / "work", tmp_path / "work")
    for ended in (f"{stage}.json", f"{stage}.pt"):
        (tmp_path / "work" / ended).unlink()
    shutil.rmtree(tmp_path / "work" / stage)
    file, module = _FILES[stage]
    steps = iter(range(10))

    def killed_in_the_second(*given: Any) -> None:
        if next(steps) == 1:
            raise KeyboardInterrupt
        optimise(*given)

    with monkeypatch.context() as patched:
        patched.setattr(module, "run_stage", partial(run_stage, every_seconds=0.0))
        patched.setattr(module, "optimise", killed_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            _pretrain(tmp_path, package)
    assert torch.load(tmp_path / "work" / f"{stage}.pt", weights_only=True)["step"] == 1
    _pretrain(tmp_path, package)
    assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()


def test_no_config_tells_where_it_was_made(folder: Path) -> None:
    configs = [path for path in folder.glob("*/*.json") if path.parent.name != "work"]
    assert {"unet", "vae", "judge", "text_encoder", "text_encoder_2"} <= {path.parent.name for path in configs}
    assert not [path for path in configs if str(folder) in path.read_text(encoding="utf-8")]


def test_each_stage_notes_its_steps_and_losses(folder: Path) -> None:
    tiny = asdict(Recipe.tiny())
    done = {stage: json.loads((folder / "work" / f"{stage}.json").read_text())["step"] for stage in STAGES}
    assert done == {stage: tiny[f"{stage}_steps"] for stage in STAGES}
    log = [json.loads(line) for line in (folder / "work" / "progress.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in log if line["progress"] == 1.0} == STAGES
    assert all(line["loss"] > 0 for line in log)


def test_the_judge_is_whole_with_the_second_text_encoder(folder: Path, pipeline: StableDiffusionXLPipeline) -> None:
    judge = load_judge(folder)
    found = embed_texts(judge, pipeline.tokenizer_2, ["a dog beside a truck"])
    ids = pipeline.tokenizer_2(["a dog beside a truck"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        pooled = pipeline.text_encoder_2(ids).text_embeds
    torch.testing.assert_close(found, torch.nn.functional.normalize(pooled, dim=-1))


def test_the_classifier_names_every_picture_and_place(folder: Path, emojis: tuple[Emoji, ...]) -> None:
    model = load_classifier(folder / "classifier")
    assert model.labels["object"] == tuple(emoji.name for emoji in emojis)
    for labels in model.predict(torch.rand(3, 3, 48, 80)):
        assert labels["object"] in model.labels["object"]
        assert labels["place"] in model.labels["place"]


def test_general_prompts_name_things_and_places(folder: Path, emojis: tuple[Emoji, ...]) -> None:
    prompts = (folder / "general_prompts.txt").read_text(encoding="utf-8").splitlines()
    assert prompts == general_prompts(emojis, Recipe.tiny().general_prompts, 0)
    many = general_prompts(emojis, 100, 0)
    assert len(set(many)) == 100
    assert all(prompt.startswith("a photo of ") for prompt in many)
    assert not any("flag" in prompt for prompt in many)


def test_every_figure_is_measured_and_written(folder: Path, tmp_path: Path) -> None:
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    assert card["recipe"] == json.loads(json.dumps(asdict(Recipe.tiny())))
    figures = card["figures"]
    assert set(card["training"]) == STAGES
    assert figures["vae"]["psnr_db"] > figures["vae"]["psnr_db_worst"] > 0
    for judge in ("clip", "classifier"):
        assert figures["one_thing"][judge]["object"] <= figures["one_thing"][judge]["object_among_five"] <= 1
        assert 0 <= figures["concepts_told_apart"][judge] <= 1
        assert figures["diversity"][judge] >= 0
        assert set(figures["unknown_words"][judge]) == {"other_seed", *quality.UNKNOWN_WORDS}
    assert figures["two_things"]["both"] <= figures["two_things"]["either"] <= 1
    assert set(figures["frame_shapes"]) == {"64x64", "48x64", "64x48", "48x80", "80x48"}
    assert quality.prompt_grid(folder, tmp_path / "grid.png", 0, steps=1).stat().st_size > 1_000
    assert quality.vae_picture(folder, tmp_path / "vae.png").stat().st_size > 1_000


def test_figures_are_shares_of_what_was_asked(
    folder: Path, emojis: tuple[Emoji, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a classifier that sees what the prompt names, but of two things only the first."""
    pocket = quality.load_pocket_xl(folder, emojis, steps=1)
    asked: list[str] = []

    def drawn(_: object, prompts: list[str], seeds: object, steps: object, shape: object = None) -> torch.Tensor:
        asked.extend(prompts)
        return torch.zeros(len(prompts), 3, 64, 64)

    def read(_: object, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        things = torch.zeros(len(pictures), len(emojis))
        places = torch.zeros(len(pictures), len(PLACES))
        for row, prompt in enumerate(asked[-len(pictures) :]):
            named = prompt.split(" beside ")[0].removeprefix("a photo of ")
            for index, emoji in enumerate(emojis):  # the longest name that fits: "dog face" before "dog"
                things[row, index] = len(emoji.name) if named.startswith(with_article(emoji.name)) else 0
            places[row] = torch.tensor([float(prompt.endswith(place)) for place in PLACES])
        return {"object": things, "place": places}

    monkeypatch.setattr(quality, "generate", drawn)
    monkeypatch.setattr(quality, "_logits", read)
    monkeypatch.setattr(quality, "_NAMED", 1)
    found = quality.one_thing(pocket, 12, 0)["classifier"]
    assert found == {"object": 1.0, "object_among_five": 1.0, "place": 1.0}
    assert quality.two_things(pocket, 12, 0) == {"both": 0.0, "either": 1.0}
    assert set(quality.frame_shapes(pocket, 4, 0).values()) == {1.0}


def test_the_judge_of_the_real_world_sees_drawn_and_generated_pictures_of_the_same_things(
    folder: Path, emojis: tuple[Emoji, ...]
) -> None:
    pocket = quality.load_pocket_xl(folder, emojis, steps=1)
    seen: list[torch.Tensor] = []

    class Judge(torch.nn.Module):
        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            seen.append(pictures)
            return torch.nn.functional.one_hot(torch.tensor([291, 850]), 1000).float()  # a lion, a teddy bear

    found = quality.real_world(pocket, Judge(), 0)
    assert found == {"drawn": {"top1": 1.0, "top5": 1.0}, "generated": {"top1": 1.0, "top5": 1.0}}
    wanted = [world.photos(emojis[index], 1, number)[0][0] for number, index in enumerate((2, 4))]
    torch.testing.assert_close((seen[0] * 255).round().byte().permute(0, 2, 3, 1), torch.tensor(np.stack(wanted)))
    assert seen[1].shape == (2, 3, 64, 64)
