"""`adapters import` of what is not a plain LoRA: what it leaves out and how near it comes is said, and kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from cat_cluster.lora.formats import UNSUPPORTED, read_foreign
from cat_cluster.models.base_model import load_base_model
from tests.support.tiny_jobs import (
    CommandLine,
    Finished,
    assert_refused,
    open_registry,
    published_weights,
    stored_files,
)

pytestmark = pytest.mark.slow

QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
KEY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
ELSEWHERE = "lora_te2_text_model_encoder_layers_0_mlp_fc1"  # of a text encoder that the base does not have
NAMED = ("--id", "guest", "--token", "sks", "--class-noun", "cup")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture
def mixed(tiny_base_folder: Path, tmp_path: Path) -> Path:
    """A file of a LoHa, a LoKr, a 3x3 convolution, a text encoder, and a text encoder of another base."""
    unet = UNet2DConditionModel.from_pretrained(tiny_base_folder / "unet")
    width, text = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.shape
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {f"{QUERY}.hada_{w}_a": normal(8, 3) for w in ("w1", "w2")}
    tensors |= {f"{QUERY}.hada_{w}_b": normal(3, 8) for w in ("w1", "w2")}
    tensors |= {f"{KEY}.lokr_w1": normal(2, 2), f"{KEY}.lokr_w2": normal(width // 2, text // 2)}
    tensors |= {f"{CONV}.lora_down.weight": normal(2, 8, 3, 3), f"{CONV}.lora_up.weight": normal(8, 2, 1, 1)}
    for layer in (TEXT, ELSEWHERE):
        tensors |= {f"{layer}.lora_down.weight": normal(2, 16), f"{layer}.lora_up.weight": normal(32, 2)}
    path = tmp_path / "mixed.safetensors"
    save_file(tensors, path)
    return path


def imported(command: CommandLine, file: Path, base: Path, storage: Path, *options: str) -> Finished:
    return command("adapters", "import", file, *NAMED, "--base", base, "--storage", storage, *options)


def test_what_is_left_out_and_how_near_the_lora_is_are_told_and_kept(
    command: CommandLine, mixed: Path, tiny_base_folder: Path, tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    options = ("--rank", "2", "--skip-unsupported", "--json")
    finished = imported(command, mixed, tiny_base_folder, storage, *options)
    assert finished.code == 0, finished.err
    found = read_foreign(mixed, unet=load_base_model(str(tiny_base_folder)).network, skip=UNSUPPORTED, rank=2)
    manifest = open_registry(storage).resolve("guest")
    assert published_weights(storage, "guest").digest() == found.weights.digest()
    assert any(name.startswith("text_encoder.") for name in found.weights.layers)
    assert manifest.text_layers == 1
    left_out = sorted(key for key in load_file(mixed) if key.startswith((CONV, ELSEWHERE)))
    kinds = {"the text-encoder part": 2, "convolution layers larger than 1x1": 2}
    told = finished.json()
    errors = {name: one.relative_error for name, one in found.reductions.items()}
    worst = max(errors, key=errors.__getitem__)
    assert (told["id"], told["revision"], told["rank"]) == ("guest", manifest.revision, 2)
    assert told["left_out"] == manifest.training["left_out"] == left_out
    assert told["left_out_kinds"] == manifest.training["left_out_kinds"] == kinds
    assert told["reduced"] == manifest.training["reduced"]
    assert told["reduced"]["layers"] == pytest.approx(errors)
    assert (told["reduced"]["rank"], told["reduced"]["worst_layer"]) == (2, worst)
    assert manifest.spec["rank"] == 2
    for line in (
        "left out the text-encoder part: 2 tensors",
        "left out convolution layers larger than 1x1: 2 tensors",
        f"left out in all: 4 tensors, the first {left_out[0]}, and the manifest names each",
        f"2 layers as the nearest LoRA of rank 2; relative error {told['reduced']['relative_error']:.2%} in all, "
        f"at most {errors[worst]:.2%} ({worst})",
    ):
        assert line in finished.err
    before = stored_files(storage)
    assert imported(command, mixed, tiny_base_folder, storage, *options).json() == told
    assert stored_files(storage) == before, "the same file with the same settings was published twice"
    other = imported(command, mixed, tiny_base_folder, storage, "--rank", "1", "--skip-unsupported", "--json").json()
    assert (other["reduced"]["rank"], other["revision"] != told["revision"]) == (1, True)


def test_without_the_options_each_is_refused_with_its_remedy_and_nothing_is_published(
    command: CommandLine, mixed: Path, tiny_base_folder: Path, tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    for options, told in (
        ((), (ELSEWHERE, "is a text-encoder part", "--unet-only")),
        (("--unet-only",), (CONV, "is a convolution layer larger than 1x1", "--skip-unsupported")),
        (("--skip-unsupported",), ("holds 1 LoHa layers", QUERY, "--rank")),
        (("--rank", "0", "--skip-unsupported"), ("--rank", "greater than or equal to 1")),
    ):
        finished = imported(command, mixed, tiny_base_folder, storage, *options)
        assert finished.code != 0
        for words in told:
            assert words in finished.err
    assert not storage.exists() or not stored_files(storage)


def test_a_text_encoders_part_comes_in_and_is_left_out_where_the_unet_alone_is_asked_for(
    command: CommandLine, tiny_base_folder: Path, tmp_path: Path
) -> None:
    layers = {QUERY: (8, 8), TEXT: (16, 32)}
    tensors = {f"{layer}.lora_down.weight": torch.ones(2, sizes[0]) for layer, sizes in layers.items()}
    tensors |= {f"{layer}.lora_up.weight": torch.ones(sizes[1], 2) for layer, sizes in layers.items()}
    save_file(tensors, tmp_path / "both.safetensors")
    place = (tmp_path / "both.safetensors", tiny_base_folder, tmp_path / "storage")
    whole = imported(command, *place)
    assert "left out" not in whole.err
    assert [name.split(".")[0] for name in published_weights(tmp_path / "storage", "guest").layers] == [
        "down_blocks",
        "text_encoder",
    ]
    assert open_registry(tmp_path / "storage").resolve("guest").training["text_encoder_layers"] == 1
    first = open_registry(tmp_path / "storage").resolve("guest").revision
    imported(command, *place, "--unet-only")
    manifest = open_registry(tmp_path / "storage").resolve("guest")
    assert manifest.revision != first, "a part of the file was taken for all of it"
    assert manifest.training["left_out"] == sorted(key for key in tensors if key.startswith(TEXT))
    assert "text_encoder_layers" not in manifest.training
    assert manifest.text_layers == 0
    assert list(published_weights(tmp_path / "storage", "guest").layers) == [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    ]


def test_a_file_of_another_family_is_refused_by_name_and_nothing_is_published(
    command: CommandLine, tiny_base_folder: Path, tmp_path: Path
) -> None:
    tensors = {f"{KEY}.lora_down.weight": torch.ones(2, 2048), f"{KEY}.lora_up.weight": torch.ones(8, 2)}
    save_file({**tensors, f"{TEXT}.alpha": torch.tensor(1.0)}, tmp_path / "xl.safetensors")
    refused = imported(command, tmp_path / "xl.safetensors", tiny_base_folder, tmp_path / "storage")
    told = (
        "xl.safetensors was made for Stable Diffusion XL",
        "the base model is Stable Diffusion 1.x or 2.x",
        "--base",
    )
    assert_refused(refused, *told)
    assert not (tmp_path / "storage").exists() or not stored_files(tmp_path / "storage")


def test_left_out_is_an_empty_list_where_there_was_nothing(
    command: CommandLine, tiny_base_folder: Path, tmp_path: Path
) -> None:
    tensors = {f"{QUERY}.lora_down.weight": torch.ones(2, 8), f"{QUERY}.lora_up.weight": torch.ones(8, 2)}
    save_file(tensors, tmp_path / "plain.safetensors")
    plain = (tmp_path / "plain.safetensors", tiny_base_folder, tmp_path / "storage")
    told = imported(command, *plain, "--skip-unsupported", "--json").json()
    assert (told["left_out"], told["left_out_kinds"], "reduced" in told) == ([], {}, False)
    again = imported(command, *plain, "--json").json()
    assert again == {key: told[key] for key in ("id", "revision", "rank")}, "an option that did nothing made a revision"
    refused = imported(command, *plain, "--rank", "2")
    assert_refused(refused, "no LoHa or LoKr layers, which --rank is for: leave it out")


def test_a_base_that_is_named_by_a_relative_path_is_found_from_other_folders(
    command: CommandLine, tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"{QUERY}.lora_down.weight": torch.ones(2, 8), f"{QUERY}.lora_up.weight": torch.ones(8, 2)}
    save_file(tensors, tmp_path / "plain.safetensors")
    monkeypatch.chdir(tiny_base_folder.parent)
    relative = Path(tiny_base_folder.name)
    finished = imported(command, tmp_path / "plain.safetensors", relative, tmp_path / "storage")
    assert finished.code == 0, finished.err
    assert open_registry(tmp_path / "storage").resolve("guest").base_name == str(tiny_base_folder)
