"""`adapters import`: files that PEFT, diffusers and kohya tools wrote become revisions like any other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.integration.conftest import Published
from tests.support.tiny_jobs import CommandLine, assert_refused, open_registry, published_weights, stored_files

NAMED = ("--id", "guest", "--token", "sks", "--class-noun", "cup")


def exported(command: CommandLine, published: Published, fmt: str, out: Path) -> Path:
    finished = command("adapters", "export", "cup", "--format", fmt, "--out", out, "--storage", published.storage)
    assert finished.code == 0, finished.err
    return out


@pytest.mark.parametrize("fmt", ["diffusers", "peft", "kohya"])
def test_every_format_comes_in_as_it_went_out(
    published: Published, command: CommandLine, tmp_path: Path, fmt: str
) -> None:
    folder = exported(command, published, fmt, tmp_path / fmt)
    place = ("--base", published.base, "--storage", published.storage)
    finished = command("adapters", "import", folder, *NAMED, *place, "--json")
    assert finished.code == 0, finished.err
    guest = published_weights(published.storage, "guest")
    assert guest.digest() == published_weights(published.storage, "cup").digest()
    assert finished.json() == {
        "id": "guest",
        "revision": open_registry(published.storage).resolve("guest").revision,
        "rank": guest.rank,
    }
    assert command("adapters", "verify", "guest", "--storage", published.storage).code == 0
    before = stored_files(published.storage)
    assert command("adapters", "import", folder, *NAMED, *place, "--json").json() == finished.json()
    assert stored_files(published.storage) == before


def test_what_peft_trained_with_its_own_scale_draws_the_same_here(
    published: Published, command: CommandLine, tmp_path: Path
) -> None:
    """Oracle: the stock pipeline with the U-Net that PEFT itself loads from that folder."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel.from_pretrained(published.base / "unet")
    model = get_peft_model(
        unet, LoraConfig(r=3, lora_alpha=12, use_rslora=True, init_lora_weights=False, target_modules=["to_q", "to_v"])
    )
    model.save_pretrained(str(tmp_path / "peft"))
    place = ("--base", published.base, "--storage", published.storage)
    finished = command("adapters", "import", tmp_path / "peft", *NAMED, *place)
    assert finished.code == 0, finished.err
    assert "not measured" in finished.err
    drawing = ("--prompt", "a sks cup", "--seed", "3", "--steps", "4", "--guidance", "2")
    out = tmp_path / "ours.png"
    drawn = command("generate", *drawing, "--adapter", "guest", "--out", out, "--storage", published.storage)
    assert drawn.code == 0, drawn.err
    pipeline = StableDiffusionPipeline.from_pretrained(published.base, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.unet = model.merge_and_unload()
    generator = torch.Generator("cpu").manual_seed(3)
    pictures = pipeline("a sks cup", num_inference_steps=4, guidance_scale=2.0, generator=generator, output_type="np")
    difference = np.abs(np.asarray(Image.open(out), dtype=np.float64) / 255 - pictures.images[0])
    assert difference.max() < 3 / 255


def test_with_photos_it_is_measured_and_can_be_measured_again(
    published: Published, command: CommandLine, tmp_path: Path, photos: Path, judge_folder: Path
) -> None:
    folder = exported(command, published, "kohya", tmp_path / "kohya")
    place = ("--base", published.base, "--storage", published.storage)
    refused = command("adapters", "import", folder, *NAMED, *place, "--photos", photos)
    assert_refused(refused, "openai/clip-vit-base-patch32")
    settings = ("--photos", photos, "--judge", judge_folder, "--images-per-prompt", "1")
    finished = command("adapters", "import", folder, *NAMED, *place, *settings)
    assert finished.code == 0, finished.err
    manifest = open_registry(published.storage).resolve("guest")
    assert (manifest.method, manifest.targets) == ("imported", "as imported")
    assert manifest.metrics is not None
    again = command("evaluate", "guest", "--storage", published.storage, "--json")
    assert again.code == 0, again.err
    assert again.json()["kps"] == pytest.approx(manifest.metrics["kps"], abs=1e-6)
    shown = json.loads(command("adapters", "show", "guest", "--storage", published.storage).out)
    assert shown["spec"]["source"].endswith(".safetensors")
    assert str(tmp_path) not in json.dumps(shown["spec"])


def test_a_file_with_a_text_encoder_comes_in_whole_or_its_unet_part_alone_when_asked(
    published: Published, command: CommandLine, tmp_path: Path
) -> None:
    whole = next(exported(command, published, "kohya", tmp_path / "kohya").glob("*.safetensors"))
    layer = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    text = {f"{layer}.lora_down.weight": torch.ones(2, 16), f"{layer}.lora_up.weight": torch.ones(32, 2)}
    save_file({**load_file(whole), **text}, tmp_path / "both.safetensors")
    place = ("--base", published.base, "--storage", published.storage)
    assert command("adapters", "import", tmp_path / "both.safetensors", *NAMED, *place).code == 0
    assert [name for name in published_weights(published.storage, "guest").layers if name.startswith("text")] == [
        "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    ]
    finished = command("adapters", "import", tmp_path / "both.safetensors", *NAMED, *place, "--unet-only", "--json")
    assert finished.code == 0, finished.err
    assert "left out the text-encoder part: 2 tensors" in finished.err
    assert finished.json()["left_out"] == sorted(text)
    assert open_registry(published.storage).resolve("guest").training["left_out"] == sorted(text)
    guest = published_weights(published.storage, "guest")
    assert guest.digest() == published_weights(published.storage, "cup").digest()


def test_measuring_one_that_came_without_photos_says_what_to_do(
    published: Published, command: CommandLine, tmp_path: Path
) -> None:
    folder = exported(command, published, "diffusers", tmp_path / "diffusers")
    command("adapters", "import", folder, *NAMED, "--base", published.base, "--storage", published.storage)
    finished = command("evaluate", "guest", "--storage", published.storage, "--judge", "pocket")
    assert_refused(finished, "holds no photos of 'sks'", "--photos")


def test_files_that_are_not_applied_are_refused_by_name_and_leave_nothing(
    published: Published, command: CommandLine, tmp_path: Path
) -> None:
    good = load_file(next(exported(command, published, "kohya", tmp_path / "kohya").glob("*.safetensors")))
    some = next(iter(good))
    name = some.split(".")[0]
    bad = {
        "text encoder": {**good, "lora_te_text_model_encoder_layers_9_mlp_fc1.lora_down.weight": torch.ones(2, 16)},
        "DoRA": {**good, f"{name}.dora_scale": torch.ones(8)},
        "LoHa": {f"{name}.hada_w1_a": torch.ones(2, 2)},
        "LoKr": {f"{name}.lokr_w1": torch.ones(2, 2)},
        "convolution": {**good, f"{name}.lora_down.weight": torch.ones(2, 8, 3, 3)},
        "not finite": {**good, some: torch.full_like(good[some], float("nan"))},
        "other base model": {**good, "lora_unet_nowhere.lora_down.weight": torch.ones(2, 8)},
    }
    before = stored_files(published.storage)
    for kind, tensors in bad.items():
        path = tmp_path / f"{kind}.safetensors"
        save_file(tensors, path)
        finished = command("adapters", "import", path, *NAMED, "--base", published.base, "--storage", published.storage)
        word = {"text encoder": "text-encoder", "other base model": "is no layer of this base model"}.get(kind, kind)
        assert_refused(finished, path.name, word)
    pickle = tmp_path / "old.ckpt"
    pickle.write_bytes(b"\x80\x04.")
    for path, word in ((pickle, "pickle"), (tmp_path / "nothing.safetensors", "cannot be read")):
        assert_refused(command("adapters", "import", path, *NAMED, "--storage", published.storage), word)
    assert stored_files(published.storage) == before


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        (("--id", "No Good"), ("id",)),
        (("--token", "two words"), ("token", "one word")),
        (("--token", "cup"), ("token",)),
        (("--token", "sks", "--token", "zwx"), ("2 tokens and 1 class nouns", "one class noun per token")),
        (("--token", "sks", "--token", "SKS", "--class-noun", "cup", "--class-noun", "mug"), ("same token",)),
    ],
)
def test_bad_names_are_refused(
    published: Published, command: CommandLine, tmp_path: Path, changed: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    folder = exported(command, published, "diffusers", tmp_path / "diffusers")
    given = [word for i in range(0, len(NAMED), 2) if NAMED[i] not in changed for word in NAMED[i : i + 2]]
    finished = command(
        "adapters", "import", folder, *given, *changed, "--base", published.base, "--storage", published.storage
    )
    assert_refused(finished, *parts)
