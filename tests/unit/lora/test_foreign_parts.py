"""What is not applied is refused by name, and left out, named and counted where that was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from cat_cluster.errors import AdapterFormatError
from cat_cluster.lora.formats import (
    BIAS,
    CONVOLUTION,
    DORA,
    TEXT_ENCODER,
    UNSUPPORTED,
    read_adapter,
    read_foreign,
)
from tests.unit.lora.conftest import WeightsFactory
from tests.unit.lora.test_formats import ATTENTION, assert_same, bank_predicts, close, kohya_tensors, predict, scramble

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"


def locon(prefix: str) -> dict[str, Tensor]:
    """What kohya's trainer writes of a 3x3 convolution with conv_dim."""
    return {
        f"{prefix}.lora_down.weight": torch.ones(2, 8, 3, 3),
        f"{prefix}.lora_up.weight": torch.ones(8, 2, 1, 1),
        f"{prefix}.alpha": torch.tensor(1.0),
    }


def test_everything_that_is_not_applied_is_left_out_named_and_counted(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory
) -> None:
    weights = make_weights(one_unet, targets="attention_ff")
    applied = kohya_tensors(weights, [4.0], torch.float32)
    text = {f"{TEXT}.{part}": torch.ones(2, 2) for part in ("lora_down.weight", "lora_up.weight")}
    tucker = {f"{CONV[:-1]}2.lora_mid.weight": torch.ones(2, 2, 3, 3)}
    others = {
        "bundle_emb.sks.clip_l": torch.ones(1, 8),
        "lora_unet_conv_in.diff": torch.ones(8, 4, 3, 3),
        "lora_unet_conv_in.diff_b": torch.ones(8),
        f"lora_unet_{QUERY.replace('.', '_')}.oft_blocks": torch.ones(2, 2, 2),
    }
    magnitudes = {f"lora_unet_{QUERY.replace('.', '_')}.dora_scale": torch.ones(8, 1)}
    foreign = {**text, **locon(CONV), **tucker, **others, **magnitudes}
    data = save({**applied, **foreign})
    for kinds, key in (
        (UNSUPPORTED - {CONVOLUTION}, CONV),
        (UNSUPPORTED - {DORA}, "dora_scale"),
        (UNSUPPORTED - {TEXT_ENCODER}, TEXT),
        (UNSUPPORTED - {BIAS}, "diff_b"),
    ):
        with pytest.raises(AdapterFormatError, match=rf"{key}.* is .*, which cat-cluster does not apply: .*--\w+"):
            read_foreign(data, unet=one_unet, skip=kinds)
    found = read_foreign(data, unet=one_unet, skip=UNSUPPORTED)
    assert_same(found.weights, weights)
    assert found.left_out.names == sorted(foreign)
    assert found.left_out.counts == {
        "DoRA magnitudes, of layers that are plain LoRA without them": 1,
        "OFT weights": 1,
        "biases": 1,
        "convolution layers larger than 1x1": 3,
        "embeddings": 1,
        "layers in Tucker decomposition": 1,
        "the text-encoder part": 2,
        "whole trained layers": 1,
    }


def test_what_nobody_knows_is_never_left_out(one_unet: UNet2DConditionModel, make_weights: WeightsFactory) -> None:
    applied = kohya_tensors(make_weights(one_unet), [4.0], torch.float32)
    unknown = {"lora_unet_conv_out.something": torch.ones(2)}
    with pytest.raises(AdapterFormatError, match=r"conv_out\.something is not a LoRA weight"):
        read_foreign(save({**applied, **unknown}), unet=one_unet, skip=UNSUPPORTED)


def test_a_file_of_which_nothing_is_left_is_refused(one_unet: UNet2DConditionModel) -> None:
    with pytest.raises(AdapterFormatError, match="only convolution layers larger than 1x1: choose another file"):
        read_foreign(save(locon(CONV)), unet=one_unet, skip=UNSUPPORTED)
    with pytest.raises(AdapterFormatError, match="holds a text-encoder part alone"):
        read_foreign(save({f"{TEXT}.alpha": torch.tensor(1.0)}), unet=one_unet, skip=UNSUPPORTED)


@pytest.mark.parametrize("written", ["dora_scale", "magnitude"])
def test_magnitudes_of_other_trainers_are_left_out_of_their_layers(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory, written: str
) -> None:
    weights = make_weights(one_unet, targets="attention_ff", convolutions=True)
    tensors = kohya_tensors(weights, [4.0], torch.float32)
    for prefix in {key.split(".")[0] for key in tensors}:
        tensors[f"{prefix}.{written}"] = torch.ones(8, 1)
    with pytest.raises(AdapterFormatError, match=rf"{written} is DoRA weights.*--skip-unsupported"):
        read_adapter(save(tensors), unet=one_unet)
    found = read_foreign(save(tensors), unet=one_unet, skip={DORA})
    assert_same(found.weights, weights)
    assert found.left_out.counts == {DORA.all: len(weights.layers)}


@pytest.mark.slow
def test_what_peft_trains_as_dora_is_peft_s_own_lora_without_the_magnitudes(
    one_unet: UNet2DConditionModel, tmp_path: Path
) -> None:
    twins = []
    for use_dora in (True, False):
        twin = UNet2DConditionModel.from_config(one_unet.config)
        twin.load_state_dict(one_unet.state_dict())
        config = LoraConfig(r=4, lora_alpha=2, target_modules=ATTENTION, use_dora=use_dora)
        twins.append(get_peft_model(twin, config).eval())
    dora, plain = twins
    scramble(dora)
    dora.save_pretrained(str(tmp_path))
    values = dict(dora.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(values[name])
    with pytest.raises(AdapterFormatError, match="DoRA"):
        read_adapter(tmp_path, unet=one_unet)
    found = read_foreign(tmp_path, unet=one_unet, skip={DORA})
    close(bank_predicts(one_unet, found.weights), predict(plain))
    assert not torch.allclose(predict(plain), predict(dora), atol=1e-3)
    assert len(found.left_out.names) == len(found.weights.layers)


def test_trained_biases_of_peft_are_left_out_with_the_setting_that_says_so(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory, tmp_path: Path
) -> None:
    twin = UNet2DConditionModel.from_config(one_unet.config)
    model = get_peft_model(twin, LoraConfig(r=4, lora_alpha=4, target_modules=["to_out.0"], bias="lora_only"))
    scramble(model)
    model.save_pretrained(str(tmp_path))
    with pytest.raises(AdapterFormatError, match=r"bias is a bias.*--skip-unsupported"):
        read_adapter(tmp_path, unet=one_unet)
    found = read_foreign(tmp_path, unet=one_unet, skip=UNSUPPORTED)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert found.left_out.names == sorted(key for key in tensors if key.endswith(".bias"))
    assert sorted(found.weights.layers) == sorted(
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key
    )


def test_settings_that_leave_nothing_to_leave_out_are_still_refused(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory, tmp_path: Path
) -> None:
    weights = make_weights(one_unet)
    tensors = {}
    for name, layer in weights.layers.items():
        tensors |= {f"unet.{name}.lora_A.weight": layer.down, f"unet.{name}.lora_B.weight": layer.up}
    path = tmp_path / "cup.safetensors"
    for header, says in (
        ({"unet.init_lora_weights": "pissa"}, "pissa"),
        ({"unet.fan_in_fan_out": "True"}, "fan_in"),
        ({"unet.use_dora": "True"}, "DoRA"),  # of whose magnitudes the file has none
        ({"unet.bias": "all"}, "bias"),
    ):
        save_file(tensors, path, {"unet.lora_alpha": "2", **header})
        with pytest.raises(AdapterFormatError, match=says):
            read_foreign(path, unet=one_unet, skip=UNSUPPORTED)
