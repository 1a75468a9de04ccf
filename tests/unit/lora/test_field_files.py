"""Adapter files as people have them: kohya's defaults, renamed files of PEFT, scales in the header, odd prefixes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from cat_cluster.errors import AdapterFormatError, AdapterMismatchError
from cat_cluster.lora.formats import TEXT_ENCODER, AdapterWeights, read_adapter, read_foreign, write_adapter
from tests.unit.lora.conftest import WeightsFactory
from tests.unit.lora.test_formats import ATTENTION, assert_same, bank_predicts, close, peft_folder, predict

pytestmark = pytest.mark.slow

TEXT_LAYER = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


def kohya_file(weights: AdapterWeights, path: Path, *, alpha: float, text_width: int = 0) -> Path:
    """What kohya's trainer writes by default: every transformer layer, 1x1 convolutions too, and the text encoder."""
    tensors: dict[str, Tensor] = {}
    for name, layer in weights.layers.items():
        prefix, ones = f"lora_unet_{name.replace('.', '_')}", (1, 1) if layer.convolution else ()
        tensors[f"{prefix}.lora_down.weight"] = layer.down.reshape(*layer.down.shape, *ones)
        tensors[f"{prefix}.lora_up.weight"] = layer.up.reshape(*layer.up.shape, *ones)
        tensors[f"{prefix}.alpha"] = torch.tensor(alpha)
    if text_width:
        tensors[f"{TEXT_LAYER}.lora_down.weight"] = torch.ones(4, text_width)
        tensors[f"{TEXT_LAYER}.lora_up.weight"] = torch.ones(text_width, 4)
        tensors[f"{TEXT_LAYER}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, {"ss_network_dim": "4"})
    return path


def test_kohyas_default_file_means_what_diffusers_makes_of_its_unet_part(
    tiny_base_folder: Path, make_weights: WeightsFactory, tmp_path: Path
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base_folder)
    weights = make_weights(pipeline.unet, targets="attention_ff", convolutions=True)
    width = pipeline.text_encoder.config.hidden_size
    path = kohya_file(weights, tmp_path / "cup.safetensors", alpha=2.0, text_width=width)
    with pytest.raises(AdapterFormatError, match=rf"{TEXT_LAYER}.*text-encoder part.*--unet-only"):
        read_adapter(path, unet=pipeline.unet)
    found = read_foreign(path, unet=pipeline.unet, skip={TEXT_ENCODER})
    assert found.left_out.names == sorted(key for key in load_file(path) if key.startswith("lora_te_"))
    ours = bank_predicts(pipeline.unet, found.weights)
    state, alphas = pipeline.lora_state_dict(tmp_path, weight_name=path.name)
    pipeline.load_lora_into_unet(state, alphas, pipeline.unet)
    close(ours, predict(pipeline.unet))


@pytest.mark.parametrize("fmt", ["diffusers", "peft", "kohya"])
def test_1x1_convolutions_go_out_and_come_back(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory, fmt: str, tmp_path: Path
) -> None:
    weights = make_weights(one_unet, ranks=(2, 4), targets="attention_ff", convolutions=True)
    path = write_adapter(weights, tmp_path, fmt, adapter_id="cup", metadata={})  # type: ignore[arg-type]
    found = read_adapter(path, unet=one_unet)
    assert_same(found, weights)
    assert [layer.convolution for _, layer in sorted(found.layers.items())] == [
        layer.convolution for _, layer in sorted(weights.layers.items())
    ]
    if fmt == "diffusers":
        ours = bank_predicts(one_unet, found)
        one_unet.load_lora_adapter(load_file(path), prefix="unet")
        close(ours, predict(one_unet))


def test_a_projection_may_be_a_convolution_in_the_file_and_a_linear_in_the_base(
    unet: UNet2DConditionModel, make_weights: WeightsFactory, tmp_path: Path
) -> None:
    weights = make_weights(unet, targets="attention_ff", convolutions=True)
    name = next(name for name in weights.layers if name.endswith("proj_in"))
    layer = weights.layers[name]
    for ones in ((), (1, 1)):
        sides = {"A": layer.down, "B": layer.up}
        data = save({f"unet.{name}.lora_{s}.weight": t.reshape(*t.shape, *ones) for s, t in sides.items()})
        assert_same(read_adapter(data, unet=unet), AdapterWeights({name: layer}))


def test_larger_convolutions_are_refused_by_name(one_unet: UNet2DConditionModel) -> None:
    up = {"lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight": torch.ones(8, 2, 1, 1)}
    down = {"lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": torch.ones(2, 8, 3, 3)}
    with pytest.raises(AdapterFormatError, match=r"conv1.*a convolution layer larger than 1x1"):
        read_adapter(save({**up, **down}), unet=one_unet)
    of_conv_in = {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 1, 1), "unet.conv_in.lora_B.weight": torch.ones(8, 2)}
    with pytest.raises(AdapterMismatchError, match=r"conv_in is not a linear layer or 1x1 convolution"):
        read_adapter(save(of_conv_in), unet=one_unet)


def test_a_file_of_a_text_encoder_alone_is_refused(tmp_path: Path) -> None:
    save_file({f"{TEXT_LAYER}.lora_down.weight": torch.ones(2, 2)}, tmp_path / "text.safetensors")
    with pytest.raises(AdapterFormatError, match="holds a text-encoder part alone"):
        read_foreign(tmp_path / "text.safetensors", skip={TEXT_ENCODER})


@pytest.mark.parametrize(
    ("header", "strength"),
    [
        ({"unet.lora_alpha": "2", "unet.r": "4"}, 0.5),
        ({"lora_alpha": "2", "r": "4"}, 0.5),
        ({"unet.lora_alpha": "2", "unet.r": "4", "unet.use_rslora": "True"}, 1.0),
        ({"unet.lora_alpha": "2", "unet.alpha_pattern": '{"to_q": 8}', "text_encoder.lora_alpha": "1"}, None),
        ({"format": "pt"}, 1.0),
    ],
)
def test_settings_written_one_by_one_in_the_header_are_applied(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory, header: dict[str, str], strength: float | None
) -> None:
    weights = make_weights(one_unet, ranks=(4,))
    tensors = {}
    for name, layer in weights.layers.items():
        tensors[f"unet.{name}.lora_A.weight"], tensors[f"unet.{name}.lora_B.weight"] = layer.down, layer.up
    found = read_adapter(save(tensors, header), unet=one_unet)
    for name, layer in weights.layers.items():
        factor = strength or (2.0 if name.endswith("to_q") else 0.5)
        torch.testing.assert_close(found.layers[name].up, factor * layer.up, rtol=1e-6, atol=0.0)


def test_settings_in_the_header_that_are_not_applied_are_refused(one_unet: UNet2DConditionModel) -> None:
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"unet.{name}.lora_{side}.weight": torch.ones(8, 8) for side in "AB"}
    for header, said in (({"unet.use_dora": "True"}, "DoRA"), ({"unet.init_lora_weights": "pissa"}, "pissa")):
        with pytest.raises(AdapterFormatError, match=said):
            read_adapter(save(tensors, {"unet.lora_alpha": "2", **header}), unet=one_unet)


def test_a_renamed_file_of_peft_is_read_with_the_config_beside_it(
    unet: UNet2DConditionModel, make_weights: WeightsFactory, tmp_path: Path
) -> None:
    twin = UNet2DConditionModel.from_config(unet.config)
    twin.load_state_dict(unet.state_dict())
    theirs = peft_folder(twin, tmp_path, LoraConfig(r=4, lora_alpha=2, target_modules=ATTENTION))
    renamed = (tmp_path / "adapter_model.safetensors").rename(tmp_path / "my_style.safetensors")
    for source in (renamed, tmp_path):
        close(bank_predicts(unet, read_adapter(source, unet=unet)), theirs)
    (tmp_path / "adapter_model.safetensors").write_bytes(renamed.read_bytes())
    with pytest.raises(AdapterFormatError, match=r"belongs to .*: put the file into a folder"):
        read_adapter(renamed, unet=unet)


@pytest.mark.parametrize("prefix", ["unet.base_model.model.", "base_model.model.unet.", "base_model.model."])
def test_every_prefix_of_peft_is_read_at_the_configs_scale(
    one_unet: UNet2DConditionModel, make_weights: WeightsFactory, prefix: str, tmp_path: Path
) -> None:
    weights = make_weights(one_unet, ranks=(4,))
    tensors = {}
    for name, layer in weights.layers.items():
        tensors[f"{prefix}{name}.lora_A.weight"], tensors[f"{prefix}{name}.lora_B.weight"] = layer.down, layer.up
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, path)
    with pytest.raises(AdapterFormatError, match=r"adapter_config\.json: put that file beside it"):
        read_adapter(path, unet=one_unet)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2}))
    found = read_adapter(path, unet=one_unet)
    assert set(found.layers) == set(weights.layers)
    for name, layer in weights.layers.items():
        torch.testing.assert_close(found.layers[name].up, 0.5 * layer.up, rtol=1e-6, atol=0.0)
