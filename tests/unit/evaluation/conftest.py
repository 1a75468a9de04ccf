"""A tiny random CLIP judge, and evaluations of pictures drawn by the pocket world."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import CLIPConfig, CLIPModel

from cat_cluster.evaluation.intervals import ConceptFeatures
from cat_cluster.evaluation.judges import ClipJudge, feature_rows, load_clip, text_rows
from cat_cluster.evaluation.leaks import LeakMatrix
from cat_cluster.evaluation.prompts import POCKET_TEMPLATES, fill
from cat_cluster.evaluation.recognition import Recognition
from cat_cluster.evaluation.results import ConceptImages, Evaluation, JudgeScores
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.pocket import world
from cat_cluster.spec.sections import EvaluationSpec

Pictures = NDArray[np.uint8]
MakeEvaluation = Callable[..., Evaluation]


@pytest.fixture(scope="session")
def tiny_base(tiny_base_folder: Path) -> BaseModel:
    return load_base_model(str(tiny_base_folder))


@pytest.fixture(scope="session")
def clip_folder(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel folder with random weights for 16-pixel squares, as a release lays it out."""
    folder = tmp_path_factory.mktemp("clip")
    shutil.copytree(tiny_base_folder / "tokenizer", folder, dirs_exist_ok=True)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {
        **shared,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 77,
        "bos_token_id": vocabulary["<|startoftext|>"],
        "eos_token_id": vocabulary["<|endoftext|>"],
        "pad_token_id": vocabulary["<|endoftext|>"],
    }
    vision = {**shared, "image_size": 16, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "size": {"shortest_edge": 16},
                "crop_size": {"height": 16, "width": 16},
                "image_mean": [0.48, 0.46, 0.41],
                "image_std": [0.27, 0.26, 0.28],
            }
        )
    )
    return folder


@pytest.fixture(scope="session")
def tiny_judge(clip_folder: Path, tiny_base: BaseModel) -> ClipJudge:
    return load_clip(clip_folder, "tiny-clip", tiny_base)


def scenes(design: world.Design, count: int, seed: int) -> Pictures:
    return np.stack([image for image, _ in world.photos(design, count, seed)])


def cups(count: int, seed: int) -> Pictures:
    """Plain cups of many colours: what an undamaged base draws for "a cup"."""
    colours = [world.palette_rgb(name) for name in world.COLOURS]
    drawn = [
        scenes(world.Design("cup", colours[(seed + i) % len(colours)], "plain", colours[0], False), 1, seed + i)[0]
        for i in range(count)
    ]
    return np.stack(drawn)


@pytest.fixture(scope="session")
def make_evaluation(tiny_judge: ClipJudge) -> MakeEvaluation:
    """Makes evaluations whose images are drawn: `broken` is the share of tokenless images that show the concept."""

    @functools.cache  # an evaluation keeps its bootstrap: tests that ask for the same one share it
    def make(
        *, broken: float = 0.0, tokens: tuple[str, ...] = ("sks",), judges: int = 2, seed: int = 1000, each: int = 2
    ) -> Evaluation:
        design = world.CONCEPTS["striped-cup"]
        prompts = tuple(template for template in POCKET_TEMPLATES for _ in range(each))
        count = len(prompts)
        images, features = [], []
        for k, token in enumerate(tokens):
            base, concept = cups(count, 10 * k), scenes(design, count, 50 + k)
            without = base.copy()
            without[: round(broken * count)] = concept[: round(broken * count)]
            images.append(
                ConceptImages(
                    token=token,
                    class_noun="cup",
                    prompts=tuple(fill(prompt, "cup", None) for prompt in prompts),
                    token_prompts=tuple(fill(prompt, "cup", token) for prompt in prompts),
                    seeds=tuple(range(seed, seed + count)),
                    base_without=base,
                    base_with=cups(count, 10 * k + 5),
                    without_token=without,
                    with_token=concept,
                    photos=scenes(design, 5, 7),
                )
            )
            rng = np.random.default_rng(k)
            features.append(
                ConceptFeatures(
                    token=token,
                    without_NF=feature_rows(tiny_judge, without),
                    with_NF=feature_rows(tiny_judge, concept),
                    base_without_NF=feature_rows(tiny_judge, base),
                    base_with_NF=feature_rows(tiny_judge, images[-1].base_with),
                    photos_MF=feature_rows(tiny_judge, images[-1].photos),
                    text_NF=text_rows(tiny_judge, images[-1].prompts),
                    fisher_N=(0.01 + broken) * rng.exponential(1.0, count),
                )
            )
        leaks = LeakMatrix(
            tokens,
            (*tokens, "none", "decoy wjq"),
            np.linspace(0.12, -0.02, len(tokens) * (len(tokens) + 2)).reshape(len(tokens), -1),
        )
        names = ("tiny-clip", "tiny-second")[:judges]
        scores = tuple(JudgeScores(name, tiny_judge.digest, tuple(features), leaks, seed) for name in names)
        recognition: dict[str, Recognition | str] = dict.fromkeys(tokens, Recognition(0.96, broken, 0.0, 0.02, 0.99))
        return Evaluation(tuple(images), scores, recognition, EvaluationSpec(images_per_prompt=each, seed=seed))

    return make
