"""Edits against stock image-to-image and inpainting pipelines of the same parts and seed, one image at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image
from torch import Tensor

from cat_cluster.errors import SpecError
from cat_cluster.lora.bank import LoraBank, adapted_layers
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.base_names import base_folder
from cat_cluster.models.edit import EditSource
from cat_cluster.models.edit_steps import edit_strength, steps_made
from cat_cluster.models.generate import ImageRow, generate
from cat_cluster.models.samplers import SAMPLERS, sampler_table
from cat_cluster.spec.choices import SamplerName
from tests.support.denoised_images import random_adapter, stock_scheduler

pytestmark = pytest.mark.slow

LEVEL = 1 / 255
TOLERANCE = 3e-5  # of images in [0, 1]


class Stock:
    """The two stock pipelines of a folder."""

    def __init__(self, folder: Path) -> None:
        self._plain: Any
        self._masked: Any
        if (folder / "text_encoder_2").is_dir():
            self._plain = StableDiffusionXLImg2ImgPipeline.from_pretrained(folder)
            self._masked = StableDiffusionXLInpaintPipeline(**self._plain.components)
        else:
            self._plain = StableDiffusionImg2ImgPipeline.from_pretrained(folder, safety_checker=None)
            self._masked = StableDiffusionInpaintPipeline(**self._plain.components, requires_safety_checker=False)

    def image(self, row: ImageRow, photo: Image.Image, mask: Image.Image | None) -> Tensor:
        """The image [3, H, W] that a stock user gets of a row, its photo and its mask (white is edited)."""
        assert row.source is not None
        pipeline = self._plain if mask is None else self._masked
        pipeline.set_progress_bar_config(disable=True)
        loaded = pipeline.scheduler
        pipeline.scheduler = stock_scheduler(row.sampler, loaded.config)
        of_mask = {} if mask is None else {"mask_image": mask, "width": photo.width, "height": photo.height}
        try:
            images: Tensor = pipeline(
                row.prompt,
                image=photo,
                strength=row.source.strength,
                negative_prompt=row.negative_prompt or None,
                num_inference_steps=row.steps,
                guidance_scale=row.guidance,
                generator=torch.Generator("cpu").manual_seed(row.seed),
                output_type="pt",
                **of_mask,
            ).images
        finally:
            pipeline.scheduler = loaded
        return images[0]


def photo(side: int, seed: int = 0) -> Image.Image:
    """A picture with colours and shapes."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def half(side: int) -> Image.Image:
    """A mask: the right half, and a corner, are edited."""
    marks = np.zeros((side, side), np.uint8)
    marks[:, side // 2 :] = 255
    marks[: side // 4, : side // 4] = 255
    return Image.fromarray(marks)


def source(image: Image.Image, mask: Image.Image | None, strength: float) -> EditSource:
    return EditSource.of(np.asarray(image), None if mask is None else np.asarray(mask) >= 128, strength)


@pytest.fixture(scope="module")
def base(tiny_base_folder: Path) -> BaseModel:
    return load_base_model(str(tiny_base_folder))


@pytest.fixture(scope="module")
def stock(tiny_base_folder: Path) -> Stock:
    return Stock(tiny_base_folder)


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("steps", "strength"), [(6, 0.5), (20, 0.8), (25, 0.28), (5, 0.2), (9, 1.0)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_edit_is_the_stock_pipelines(
    base: BaseModel, stock: Stock, sampler: SamplerName, masked: bool, steps: int, strength: float
) -> None:
    picture, mask = photo(16), half(16) if masked else None
    own = source(picture, mask, strength)
    row = ImageRow("a photo of a red cup", 11, steps=steps, sampler=sampler, negative_prompt="red", source=own)
    assert_same(generate(base, None, [row])[0], stock.image(row, picture, mask))


@pytest.mark.parametrize(("place", "edits"), [((4, 6), True), ((5, 6), False), ((4, 7), False), ((15, 15), False)])
def test_a_mask_of_which_no_latent_is_left_is_refused(
    base: BaseModel, stock: Stock, place: tuple[int, int], edits: bool
) -> None:
    """One pixel is marked. The stock pipeline draws the same of any prompt then, and says nothing."""
    marks = np.zeros((16, 16), np.uint8)
    marks[place] = 255
    own = source(photo(16), Image.fromarray(marks), 1.0)
    red, green = (
        stock.image(ImageRow(prompt, 3, steps=4, source=own), photo(16), Image.fromarray(marks))
        for prompt in ("a red cup", "a green fish")
    )
    assert (red - green).abs().max() > TOLERANCE if edits else torch.equal(red, green)
    if edits:
        own.check_mask(base.pixels_per_latent)
        return
    with pytest.raises(SpecError, match=r"mask: what it marks, .* of each 2x2 pixels the one at the top left counts"):
        own.check_mask(base.pixels_per_latent)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_v_prediction_bases(tiny_base_v_folder: Path, sampler: SamplerName, masked: bool) -> None:
    picture, mask = photo(16, 3), half(16) if masked else None
    row = ImageRow("a red cup", 5, steps=8, sampler=sampler, source=source(picture, mask, 0.6))
    ours = generate(load_base_model(str(tiny_base_v_folder)), None, [row])[0]
    assert_same(ours, Stock(tiny_base_v_folder).image(row, picture, mask))


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sdxl(tiny_xl_folder: Path, sampler: SamplerName, masked: bool, strength: float) -> None:
    """Without a negative prompt guidance starts from zeros; the sizes that the U-Net is told are the picture's."""
    picture, mask = photo(16, 2), half(16) if masked else None
    row = ImageRow("a red cup", 9, steps=8, sampler=sampler, source=source(picture, mask, strength))
    ours = generate(load_base_model(str(tiny_xl_folder)), None, [row])[0]
    assert_same(ours, Stock(tiny_xl_folder).image(row, picture, mask))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_sdxl_with_v_prediction_and_zero_terminal_snr(
    tiny_xl_v_folder: Path, sampler: SamplerName, masked: bool
) -> None:
    picture, mask = photo(16, 2), half(16) if masked else None
    row = ImageRow("a cup", 9, steps=8, sampler=sampler, negative_prompt="red", source=source(picture, mask, 0.6))
    ours = generate(load_base_model(str(tiny_xl_v_folder)), None, [row])[0]
    assert_same(ours, Stock(tiny_xl_v_folder).image(row, picture, mask))


def test_pocket_sd() -> None:
    picture = photo(64, 1)
    row = ImageRow("a photo of a red cup", 7, steps=20, source=source(picture, None, 0.7))
    ours = generate(load_base_model("pocket"), None, [row])[0]
    assert_same(ours, Stock(base_folder("pocket")).image(row, picture, None), LEVEL / 8)


@pytest.mark.parametrize("strength", [0.7, 1.0])
def test_pocket_sd_with_a_mask(strength: float) -> None:
    """Against a plain loop with diffusers' parts: the stock pipeline wants a U-Net of 4 channels, and this has 8."""
    picture, mask = photo(64, 1), half(64)
    row = ImageRow("a photo of a red cup", 7, steps=20, source=source(picture, mask, strength))
    ours = generate(load_base_model("pocket"), None, [row])[0]
    assert_same(ours, plain_inpainting(base_folder("pocket"), row, picture, mask, strength), LEVEL / 8)


@torch.no_grad()
def plain_inpainting(folder: Path, row: ImageRow, picture: Image.Image, mask: Image.Image, strength: float) -> Tensor:
    """The loop of StableDiffusionInpaintPipeline for a U-Net that sees no mask."""
    parts = StableDiffusionImg2ImgPipeline.from_pretrained(folder, safety_checker=None)
    scheduler, factor = DDIMScheduler.from_config(parts.scheduler.config), parts.vae.config.scaling_factor
    positive, negative = parts.encode_prompt(row.prompt, "cpu", 1, True, row.negative_prompt)
    generator = torch.Generator("cpu").manual_seed(row.seed)
    image = factor * parts.vae.encode(parts.image_processor.preprocess(picture)).latent_dist.sample(generator)
    noise = torch.randn(image.shape, generator=generator)
    scheduler.set_timesteps(row.steps)
    timesteps = scheduler.timesteps[row.steps - int(row.steps * strength) :]
    latents = noise if strength == 1.0 else scheduler.add_noise(image, noise, timesteps[:1])
    marks = torch.from_numpy(np.asarray(mask) >= 128).float()[None, None]
    edited = torch.nn.functional.interpolate(marks, size=image.shape[-2:])
    for number, timestep in enumerate(timesteps):
        output = parts.unet(torch.cat([latents] * 2), timestep, torch.cat([negative, positive])).sample
        plain, prompted = output.chunk(2)
        latents = scheduler.step(plain + row.guidance * (prompted - plain), timestep, latents).prev_sample
        coming = timesteps[number + 1 : number + 2]
        around = scheduler.add_noise(image, noise, coming) if len(coming) else image
        latents = (1 - edited) * around + edited * latents
    drawn: Tensor = parts.vae.decode(latents / factor).sample
    return (drawn[0] * 0.5 + 0.5).clamp(0.0, 1.0)


def test_a_mixed_batch_equals_each_image_alone(base: BaseModel, stock: Stock) -> None:
    """Edits and ordinary images of different samplers, steps and adapters in the same calls."""
    picture, mask = photo(16), half(16)
    rows = [
        ImageRow("a red cup", 1, steps=6, source=source(picture, None, 0.5)),
        ImageRow("a photo", 2, steps=4, sampler="euler", guidance=1.0),
        ImageRow("a cup", 3, steps=8, sampler="dpmpp_2m", source=source(picture, mask, 0.75)),
        ImageRow("a red cup", 4, steps=3, sampler="euler", source=source(photo(16, 9), mask, 1.0)),
        ImageRow("cup of red", 5, slot=1, steps=5),
        ImageRow("a cup", 6, slot=1, steps=5, guidance=1.0, source=source(picture, mask, 1.0)),
        ImageRow("a cup", 7, steps=7, sampler="euler_ancestral", source=source(picture, mask, 0.8)),
        ImageRow("red", 8, slot=1, steps=6, sampler="dpmpp_2m_sde_karras", source=source(picture, None, 0.6)),
    ]
    bank = LoraBank.attach(base.unet, layers=adapted_layers(base.unet, "attention_ff"))
    bank.load(1, random_adapter(base, 1))
    try:
        together = generate(base, bank, rows, rows_per_call=16)
        alone = [generate(base, bank, [row])[0] for row in rows]
    finally:
        bank.detach()
    for image, own in zip(together, alone, strict=True):
        assert_same(image, own)
    assert_same(together[0], stock.image(rows[0], picture, None))
    assert_same(together[2], stock.image(rows[2], picture, mask))
    assert_same(together[6], stock.image(rows[6], picture, mask))
    plain = generate(base, None, [rows[1]])[0]
    assert_same(together[1], plain)


def test_what_a_mask_keeps_is_the_image_by_the_vae(base: BaseModel) -> None:
    picture, mask = photo(16), half(16)
    row = ImageRow("a cup", 3, steps=4, source=source(picture, mask, 1.0))
    drawn = generate(base, None, [row, ImageRow("a fish", 3, steps=4, source=row.source)])
    # The latents of a kept area are the same whatever is drawn beside it; pixels far from the edge are, too.
    kept = (slice(None), slice(12, 16), slice(0, 2))
    assert (drawn[0][kept] - drawn[1][kept]).abs().max() < (drawn[0] - drawn[1])[:, :, 10:].abs().max() / 4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_rest_of_a_table_begins_at_its_own_noise(base: BaseModel, sampler: SamplerName) -> None:
    table = sampler_table(sampler, base.schedule, 12)
    rest = table.after(7)
    assert len(rest) == 5
    torch.testing.assert_close(rest.timesteps, table.timesteps[7:])
    assert rest.on_previous[0] == 0
    assert (rest.on_denoised + rest.on_previous)[0] == (table.on_denoised + table.on_previous)[7]
    # An exact prediction of the noise that is put on an image gives the image back, and the U-Net sees unit variance.
    signal, noise, scale = (float(column[7]) for column in (table.signal, table.noise, table.input_scale))
    x = signal * 0.25 + noise * -1.5
    assert float(table.from_latents[7]) * x + float(table.from_output[7]) * -1.5 == pytest.approx(0.25, abs=1e-6)
    assert (scale * signal) ** 2 + (scale * noise) ** 2 == pytest.approx(1.0)


def test_steps_of_an_edit() -> None:
    assert [steps_made(25, strength) for strength in (1.0, 0.8, 0.28, 0.04)] == [25, 20, 7, 1]
    with pytest.raises(SpecError, match=r"^strength: 0\.03 of 25 steps leaves none to make; raise it"):
        steps_made(25, 0.03)
    assert (edit_strength(None, masked=False), edit_strength(None, masked=True)) == (0.8, 1.0)
    for wrong in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(SpecError, match=r"^strength: .* is out of range"):
            steps_made(25, wrong)
