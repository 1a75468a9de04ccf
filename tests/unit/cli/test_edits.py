"""`cat-cluster generate --image`: what stock diffusers draws of a photo, and what is refused in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image

from tests.support.provenance import EDITED, said_in_xmp, xmp_of
from tests.support.services import LEVELS
from tests.support.tiny_jobs import CommandLine, assert_refused

pytestmark = pytest.mark.slow

PROMPT, SEED, STEPS, SIDE = "a photo of a red cup", 11, 10, 16


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    coarse = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def mask(photo: Path) -> Path:
    """The photo, transparent in its right half."""
    image = Image.open(photo).convert("RGBA")
    image.paste((0, 0, 0, 0), (SIDE // 2, 0, SIDE, SIDE))
    path = photo.with_name("mask.png")
    image.save(path)
    return path


def words(base: Path, out: Path, *more: str | Path) -> tuple[str | Path, ...]:
    settings = ("--prompt", PROMPT, "--seed", str(SEED), "--steps", str(STEPS), "--base", base, "--out", out)
    return ("generate", *settings, *more)


def stock(base: Path, photo: Path, strength: float, marks: Image.Image | None = None) -> np.ndarray:
    pipeline: Any = StableDiffusionImg2ImgPipeline.from_pretrained(base, safety_checker=None)
    of_mask: dict[str, Any] = {}
    if marks is not None:
        pipeline = StableDiffusionInpaintPipeline(**pipeline.components, requires_safety_checker=False)
        of_mask = {"mask_image": marks, "width": SIDE, "height": SIDE}
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    drawn = pipeline(
        PROMPT,
        image=Image.open(photo),
        strength=strength,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        generator=torch.Generator("cpu").manual_seed(SEED),
        **of_mask,
    ).images[0]
    return np.asarray(drawn, dtype=np.int16)


@pytest.mark.parametrize(("given", "strength"), [((), 0.8), (("--strength", "0.6"), 0.6)])
def test_a_photo_is_drawn_as_stock_diffusers_draws_it(
    command: CommandLine, tiny_base_folder: Path, photo: Path, tmp_path: Path, given: tuple[str, ...], strength: float
) -> None:
    out = tmp_path / "out.png"
    finished = command(*words(tiny_base_folder, out, "--image", photo, *given))
    assert finished.code == 0, finished.err
    image = Image.open(out)
    assert np.abs(np.asarray(image, dtype=np.int16) - stock(tiny_base_folder, photo, strength)).max() <= LEVELS
    text = image.text  # type: ignore[attr-defined]
    assert (text["denoising_strength"], text["masked"], text["strength"]) == (str(strength), "false", "1.0")
    assert "source" not in text
    assert said_in_xmp(text["XML:com.adobe.xmp"].encode()) == EDITED


@pytest.mark.parametrize(("given", "strength"), [((), 1.0), (("--strength", "0.5"), 0.5)])
def test_a_mask_is_drawn_as_stock_diffusers_draws_it(
    command: CommandLine,
    tiny_base_folder: Path,
    photo: Path,
    mask: Path,
    tmp_path: Path,
    given: tuple[str, ...],
    strength: float,
) -> None:
    out = tmp_path / "out.png"
    finished = command(*words(tiny_base_folder, out, "--image", photo, "--mask", mask, *given))
    assert finished.code == 0, finished.err
    marks = Image.new("L", (SIDE, SIDE), 0)
    marks.paste(255, (SIDE // 2, 0, SIDE, SIDE))
    theirs = stock(tiny_base_folder, photo, strength, marks)
    assert np.abs(np.asarray(Image.open(out), dtype=np.int16) - theirs).max() <= LEVELS
    assert said_in_xmp(xmp_of(out.read_bytes())) == EDITED


def test_what_is_done_to_a_photo_is_said(
    command: CommandLine, tiny_base_folder: Path, photo: Path, tmp_path: Path
) -> None:
    Image.open(photo).resize((40, 20)).save(photo)
    finished = command(*words(tiny_base_folder, tmp_path / "out.png", "--image", photo))
    assert "note: image: 40x20 pixels, scaled and cropped to its middle for 16x16" in finished.err
    assert Image.open(tmp_path / "out.png").size == (SIDE, SIDE)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--mask", "{mask}"), "mask: marks what of an image is drawn anew; give --image too"),
        (("--image", "{photo}", "--strength", "1.5"), "strength: 1.5 is out of range"),
        (("--image", "{photo}", "--strength", "0"), "strength: 0 is out of range"),
        (("--image", "{photo}", "--strength", "0.05"), "strength: 0.05 of 10 steps leaves none to make"),
        (("--image", "{photo}x"), "photo.pngx: cannot be read: No such file"),
        (("--image", "{photo}", "--mask", "{mask}x"), "mask.pngx: cannot be read: No such file"),
    ],
)
def test_what_cannot_be_edited_is_refused_before_a_base_is_loaded(
    command: CommandLine, photo: Path, mask: Path, more: tuple[str, ...], said: str
) -> None:
    given = [word.format(photo=photo, mask=mask) for word in more]
    finished = command(*words(photo.with_name("no-base"), photo.with_name("out.png"), *given))
    assert_refused(finished, said)
    assert not photo.with_name("out.png").exists()


def test_a_mask_that_marks_nothing_is_refused(command: CommandLine, tiny_base_folder: Path, photo: Path) -> None:
    out = photo.with_name("out.png")
    assert_refused(command(*words(tiny_base_folder, out, "--image", photo, "--mask", photo)), "has no transparent area")
    assert not out.exists()


def test_a_mask_that_is_too_small_is_refused(
    command: CommandLine, tiny_base_folder: Path, photo: Path, mask: Path
) -> None:
    marks = Image.new("L", (SIDE, SIDE), 0)
    marks.putpixel((5, 5), 255)
    marks.save(mask)
    out = photo.with_name("out.png")
    finished = command(*words(tiny_base_folder, out, "--image", photo, "--mask", mask))
    assert_refused(finished, "mask: what it marks", "is too small to be edited", "mark a larger area")
    assert not out.exists()
