"""Images of long and weighted prompts, against a stock pipeline that is given the states of a plain loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.generate import ImageRow, generate
from tests.support.denoised_images import stock_pipeline

pytestmark = pytest.mark.slow

LONG = "a photo of a red cup, " * 24  # 168 tokens: three chunks
OTHER = "red cup photo " * 60
ROW = ImageRow(LONG, 3, steps=4, negative_prompt=OTHER, prompt_chunks=8)
MIXED = [
    ROW,
    replace(ROW, prompt="a (red:1.6) cup [photo]", seed=4, steps=3, negative_prompt="(red)", weighting="a1111"),
    replace(ROW, prompt="a red cup", negative_prompt="", seed=5),
    replace(ROW, negative_prompt="red", seed=6, sampler="euler"),
    replace(ROW, prompt="cup BREAK (red:1.2)", guidance=1.0, seed=7, steps=2, weighting="a1111"),
    replace(ROW, prompt="cup", seed=8, sampler="dpmpp_2m"),
]


@pytest.fixture(scope="module")
def stock(tiny_base_folder: Path) -> StableDiffusionPipeline:
    return stock_pipeline(tiny_base_folder)


@pytest.fixture(scope="module")
def base(tiny_base_folder: Path) -> BaseModel:
    return load_base_model(str(tiny_base_folder))


def states(stock: StableDiffusionPipeline, *words: tuple[str, float]) -> Tensor:
    """[1, n L, D] of words with their weights: chunk by chunk. This encoder's states have no mean to be restored."""
    tokens, weights = list[int](), list[float]()
    for text, weight in words:
        ids = stock.tokenizer(text, add_special_tokens=False).input_ids
        tokens, weights = tokens + ids, weights + [weight] * len(ids)
    found, end = [], stock.tokenizer.eos_token_id
    for start in range(0, max(1, len(tokens)), 75):
        chunk, factors = tokens[start : start + 75], weights[start : start + 75]
        row = [stock.tokenizer.bos_token_id, *chunk, *[end] * (76 - len(chunk))]
        with torch.no_grad():
            state = stock.text_encoder(torch.tensor([row]))[0]
        for place, factor in enumerate(factors, 1):
            state[:, place] *= factor
        found.append(state)
    return torch.cat(found, dim=1)


def stock_image(stock: StableDiffusionPipeline, row: ImageRow, prompt: Tensor, negative: Tensor) -> Tensor:
    images: Tensor = stock(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        num_inference_steps=row.steps,
        guidance_scale=row.guidance,
        generator=torch.Generator("cpu").manual_seed(row.seed),
        output_type="pt",
    ).images
    return images[0]


def assert_same_image(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-5)


def test_the_image_of_a_long_prompt_is_the_stock_pipelines(base: BaseModel, stock: StableDiffusionPipeline) -> None:
    prompt, negative = states(stock, (LONG, 1.0)), states(stock, (OTHER, 1.0))
    assert prompt.shape == negative.shape == (1, 3 * 77, 16)
    (image,) = generate(base, None, [ROW])
    assert_same_image(image, stock_image(stock, ROW, prompt, negative))
    (cut,) = generate(base, None, [replace(ROW, prompt_chunks=1)])
    assert float((image - cut).abs().max()) > 1e-3


def test_the_image_of_a_weighted_prompt_is_the_stock_pipelines(base: BaseModel, stock: StableDiffusionPipeline) -> None:
    row = MIXED[1]
    prompt = states(stock, ("a", 1.0), ("red", 1.6), ("cup", 1.0), ("photo", 1 / 1.1))
    (image,) = generate(base, None, [row])
    assert_same_image(image, stock_image(stock, row, prompt, states(stock, ("red", 1.1))))
    (plain,) = generate(base, None, [replace(row, prompt="a red cup photo", negative_prompt="red")])
    assert float((image - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("swapped", [False, True])
def test_prompt_and_negative_prompt_may_have_different_numbers_of_chunks(
    base: BaseModel, stock: StableDiffusionPipeline, swapped: bool
) -> None:
    """Two U-Net calls a step, each with the text as it is: nothing is appended to the shorter one."""
    texts = ("red", LONG) if swapped else (LONG, "red")
    row = replace(ROW, prompt=texts[0], negative_prompt=texts[1])
    prompt, negative = (states(stock, (text, 1.0)) for text in texts)
    assert prompt.shape != negative.shape
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator("cpu").manual_seed(row.seed))
    stock.scheduler.set_timesteps(row.steps)
    with torch.no_grad():
        for t in stock.scheduler.timesteps:
            with_text, without = (stock.unet(latents, t, text).sample for text in (prompt, negative))
            guided = without + row.guidance * (with_text - without)
            latents = stock.scheduler.step(guided, t, latents).prev_sample
        picture = stock.vae.decode(latents / stock.vae.config.scaling_factor).sample[0]
    (image,) = generate(base, None, [row])
    assert_same_image(image, (picture / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("rows_per_call", [2, 5, 16])
def test_an_image_does_not_depend_on_the_lengths_of_others(base: BaseModel, rows_per_call: int) -> None:
    for image, row in zip(generate(base, None, MIXED, rows_per_call=rows_per_call), MIXED, strict=True):
        assert_same_image(image, generate(base, None, [row])[0])
