"""Adapter files that are damaged, foreign or of another base: each refused, and the message says why."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save, save_file
from torch import Tensor, nn

from cat_cluster.errors import AdapterFormatError, AdapterMismatchError, OutputError
from cat_cluster.lora.formats import (
    AdapterFormat,
    AdapterWeights,
    LoraLayer,
    check_fits,
    read_adapter,
    to_safetensors,
    write_adapter,
)

WeightsFactory = Callable[..., AdapterWeights]
FORMATS: tuple[AdapterFormat, ...] = ("diffusers", "peft", "kohya")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"


def scramble(model: nn.Module) -> None:
    """Give every adapter parameter a value, as training would."""
    generator = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "hada_", "lokr_")):
            with torch.no_grad():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (LoraConfig(r=2, target_modules=ATTENTION, use_dora=True), "DoRA"),
        (LoHaConfig(r=2, target_modules=ATTENTION), "LoHa"),
        (LoKrConfig(r=2, target_modules=ATTENTION), "LoKr"),
        (LoraConfig(r=2, target_modules=["conv1", "to_q"]), "convolution"),
        (LoraConfig(r=2, target_modules=["to_out.0"], bias="lora_only"), "bias"),
        (LoraConfig(r=2, target_modules=ATTENTION, lora_bias=True), "bias"),
        (LoraConfig(r=2, target_modules=ATTENTION, modules_to_save=["conv_out"]), "conv_out|trained modules"),
        (LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights="pissa"), "pissa"),
    ],
)
def test_parts_that_are_not_applied_are_refused_by_name(
    one_unet: UNet2DConditionModel, config: Any, says: str, tmp_path: Path
) -> None:
    model = get_peft_model(one_unet, config)
    scramble(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterFormatError, match=says):
        read_adapter(tmp_path, unet=None)


@pytest.mark.parametrize(("flag", "says"), [("use_dora", "DoRA"), ("bias", "bias"), ("peft_type", "peft_type")])
def test_a_config_alone_is_reason_enough(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory, flag: str, says: str, tmp_path: Path
) -> None:
    write_adapter(make_weights(one_unet), tmp_path, "peft", adapter_id="a", metadata={})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, flag: "LOHA" if flag == "peft_type" else "all"})
    )
    with pytest.raises(AdapterFormatError, match=says):
        read_adapter(tmp_path, unet=one_unet)


def test_a_file_with_a_text_encoder_part_is_refused(tiny_base_folder: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base_folder)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=ATTENTION))
    pipeline.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    text_layers = get_peft_model_state_dict(pipeline.text_encoder)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        text_encoder_lora_layers=text_layers,
    )
    with pytest.raises(AdapterFormatError, match=r"text_encoder\..*text-encoder part"):
        read_adapter(tmp_path, unet=pipeline.unet)
    save_file(text_layers, tmp_path / "text.safetensors")
    with pytest.raises(AdapterFormatError, match="text-encoder part"):
        read_adapter(tmp_path / "text.safetensors")


def pair(prefix: str, *, rank: int = 2, size: int = 8) -> dict[str, Tensor]:
    return {f"{prefix}.lora_A.weight": torch.ones(rank, size), f"{prefix}.lora_B.weight": torch.ones(size, rank)}


CONFIG_OF_NO_OBJECT = save(pair(f"unet.{QUERY}"), {"lora_adapter_metadata": "[1]"})


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a whole safetensors file"),
        (b"\x80\x02}q\x00.", "pickle files are never read"),
        (b"PK\x03\x04" + bytes(200), "not a whole safetensors file"),
        (save({}), "holds no LoRA layers"),
        (save({**pair(f"unet.{QUERY}"), "lora_te_text_model_x.lora_down.weight": torch.ones(1, 1)}), "text-encoder"),
        (save({"lora_te1_x.lora_down.weight": torch.ones(1, 1)}), "text-encoder"),
        (save({"lora_unet_conv_in.lora_down.weight": torch.ones(1, 4, 3, 3)}), "convolution"),
        (save({f"{QUERY}.dora_scale": torch.ones(8)}), "DoRA"),
        (save({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}), "LoHa"),
        (save({"lora_unet_x.lokr_w1": torch.ones(2, 2)}), "LoKr"),
        (save({"unet.conv_in.weight": torch.ones(2, 2)}), "is not a LoRA weight"),
        (save({f"unet.{QUERY}.lora_A.weight": torch.ones(2, 8)}), "lacks its up weight"),
        (save({f"unet.{QUERY}.lora_B.weight": torch.ones(8, 2)}), "lacks its down weight"),
        (save({**pair(QUERY), f"{QUERY}.lora_B.weight": torch.ones(8, 3)}), "rank 2 in its down weight and 3"),
        (save(pair(QUERY, rank=0)), "rank 0"),
        (save({key: value.int() for key, value in pair(QUERY).items()}), "is not a LoRA weight"),
        (save({**pair(QUERY), **pair(f"unet.{QUERY}")}), "the same weight"),
        (save({**pair(QUERY), f"{QUERY}.alpha": torch.ones(3)}), "not one number"),
        (save({**pair(QUERY), f"{QUERY}.alpha": torch.tensor(math.nan)}), "not finite"),
        (save({**pair(QUERY), "elsewhere.alpha": torch.tensor(1.0)}), "no LoRA weights beside it"),
        (save(pair(f"base_model.model.{QUERY}")), "adapter_config.json"),
        (CONFIG_OF_NO_OBJECT, "not a JSON object"),
        (save(pair(QUERY), {"lora_adapter_metadata": "{"}), "not JSON"),
        (save(pair(QUERY), {"lora_adapter_metadata": '{"lora_alpha": "x"}'}), "lora_alpha"),
        (save(pair(QUERY), {"lora_adapter_metadata": '{"alpha_pattern": {"(": 1}}'}), "alpha_pattern"),
    ],
)
def test_damaged_or_foreign_bytes_are_refused(one_unet: UNet2DConditionModel, data: bytes, says: str) -> None:
    with pytest.raises(AdapterFormatError, match=says):
        read_adapter(data, unet=one_unet)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_truncated_or_flipped_file_is_refused_or_read_but_never_crashes(data: st.DataObject) -> None:
    whole = save({**pair(QUERY), f"{QUERY}.alpha": torch.tensor(2.0)}, {"lora_adapter_metadata": '{"r": 2}'})
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(AdapterFormatError, match="not a whole safetensors file"):
        read_adapter(whole[:cut])
    flipped = bytearray(whole)
    flipped[cut] ^= data.draw(st.integers(1, 255))
    try:
        read_adapter(bytes(flipped)).check_finite()
    except AdapterFormatError as error:
        assert str(error)  # noqa: PT017 (either outcome is right; only another exception is not)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["down", "up"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_values_that_are_not_finite_are_refused_naming_the_layer(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory, fmt: AdapterFormat, side: str, value: float
) -> None:
    weights = make_weights(one_unet)
    getattr(weights.layers[OUT], side)[0, 0] = value
    with pytest.raises(AdapterFormatError, match=OUT):
        read_adapter(to_safetensors(weights, fmt, {}), unet=one_unet)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ({"down_blocks.9.attn1.to_q": (8, 8)}, "down_blocks.9.attn1.to_q"),
        ({"conv_in": (4, 8)}, "conv_in is not a linear"),
        ({QUERY: (9, 8)}, rf"{QUERY}.*\(8, 8\).*\(9, 8\)"),
        ({QUERY: (8, 9)}, rf"{QUERY}.*\(8, 8\).*\(8, 9\)"),
    ],
)
@pytest.mark.parametrize("fmt", FORMATS)
def test_an_adapter_of_another_base_is_refused_naming_the_layer(
    one_unet: UNet2DConditionModel, fmt: AdapterFormat, layers: Mapping[str, tuple[int, int]], says: str
) -> None:
    weights = AdapterWeights(
        {name: LoraLayer(torch.ones(2, size[0]), torch.ones(size[1], 2)) for name, size in layers.items()}
    )
    with pytest.raises(AdapterMismatchError, match=re.sub(r"\.(?!\*)", "[._]", says)):
        read_adapter(to_safetensors(weights, fmt, {}), unet=one_unet)
    with pytest.raises(AdapterMismatchError, match=says):
        check_fits(weights, one_unet)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".pth"])
def test_pickle_files_are_refused_unopened(suffix: str, tmp_path: Path) -> None:
    torch.save(pair(QUERY), tmp_path / f"lora{suffix}")
    with pytest.raises(AdapterFormatError, match="pickle"):
        read_adapter(tmp_path / f"lora{suffix}")
    with pytest.raises(AdapterFormatError, match=r"no \.safetensors file"):
        read_adapter(tmp_path)
    (tmp_path / "renamed.safetensors").write_bytes((tmp_path / f"lora{suffix}").read_bytes())
    with pytest.raises(AdapterFormatError, match="not a whole safetensors file"):
        read_adapter(tmp_path)


def test_paths_that_name_no_one_adapter_are_refused(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory, tmp_path: Path
) -> None:
    weights = make_weights(one_unet)
    with pytest.raises(AdapterFormatError, match="cannot be read"):
        read_adapter(tmp_path / "none.safetensors")
    for adapter_id in ("one", "two"):
        write_adapter(weights, tmp_path, "kohya", adapter_id=adapter_id, metadata={})
    with pytest.raises(AdapterFormatError, match=r"one\.safetensors, two\.safetensors"):
        read_adapter(tmp_path, unet=one_unet)
    with pytest.raises(AdapterFormatError, match="kohya file: reading it needs the base"):
        read_adapter(tmp_path / "one.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_adapter(weights, tmp_path / "file" / "in", "diffusers", adapter_id="a", metadata={})
    with pytest.raises(AdapterFormatError, match="without layers"):
        to_safetensors(AdapterWeights({}), "peft", {})
    with pytest.raises(AdapterFormatError, match="choose one of diffusers, peft, kohya"):
        to_safetensors(weights, "pickle", {})  # type: ignore[arg-type]


def test_an_unreadable_config_is_refused(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory, tmp_path: Path
) -> None:
    write_adapter(make_weights(one_unet), tmp_path, "peft", adapter_id="a", metadata={})
    (tmp_path / "adapter_config.json").write_bytes(b"\xff{")
    with pytest.raises(AdapterFormatError, match=r"adapter_config\.json"):
        read_adapter(tmp_path)
