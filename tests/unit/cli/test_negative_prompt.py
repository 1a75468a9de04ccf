"""`cat-cluster generate --negative-prompt`: what stock diffusers draws, what the file says, and what it cannot do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from cat_cluster.models.base_model import load_base_model
from cat_cluster.models.prompt_weights import Prompt
from cat_cluster.models.prompts import encode_prompts
from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore
from tests.support.denoised_images import stock_pipeline
from tests.support.services import LEVELS, Pixels, Shop
from tests.support.tiny_jobs import CommandLine, Finished, assert_refused

pytestmark = pytest.mark.slow

PROMPT, NEGATIVE, SEED, STEPS = "a photo of a red cup", "a blue photo", 11, 4
GUIDANCE = 20.0  # much, so that what the tiny base makes of a text is seen


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def ask(command: CommandLine, base: Path, out: Path, *more: str | Path, prompt: str = PROMPT) -> Finished:
    settings = ("--prompt", prompt, "--seed", str(SEED), "--steps", str(STEPS), "--guidance", str(GUIDANCE))
    return command("generate", *settings, "--base", base, "--out", out, *more)


def drawn(command: CommandLine, base: Path, out: Path, *more: str | Path, prompt: str = PROMPT) -> Image.Image:
    finished = ask(command, base, out, *more, prompt=prompt)
    assert finished.code == 0, finished.err
    return Image.open(out)


def levels(image: Image.Image) -> Pixels:
    return np.asarray(image, dtype=np.int16)


@pytest.fixture(scope="module")
def stock(tiny_base_folder: Path) -> StableDiffusionPipeline:
    return stock_pipeline(tiny_base_folder)


def stock_picture(pipeline: StableDiffusionPipeline, **prompts: object) -> Pixels:
    generator = torch.Generator("cpu").manual_seed(SEED)
    return levels(
        pipeline(**prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator).images[0]
    )


def test_it_is_drawn_as_stock_diffusers_draws_it(
    command: CommandLine, tiny_base_folder: Path, stock: StableDiffusionPipeline, tmp_path: Path
) -> None:
    image = drawn(command, tiny_base_folder, tmp_path / "a.png", "--negative-prompt", NEGATIVE)
    theirs = stock_picture(stock, prompt=PROMPT, negative_prompt=NEGATIVE)
    assert np.abs(levels(image) - theirs).max() <= LEVELS
    assert image.text["negative_prompt"] == NEGATIVE  # type: ignore[attr-defined]
    without = drawn(command, tiny_base_folder, tmp_path / "b.png")
    assert np.abs(levels(without) - theirs).max() > 5 * LEVELS
    assert np.abs(levels(without) - stock_picture(stock, prompt=PROMPT)).max() <= LEVELS
    assert image.text.keys() == without.text.keys()  # type: ignore[attr-defined]


def test_one_that_is_weighted_and_long_is_read_as_a_prompt_is(
    command: CommandLine, tiny_base_folder: Path, stock: StableDiffusionPipeline, tmp_path: Path
) -> None:
    negative = "a (blue:1.4) photo BREAK of a [cup]"
    more = ("--negative-prompt", negative, "--weighting", "a1111")
    image = drawn(command, tiny_base_folder, tmp_path / "a.png", *more)
    base = load_base_model(str(tiny_base_folder))
    texts = encode_prompts(base, base.text_limit, [Prompt(PROMPT), Prompt(negative, "a1111", 4)])
    states = [text.states for text in texts]
    assert len(states[1]) == 2 * len(states[0]), "BREAK begins a second chunk"
    # The stock pipeline wants both of one length: its own prompt twice is the same keys and values twice.
    theirs = stock_picture(
        stock, prompt_embeds=torch.cat([states[0]] * 2)[None], negative_prompt_embeds=states[1][None]
    )
    assert np.abs(levels(image) - theirs).max() <= LEVELS


def test_a_token_in_it_opens_no_gate(command: CommandLine, tiny_base_folder: Path, tmp_path: Path) -> None:
    shop = Shop(tiny_base_folder, load_base_model(str(tiny_base_folder)), Registry(LocalStore(tmp_path / "storage")))
    shop.publish("cup", 1)
    of_cup = ("--adapter", "cup", "--storage", shop.registry.store.url, "--gate")
    finished = ask(command, tiny_base_folder, tmp_path / "a.png", *of_cup, "--negative-prompt", "a sks cup")
    assert finished.code == 0
    assert "cup" in finished.err
    assert Image.open(tmp_path / "a.png").text["model"] == str(tiny_base_folder)  # type: ignore[attr-defined]
    with_token = drawn(command, tiny_base_folder, tmp_path / "b.png", *of_cup, prompt="a sks cup")
    assert with_token.text["model"].startswith("cup@")  # type: ignore[attr-defined]


def test_what_of_it_changes_nothing_is_said(command: CommandLine, tiny_base_folder: Path, tmp_path: Path) -> None:
    unguided = ("--guidance", "1", "--negative-prompt", NEGATIVE)
    finished = ask(command, tiny_base_folder, tmp_path / "a.png", *unguided)
    assert "warning: negative_prompt: changes nothing without guidance" in finished.err
    finished = ask(
        command, tiny_base_folder, tmp_path / "a.png", "--prompt-chunks", "1", "--negative-prompt", "cup " * 90
    )
    assert "of the negative prompt, and not" in finished.err
    finished = ask(command, tiny_base_folder, tmp_path / "a.png", "--negative-prompt", "<lora:cup:0.5>")
    assert "'<lora:cup:0.5>' is drawn as text" in finished.err


@pytest.mark.parametrize(
    ("negative", "said"),
    [("a\x07b", "negative_prompt: holds the control character '\\x07'"), ("(a:99)", "negative_prompt: ")],
)
def test_what_cannot_be_read_is_refused(
    command: CommandLine, tiny_base_folder: Path, tmp_path: Path, negative: str, said: str
) -> None:
    out = tmp_path / "a.png"
    assert_refused(ask(command, tiny_base_folder, out, "--negative-prompt", negative, "--weighting", "a1111"), said)
    assert not out.exists()
