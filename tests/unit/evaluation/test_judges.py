"""Judges against transformers' own processor and model, and every way in which one can be absent or damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from cat_cluster.errors import BaseModelError, EvaluationError
from cat_cluster.evaluation.judges import (
    ClipJudge,
    Preprocessing,
    feature_rows,
    is_pocket,
    load_clip,
    load_judge,
    load_judges,
    text_rows,
)
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.pocket.classifier import Classifier
from cat_cluster.models.pretraining.classifier import save_classifier
from cat_cluster.models.pretraining.clip import save_judge


def smooth_picture(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], axis=-1).astype(np.uint8)


def oracle_rows(folder: Path, picture: np.ndarray) -> np.ndarray:
    """transformers from file to unit row; the pooled output is projected by hand, whatever the version returns."""
    model = CLIPModel.from_pretrained(folder).eval()
    pixels = CLIPImageProcessor.from_pretrained(folder)(Image.fromarray(picture), return_tensors="pt").pixel_values
    with torch.no_grad():
        row = model.visual_projection(model.vision_model(pixels).pooler_output)[0].double().numpy()
    return row / np.linalg.norm(row)


@pytest.mark.parametrize(("size", "tolerance"), [((16, 16), 1e-5), ((64, 64), 0.02), ((40, 64), 0.02)])
def test_image_rows_are_those_of_transformers(
    clip_folder: Path, tiny_judge: ClipJudge, size: tuple[int, int], tolerance: float
) -> None:
    """Where pixels are resampled the processor rounds to 8 bits in between, and we do not."""
    picture = smooth_picture(*size)
    found = feature_rows(tiny_judge, picture[None])[0]
    assert 1 - found @ oracle_rows(clip_folder, picture) < tolerance**2
    assert np.linalg.norm(found) == pytest.approx(1.0, abs=1e-12)


def test_text_rows_are_those_of_transformers(clip_folder: Path, tiny_judge: ClipJudge) -> None:
    prompts = ["a photo of a red cup", "in", "a photo of a red cup"]
    model = CLIPModel.from_pretrained(clip_folder).eval()
    found = text_rows(tiny_judge, prompts)
    assert found is not None
    for row, prompt in zip(found, prompts, strict=True):
        ids = CLIPTokenizer.from_pretrained(clip_folder)(prompt, return_tensors="pt")
        with torch.no_grad():
            wanted = model.text_projection(model.text_model(**ids).pooler_output)[0].double().numpy()
        assert row @ wanted / np.linalg.norm(wanted) == pytest.approx(1.0, abs=1e-5)
    assert np.array_equal(found[0], found[2])


def test_a_batch_gives_the_rows_of_its_images_alone(tiny_judge: ClipJudge) -> None:
    pictures = np.stack([np.roll(smooth_picture(16, 16), shift, axis=1) for shift in range(70)])
    together = feature_rows(tiny_judge, pictures)
    assert np.allclose(together[[3, 69]], feature_rows(tiny_judge, pictures[[3, 69]]), atol=1e-5)


def test_the_digest_is_of_values_and_preprocessing_not_of_files(
    clip_folder: Path, tiny_judge: ClipJudge, tiny_base: BaseModel, tmp_path: Path
) -> None:
    sharded, changed, other_pixels = (
        shutil.copytree(clip_folder, tmp_path / name) for name in ("sharded", "changed", "pixels")
    )
    (sharded / "model.safetensors").unlink()
    model = CLIPModel.from_pretrained(clip_folder)
    model.save_pretrained(sharded, max_shard_size="8KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 1e-3
    model.save_pretrained(changed)
    config = json.loads((clip_folder / "preprocessor_config.json").read_text())
    (other_pixels / "preprocessor_config.json").write_text(json.dumps({**config, "image_mean": [0.5] * 3}))
    digests = [load_clip(folder, "judge", tiny_base).digest for folder in (sharded, changed, other_pixels)]
    assert digests[0] == tiny_judge.digest
    assert len({tiny_judge.digest, *digests[1:]}) == 3


def test_both_forms_of_the_preprocessor_config_are_read(tmp_path: Path) -> None:
    rest = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"size": 32, "crop_size": 24, **rest}))
    plain = Preprocessing.read(tmp_path)
    path.write_text(json.dumps({"size": {"shortest_edge": 32}, "crop_size": {"height": 24, "width": 24}, **rest}))
    assert Preprocessing.read(tmp_path) == plain
    assert plain(torch.zeros(2, 3, 48, 64)).shape == (2, 3, 24, 24)


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "preprocessor_config.json", "vocab.json"])
def test_an_incomplete_judge_folder_is_named(
    clip_folder: Path, tiny_base: BaseModel, tmp_path: Path, broken: str
) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "judge")
    for name in (broken, "tokenizer.json", "merges.txt") if broken == "vocab.json" else (broken,):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(EvaluationError, match=r"judge.*give a"):
        load_judge(str(folder), tiny_base)


def test_a_truncated_judge_is_named(clip_folder: Path, tiny_base: BaseModel, tmp_path: Path) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "judge")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(EvaluationError, match="does not hold a CLIPModel that loads"):
        load_judge(str(folder), tiny_base)


def test_a_judge_without_all_its_weights_is_never_filled_with_random_ones(
    clip_folder: Path, tiny_base: BaseModel, tmp_path: Path
) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "judge")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {key: value for key, value in weights.items() if key != "visual_projection.weight"},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(EvaluationError, match=r"visual_projection\.weight"):
        load_judge(str(folder), tiny_base)


def test_the_published_judge_is_asked_for_by_name_where_it_is_absent(tiny_base: BaseModel) -> None:
    with pytest.raises(EvaluationError, match=r"openai/clip-vit-base-patch32.*hf download.*set evaluation.judge"):
        load_judge("auto", tiny_base)


def test_features_that_are_not_finite_are_refused(tiny_judge: ClipJudge) -> None:
    broken = ClipJudge(
        "broken",
        "",
        tiny_judge.model,
        tiny_judge.tokenizer,
        Preprocessing(16, 16, (0.5,) * 3, (0.0,) * 3),
        torch.device("cpu"),
    )
    with pytest.raises(EvaluationError, match="not finite"):
        feature_rows(broken, smooth_picture(16, 16)[None])


@pytest.fixture
def pocket_like(tiny_base_folder: Path, tmp_path: Path) -> BaseModel:
    """A base folder that brings the judges of its own world, as Pocket-SD does."""
    folder = shutil.copytree(tiny_base_folder, tmp_path / "base")
    text_encoder = load_base_model(str(tiny_base_folder)).text_encoders.models[0]
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision |= {"image_size": 64, "patch_size": 16}
    config = CLIPConfig(text_config=text_encoder.config.to_dict(), vision_config=vision, projection_dim=12)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_judge(CLIPModel(config), folder / "judge")
        save_classifier(Classifier((4, 8, 8)).eval(), folder / "classifier")
    return load_base_model(str(folder))


def test_a_pocket_base_is_judged_by_both_of_its_own_judges(pocket_like: BaseModel) -> None:
    assert is_pocket(pocket_like)
    first, second = load_judges("auto", pocket_like)
    assert (first.name, second.name) == ("pocket", "pocket-classifier")
    texts = text_rows(first, ["a red cup", "a photo"])
    assert texts is not None
    assert texts.shape == feature_rows(first, np.stack([smooth_picture(64, 64)] * 2)).shape == (2, 12)
    rows = feature_rows(second, np.stack([smooth_picture(32, 32), smooth_picture(32, 32)[::-1]]))
    assert rows.shape == (2, 8)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1.0)
    assert text_rows(second, ["a cup"]) is None
    assert [judge.name for judge in load_judges("pocket-classifier", pocket_like)] == ["pocket-classifier"]


def test_another_base_is_no_pocket_base_and_has_one_judge(tiny_base: BaseModel, clip_folder: Path) -> None:
    assert not is_pocket(tiny_base)
    assert [judge.name for judge in load_judges(str(clip_folder), tiny_base)] == [str(clip_folder)]


def test_pickled_weights_are_not_read(tiny_base: BaseModel, clip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    load_judge(str(folder), tiny_base)
    (folder / "model.safetensors").unlink()
    with pytest.raises(EvaluationError, match=r"pytorch_model\.bin are not read"):
        load_judge(str(folder), tiny_base)


def test_a_pocket_base_without_classifier_weights_is_named(pocket_like: BaseModel) -> None:
    (pocket_like.folder / "classifier" / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match="no pocket classifier in"):
        load_judges("auto", pocket_like)
