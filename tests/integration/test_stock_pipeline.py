"""An adapter trained by the workflow, exported and drawn by the stock libraries: the same pictures as ours.

Tolerance: our PNGs are 8-bit, so a pixel may round to the neighbouring level: at most 1 of 255.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from peft import PeftModel
from PIL import Image

from cat_cluster.lora.bank import LoraBank
from cat_cluster.lora.formats import read_adapter
from cat_cluster.models.base_model import load_base_model
from tests.integration.conftest import Published
from tests.support.tiny_jobs import CommandLine, adapter, published_weights, write_photos, write_spec

POCKET = Path(__file__).parents[2] / "cat_cluster" / "models" / "pocket" / "weights"
PROMPT, SEED, STEPS, GUIDANCE = "a photo of a sks cup", 11, 5, 4.0
SETTINGS = ("--prompt", PROMPT, "--seed", str(SEED), "--steps", str(STEPS), "--guidance", str(GUIDANCE))
LEVELS = 1  # of 255

Pixels = NDArray[np.int16]


def drawn(command: CommandLine, out: Path, *arguments: str | Path) -> Pixels:
    """The picture that `cat-cluster generate` writes."""
    finished = command("generate", *SETTINGS, "--out", out, *arguments)
    assert finished.code == 0, finished.err
    return np.asarray(Image.open(out), dtype=np.int16)


def stock_picture(base: Path, lora: Path | None = None) -> Pixels:
    """The picture of a stock pipeline as a user builds it, with the sampler that we use by default."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    if lora is not None:
        pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    image = pipeline(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator("cpu").manual_seed(SEED),
    ).images[0]
    return np.asarray(image, dtype=np.int16)


def exported(command: CommandLine, storage: Path, fmt: str, out: Path) -> Path:
    """The weights file that `cat-cluster adapters export` writes."""
    finished = command("adapters", "export", "cup", "--format", fmt, "--out", out, "--storage", storage)
    assert finished.code == 0, finished.err
    [path] = out.glob("*.safetensors")
    return path


@pytest.mark.parametrize("fmt", ["diffusers", "kohya"])
def test_a_stock_pipeline_draws_our_picture(
    published: Published, command: CommandLine, tmp_path: Path, fmt: str
) -> None:
    ours = drawn(command, tmp_path / "ours.png", "--adapter", "cup", "--storage", published.storage)
    lora = exported(command, published.storage, fmt, tmp_path / fmt)
    assert np.abs(ours - stock_picture(published.base, lora)).max() <= LEVELS
    bare = drawn(command, tmp_path / "bare.png", "--base", published.base)
    assert np.abs(bare - stock_picture(published.base)).max() <= LEVELS
    assert np.abs(ours - bare).max() > 10 * LEVELS, "the adapter does nothing, so nothing was compared"


def test_an_adapter_of_sdxl_draws_our_picture_in_a_stock_pipeline(
    command: CommandLine, tiny_xl_folder: Path, judge_folder: Path, tmp_path: Path
) -> None:
    """The whole way: a spec, training, evaluation, the registry, an export, and diffusers' own pipeline for SDXL."""
    photos = write_photos(tmp_path / "photos")
    evaluation = {"prompts": ["a picture of a {}"], "images_per_prompt": 2, "steps": 2, "judge": str(judge_folder)}
    training = {"steps": 4, "learning_rate": 0.3}
    spec = write_spec(
        tmp_path / "spec.yaml", tiny_xl_folder, [adapter("cup", photos)], training=training, evaluation=evaluation
    )
    checked = command("spec", "check", spec, "--json")
    assert checked.code == 0, checked.err
    storage = tmp_path / "storage"
    trained = command("train", "--in-process", spec, "--storage", storage, "--json")
    assert trained.code == 0, trained.err
    assert trained.json()["adapters"][0]["metrics"]["base_drift"] > 0
    ours = drawn(command, tmp_path / "ours.png", "--adapter", "cup", "--storage", storage)
    bare = drawn(command, tmp_path / "bare.png", "--base", tiny_xl_folder)
    assert np.abs(bare - stock_picture(tiny_xl_folder)).max() <= LEVELS
    for fmt in ("diffusers", "kohya"):
        lora = exported(command, storage, fmt, tmp_path / fmt)
        assert np.abs(ours - stock_picture(tiny_xl_folder, lora)).max() <= LEVELS, fmt
    assert np.abs(ours - bare).max() > 10 * LEVELS, "the adapter does nothing, so nothing was compared"


def test_peft_applies_our_export_as_our_bank_does(published: Published, command: CommandLine, tmp_path: Path) -> None:
    folder = exported(command, published.storage, "peft", tmp_path / "peft").parent
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 77, 16, generator=generator)
    timesteps = torch.tensor([5, 400, 900])
    theirs = PeftModel.from_pretrained(UNet2DConditionModel.from_pretrained(published.base / "unet"), str(folder))
    base = load_base_model(str(published.base))
    weights = published_weights(published.storage, "cup")
    bank = LoraBank.attach(base.unet, layers=list(weights.layers))
    bank.load(1, weights)
    with torch.no_grad():
        expected = theirs.eval()(latents, timesteps, text).sample
        with bank.rows([1, 1, 1]):
            ours = base.unet(latents, timesteps, text).sample
        with bank.rows([0, 0, 0]):
            bare = base.unet(latents, timesteps, text).sample
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert float((ours - bare).abs().max()) > 1e-3


@pytest.mark.parametrize("fmt", ["diffusers", "peft", "kohya"])
def test_every_export_reads_back_as_what_was_published(
    published: Published, command: CommandLine, tmp_path: Path, fmt: str
) -> None:
    path = exported(command, published.storage, fmt, tmp_path / fmt)
    unet = load_base_model(str(published.base)).unet
    assert read_adapter(path, unet=unet).digest() == published_weights(published.storage, "cup").digest()


def test_pocket_is_a_stock_folder(command: CommandLine, tmp_path: Path) -> None:
    """`base path pocket` prints a folder that StableDiffusionPipeline.from_pretrained runs, and draws our picture."""
    finished = command("base", "path", "pocket")
    assert (finished.code, finished.out) == (0, f"{POCKET}\n")
    bare = drawn(command, tmp_path / "bare.png")
    assert np.abs(bare - stock_picture(POCKET)).max() <= LEVELS
    assert bare.std() > 5, "an empty picture was compared"


def test_an_adapter_of_pocket_draws_our_picture_in_a_stock_pipeline(command: CommandLine, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", side=64)
    training = {"steps": 4, "learning_rate": 0.01}
    spec = write_spec(tmp_path / "spec.yaml", "pocket", [adapter("cup", photos)], training=training)
    storage = tmp_path / "storage"
    trained = command("train", "--in-process", spec, "--storage", storage, "--json")
    assert trained.code == 0, trained.err
    shown = json.loads(command("adapters", "show", "cup", "--storage", storage).out)
    assert shown["base_name"] == "pocket"
    ours = drawn(command, tmp_path / "ours.png", "--adapter", "cup", "--storage", storage)
    bare = drawn(command, tmp_path / "bare.png")
    assert np.abs(ours - bare).max() > 10 * LEVELS
    for fmt in ("diffusers", "kohya"):
        lora = exported(command, storage, fmt, tmp_path / fmt)
        assert np.abs(ours - stock_picture(POCKET, lora)).max() <= LEVELS, fmt
