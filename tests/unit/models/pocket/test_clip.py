from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPImageProcessor

from cat_cluster.models.pocket.pretraining.clip import _batch_rows, new_clip
from cat_cluster.models.pocket.pretraining.pretrain import make_tokenizer
from cat_cluster.models.pocket.pretraining.recipe import Recipe
from cat_cluster.models.pretraining import clip


def test_contrast_equals_a_plain_loop_that_skips_equal_captions(tmp_path: Path) -> None:
    recipe = Recipe.tiny()
    model = new_clip(recipe, make_tokenizer(recipe, tmp_path, 0))
    images, captions = torch.nn.functional.normalize(torch.randn(2, 4, recipe.clip_width), dim=-1)
    texts = ["a cup", "a fish", "a cup", "a car"]
    scale = float(model.logit_scale.detach().exp())

    def one_way(queries: torch.Tensor, keys: torch.Tensor) -> float:
        terms = []
        for i, query in enumerate(queries):
            against = [j for j in range(4) if j == i or texts[j] != texts[i]]
            scores = np.array([scale * float(query @ keys[j]) for j in against])
            terms.append(np.log(np.exp(scores).sum()) - scores[against.index(i)])
        return float(np.mean(terms))

    expected = (one_way(images, captions) + one_way(captions, images)) / 2
    found = clip.contrast(model.logit_scale, images, captions, texts)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=1e-4, atol=1e-4)


def test_padding_does_not_change_pooled_text(tmp_path: Path) -> None:
    recipe = Recipe.tiny()
    tokenizer = make_tokenizer(recipe, tmp_path, 0)
    model = new_clip(recipe, tokenizer).eval()
    ids = clip.tokenize(tokenizer, ["a cup", "a photo of a red cup with blue stripes on grass"])
    short = clip.trim_padding(ids, tokenizer)
    assert short.shape[1] < ids.shape[1] == recipe.text_length
    with torch.no_grad():
        whole, cut = (model.text_model(input_ids=rows).pooler_output for rows in (ids, short))
    torch.testing.assert_close(cut, whole)


def test_the_saved_processor_says_how_the_judge_sees_pixels(tmp_path: Path) -> None:
    recipe = Recipe.tiny()
    model = new_clip(recipe, make_tokenizer(recipe, tmp_path / "tokenizer", 0)).eval()
    clip.save_judge(model, tmp_path / "judge")
    assert json.loads((tmp_path / "judge" / "config.json").read_text())["model_type"] == "clip"
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "judge")
    frames = np.random.default_rng(0).integers(0, 256, size=(2, 64, 64, 3), dtype=np.uint8)
    pixels = processor(list(frames), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    found = clip.embed_images(model, torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255)
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=-1), rtol=1e-4, atol=1e-5)


def test_half_of_a_batch_shares_its_place() -> None:
    groups = [np.arange(10), np.arange(10, 20)]
    rows = _batch_rows(groups, 20, 8, np.random.default_rng(0))
    assert rows.shape == (8,)
    assert len({int(row) // 10 for row in rows[:4]}) == 1
